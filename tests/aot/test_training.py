"""Training steps ahead of time: losses, weights and checkpoints `==` those of eager and graph mode, in Python and from C."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import duo
import duo.graph as tf
from duo import nn, optim
from duo_ir.errors import ArgumentError, FormatError, ShapeError
from tests.aot.models import Cnn, floats

F = nn.functional
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="artefacts are for Linux")
SPECS = ("x: f32[batch,20]", "y: i64[batch]")
OPTIMIZERS = {
    "Adam": lambda p: optim.Adam(p, lr=1e-2),
    "AdamW": lambda p: optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    "SGD": lambda p: optim.SGD(p, lr=0.05),
    "momentum": lambda p: optim.SGD(p, lr=0.05, momentum=0.9, dampening=0.1),
    "RMSprop": lambda p: optim.RMSprop(p, lr=1e-3),
}


def made(optimizer: str = "Adam"):
    layers = nn.Linear(20, 33), nn.BatchNorm1d(33), nn.ReLU(), nn.Dropout(0.2), nn.Linear(33, 10)
    model = nn.Sequential(*layers)
    return model, OPTIMIZERS[optimizer](model.parameters())


def batch(k: int):
    n = 12 + k % 3
    return floats(k, n, 20), np.random.default_rng(k).integers(0, 10, n)


def step(model, optimizer, x, y):
    model.train()
    optimizer.zero_grad()
    loss = F.cross_entropy(model(duo.tensor(x)), duo.tensor(y))
    loss.backward()
    optimizer.step()
    return loss.item()


def checkpoint(model, optimizer):
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "generator": duo.get_rng_state()}


def restore(path, model, optimizer):
    found = duo.load(path)
    model.load_state_dict(found["model"])
    optimizer.load_state_dict(found["optimizer"])
    duo.set_rng_state(found["generator"])


def assert_same(loaded, model):
    for name, tensor in model.state_dict().items():
        assert loaded.get_state(f"model.{name}").tobytes() == tensor.numpy().tobytes(), name


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_steps_and_checkpoints(tmp_path, optimizer):
    duo.manual_seed(1)
    model, opt = made(optimizer)
    before = {k: v.numpy().copy() for k, v in model.state_dict().items()}
    duo.export_training(model, F.cross_entropy, opt, *SPECS, path=tmp_path / "t.duo")
    assert not opt.state_dict()["state"] and all((v.numpy() == before[k]).all() for k, v in model.state_dict().items())
    loaded = duo.load_executable(tmp_path / "t.duo")

    loaded.init(5)  # as a model made anew
    duo.manual_seed(5)
    model, opt = made(optimizer)
    assert_same(loaded, model)
    for k in range(4):
        assert loaded.train_step(*batch(k)).item() == step(model, opt, *batch(k)), k
    assert_same(loaded, model)
    x, _ = batch(9)
    assert (loaded.forward(x) == model.eval()(duo.tensor(x)).detach().numpy()).all()

    loaded.save(tmp_path / "from.safetensors")  # goes on in eager mode
    model, opt = made(optimizer)
    restore(tmp_path / "from.safetensors", model, opt)
    for k in range(4, 6):
        assert loaded.train_step(*batch(k)).item() == step(model, opt, *batch(k)), k

    duo.save(checkpoint(model, opt), tmp_path / "back.safetensors")  # and back
    loaded.init(77)
    loaded.train_step(*batch(0))
    loaded.load(tmp_path / "back.safetensors")
    for k in range(6, 8):
        assert loaded.train_step(*batch(k)).item() == step(model, opt, *batch(k)), k
    assert_same(loaded, model)


def test_a_checkpoint_from_before_the_first_step(tmp_path):
    model, opt = made("momentum")
    duo.export_training(model, F.cross_entropy, opt, *SPECS, path=tmp_path / "t.duo")
    loaded = duo.load_executable(tmp_path / "t.duo")
    loaded.init(3)
    loaded.save(tmp_path / "c.safetensors")
    restore(tmp_path / "c.safetensors", model, opt)
    assert not opt.state_dict()["state"]
    assert loaded.train_step(*batch(0)).item() == step(model, opt, *batch(0))
    loaded.load(tmp_path / "c.safetensors")  # untrained again
    restore(tmp_path / "c.safetensors", model, opt)
    for k in range(2):
        assert loaded.train_step(*batch(k)).item() == step(model, opt, *batch(k)), k


def test_a_checkpoint_goes_on_in_a_session(tmp_path):
    duo.manual_seed(2)
    model, opt = made()
    duo.export_training(model, F.cross_entropy, opt, *SPECS, path=tmp_path / "t.duo")
    loaded = duo.load_executable(tmp_path / "t.duo")
    for k in range(3):
        loaded.train_step(*batch(k))
    loaded.save(tmp_path / "c.safetensors")
    model, opt = made()
    restore(tmp_path / "c.safetensors", model, opt)
    with tf.Graph().as_default(), tf.Session() as session:
        x, y = tf.placeholder(tf.float32, [None, 20]), tf.placeholder(tf.int64, [None])
        loss = F.cross_entropy(model.train()(x), y)
        train = opt.minimize(loss)
        for k in range(3, 5):
            given = batch(k)
            assert session.run([loss, train], {x: given[0], y: given[1]})[0] == loaded.train_step(*given), k
    assert_same(loaded, model)


def test_a_convolutional_network_trains(tmp_path):
    duo.manual_seed(3)
    model = Cnn()
    opt = optim.Adam(model.parameters(), lr=1e-2)
    duo.export_training(model, F.cross_entropy, opt, "f32[batch,1,14,14]", "i64[batch]", path=tmp_path / "t.duo")
    loaded = duo.load_executable(tmp_path / "t.duo")
    for k in range(3):
        x, y = floats(k, 3 + k, 1, 14, 14), np.random.default_rng(k).integers(0, 10, 3 + k)
        assert loaded.train_step(x, y).item() == step(model, opt, x, y), k
    assert_same(loaded, model)


def test_convolutions_over_no_samples(tmp_path):
    """The gradient of a second convolution's weights sums over a batch that may be empty; the step is lost, the process is not."""
    duo.manual_seed(3)
    layers = nn.Conv2d(1, 8, 3, padding=1), nn.GELU(), nn.Conv2d(8, 8, 3, stride=2), nn.Flatten(), nn.Linear(72, 3)
    model = nn.Sequential(*layers)
    opt = optim.SGD(model.parameters(), lr=1e-2)
    duo.export_training(model, loss_that_counts, opt, "f32[n,1,8,8]", "f32[n,3]", path=tmp_path / "t.duo")
    loaded = duo.load_executable(tmp_path / "t.duo")
    for n in (2, 0, 1):
        x, y = floats(n, n, 1, 8, 8), floats(n + 9, n, 3)
        opt.zero_grad()
        loss = loss_that_counts(model(duo.tensor(x)), duo.tensor(y))
        loss.backward()
        opt.step()
        assert loaded.train_step(x, y).item() == loss.item(), n
    assert np.isfinite(loss.item())
    assert_same(loaded, model)


def loss_that_counts(out, y):
    return ((out - y) ** 2).sum()


def test_what_forward_takes(tmp_path):
    """A language model's loss has one input, which the model has too; a diffusion model's draws the other one of the model's inputs."""
    duo.manual_seed(6)
    path = tmp_path / "t.duo"
    words = nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 9))
    tokens = np.random.default_rng(0).integers(0, 9, (3, 5))

    def next_word(model, x):
        return F.cross_entropy(model(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten())

    duo.export_training(words, next_word, optim.SGD(words.parameters(), lr=0.1), "i64[b,5]", path=path)
    loaded = duo.load_executable(path)
    assert np.array_equal(loaded.forward(tokens), words(duo.tensor(tokens)).detach().numpy())
    assert loaded.train_step(tokens).item() == next_word(words, duo.tensor(tokens)).item()

    class Denoiser(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x, t, scale=1.0):
            return self.linear(x) * t * scale

    def noised(model, x):
        t = duo.rand(x.shape[0], 1)
        return ((model(x * t, t) - x) ** 2).mean()

    model = Denoiser()
    opt = optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ArgumentError, match=r"Denoiser takes 2 inputs and a step has 1.*forward="):
        duo.export_training(model, noised, opt, "f32[n,4]", path=path)
    duo.export_training(model, noised, opt, "f32[n,4]", path=path, forward=["f32[n,4]", "f32[n,1]"])
    loaded = duo.load_executable(path)
    x, t = floats(0, 3, 4), floats(1, 3, 1)
    assert np.array_equal(loaded.forward(x, t), model(duo.tensor(x), duo.tensor(t)).detach().numpy())
    assert loaded.train_step(x).item() == noised(model, duo.tensor(x)).item()


def test_hyperparameters_can_change(tmp_path):
    duo.manual_seed(4)
    model, opt = made()
    duo.export_training(model, F.cross_entropy, opt, *SPECS, path=tmp_path / "t.duo")
    loaded = duo.load_executable(tmp_path / "t.duo")
    for k, lr in enumerate((0.1, 0.01)):
        opt.param_groups[0]["lr"] = lr
        loaded.set_state("lr", lr)
        assert loaded.train_step(*batch(k)).item() == step(model, opt, *batch(k))
    assert_same(loaded, model)
    with pytest.raises(ArgumentError, match="no state 'rate'"):
        loaded.set_state("rate", 1)
    with pytest.raises(ShapeError, match="lr: f64"):
        loaded.set_state("lr", [1, 2])


def test_a_loss_of_the_model(tmp_path):
    duo.manual_seed(5)
    model = nn.Linear(4, 3)
    opt = optim.SGD(model.parameters(), lr=0.1)

    def loss_of(model, a, b):
        return ((model(a) - model(b)) ** 2).mean() + model.weight.abs().sum()

    duo.export_training(model, loss_of, opt, "f32[n,4]", "f32[n,4]", path=tmp_path / "t.duo")
    loaded = duo.load_executable(tmp_path / "t.duo")
    for k in range(2):
        a, b = floats(k, 5, 4), floats(k + 9, 5, 4)
        opt.zero_grad()
        loss = loss_of(model, duo.tensor(a), duo.tensor(b))
        loss.backward()
        opt.step()
        assert loaded.train_step(a, b).item() == loss.item()
    assert_same(loaded, model)


def test_other_files_are_refused_and_change_nothing(tmp_path):
    duo.manual_seed(6)
    model, opt = made()
    duo.export_training(model, F.cross_entropy, opt, *SPECS, path=tmp_path / "t.duo")
    loaded = duo.load_executable(tmp_path / "t.duo")
    loaded.train_step(*batch(0))
    loaded.save(tmp_path / "good.safetensors")
    want = {name: loaded.get_state(name).tobytes() for name in loaded.states}
    good = (tmp_path / "good.safetensors").read_bytes()
    length = int.from_bytes(good[:8], "little")
    head = good[8 : 8 + length]

    def framed(header: bytes) -> bytes:
        return len(header).to_bytes(8, "little") + header + good[8 + length :]

    bad = {
        "empty": b"", "short": good[:6], "cut": good[:-1], "cut header": good[: 8 + length // 2], "long": (1 << 62).to_bytes(8, "little") + good[8:],
        "negative": (1 << 63).to_bytes(8, "little") + good[8:], "not JSON": framed(b"[" + head[1:]), "open": framed(head.rstrip()[:-1]),
        "offsets": framed(head.replace(b'"data_offsets":[0,', b'"data_offsets":[1,')),
        "beyond": framed(head.replace(b'"data_offsets":[0,', b'"data_offsets":[999999999999999999,')),
        "digits": framed(head.replace(b'"data_offsets":[0,', b'"data_offsets":[0' + b"9" * 40 + b",")),
        "dtype": framed(head.replace(b'"dtype":"F32"', b'"dtype":"F64"', 1)),
        "shape": framed(head.replace(b'"shape":[33,20]', b'"shape":[20,33]')),
        "missing": framed(head.replace(b"model.0.weight", b"model.9.weight")),
        "some of the optimizer": framed(head.replace(b'"optimizer.state.0.exp_avg_sq":', b'"optimizer.state.0.exp_avg_xx":')),
        "twice": framed(head.rstrip()[:-1] + b',"generator":{"dtype":"I64","shape":[2],"data_offsets":[0,16]}}'),
        "deep": framed(head.rstrip()[:-1] + b',"x":' + b"[" * 5000 + b"]" * 5000 + b"}"),
    }  # fmt: skip
    for name, content in bad.items():
        assert content != good, name
        (tmp_path / "bad").write_bytes(content)
        with pytest.raises(FormatError, match="bad"):
            loaded.load(tmp_path / "bad")
        assert {n: loaded.get_state(n).tobytes() for n in loaded.states} == want, name
    with pytest.raises(FormatError, match="cannot be opened"):
        loaded.load(tmp_path / "nowhere")
    with pytest.raises(FormatError, match="cannot be written"):
        loaded.save(tmp_path / "no" / "where")
    loaded.load(tmp_path / "good.safetensors")


EXAMPLE = Path(__file__).parents[2] / "examples"


@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs a C compiler")
def test_the_example_in_c(tmp_path):
    pytest.importorskip("sklearn")
    spec = importlib.util.spec_from_file_location("export_digits", EXAMPLE / "export_digits.py")
    digits = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(digits)
    digits.main(tmp_path)
    flags = ["-std=c99", "-Wall", "-Wextra", "-Werror", f"-I{tmp_path}", f"-L{tmp_path}", f"-Wl,-rpath,{tmp_path}"]
    program = tmp_path / "train"
    subprocess.run(["gcc", *flags, str(EXAMPLE / "train_digits.c"), "-ldigits", "-o", str(program)], check=True)

    def run(*arguments) -> list[float]:
        done = subprocess.run([program, *arguments], cwd=tmp_path, capture_output=True, check=True)
        return [float.fromhex(line) for line in done.stdout.decode().split()]

    duo.manual_seed(0)
    model, optimizer = digits.build()
    assert run("one.safetensors") == digits.train(model, optimizer)
    found = duo.load(tmp_path / "one.safetensors")
    assert all(found["model"][k].numpy().tobytes() == v.numpy().tobytes() for k, v in model.state_dict().items())
    losses = run("two.safetensors", "one.safetensors")
    assert losses == digits.train(model, optimizer) and losses[-1] < 0.3
