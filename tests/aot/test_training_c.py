"""C programs that train: losses, outputs and checkpoints of eager mode, any batch, one and two threads; no access beside an array.

What watches over memory: guard pages stop every access beyond a page's edge that kernels make, whatever wrote them, around inputs, losses, outputs,
scratch and the blocks that a model asks for (its states lie in one of these, side by side). memcheck runs the library's machine code itself, so it
sees each byte that is read before it was written. AddressSanitizer and UBSan instrument the C program only; of the library, which gcc has not
compiled, they see calls of libc (memcpy, read, write, malloc, free) and what is left at the end.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest

import duo
import duo.graph as tf
from duo import nn, optim
from tests.aot.models import floats
from tests.aot.programs import program
from tests.aot.test_training import checkpoint, restore, step

F = nn.functional
pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="artefacts are for Linux"),
    pytest.mark.skipif(shutil.which("gcc") is None, reason="needs a C compiler"),
]


class Dense(nn.Sequential):
    """Batch norm and dropout."""

    spec, shape = "x: f32[batch,20]", (20,)

    def __init__(self) -> None:
        first = nn.Linear(20, 90), nn.BatchNorm1d(90), nn.ReLU(), nn.Dropout(0.2)
        super().__init__(*first, nn.Linear(90, 33), nn.Dropout(0.5), nn.Linear(33, 10))


class Images(nn.Sequential):
    """Convolutions, batch norm and dropout."""

    spec, shape = "x: f32[batch,1,14,14]", (1, 14, 14)

    def __init__(self) -> None:
        first = nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(0.3)
        super().__init__(*first, nn.Flatten(), nn.Linear(8 * 49, 10))


MODELS = {
    "dense-adam": (Dense, lambda p: optim.Adam(p, lr=1e-2)),
    "dense-momentum": (Dense, lambda p: optim.SGD(p, lr=0.05, momentum=0.9, dampening=0.1)),
    "images": (Images, lambda p: optim.SGD(p, lr=0.05, momentum=0.9)),
}
SIZES = (12, 2, 33, 7, 64, 3)
BAD_INDEX = 4


class Trainer:
    """A training library, run by the C program."""

    def __init__(self, folder, name: str, target: str = "native") -> None:
        self.make, self.optimizer = MODELS[name]
        self.tight = name == "dense-adam"  # a first step with momentum is another program, which needs less
        self.path = folder / "libt.so"
        model, opt = self.made()
        duo.export_training(model, F.cross_entropy, opt, self.make.spec, "y: i64[batch]", path=self.path, targets=[target])

    def made(self):
        model = self.make()
        return model, self.optimizer(model.parameters())

    def batch(self, k: int):
        n = SIZES[k % len(SIZES)]
        return floats(k, n, *self.make.shape), np.random.default_rng(k).integers(0, 10, n)

    def eager(self, model, opt, steps) -> list[float]:
        return [step(model, opt, *self.batch(k)) for k in steps]

    def run(self, steps, start, to, threads=1, kind="guarded", before=(), bad=None):
        """Losses, and the last output. `bad`: before this step there is one whose labels are out of range."""
        given = []
        for k in steps:
            x, y = self.batch(k)
            for code, labels in ((BAD_INDEX, y * 0 + 99), (0, y)) if k == bad else ((0, y),):
                given += [np.array([code, self.tight, len(x), x.nbytes, labels.nbytes]).tobytes(), x.tobytes(), labels.tobytes()]
        command = [*before, program(kind, "train_model"), str(self.path), "t", str(threads), str(start), str(to)]
        done = subprocess.run(command, input=b"".join(given), capture_output=True, check=False)
        assert done.returncode == 0, (done.returncode, done.stderr.decode()[-3000:])
        found = np.frombuffer(done.stdout, "f4")
        return found[: len(steps)].tolist(), found[len(steps) :].reshape(-1, 10)


@pytest.mark.parametrize("name", MODELS)
def test_steps_of_c_are_those_of_eager_mode(tmp_path, name):
    trainer = Trainer(tmp_path, name)
    duo.manual_seed(5)
    model, opt = trainer.made()
    losses = trainer.eager(model, opt, range(6))
    want = model.eval()(duo.tensor(trainer.batch(5)[0])).detach().numpy()
    for threads in (1, 2):
        got, out = trainer.run(range(6), 5, tmp_path / f"{threads}.safetensors", threads, bad=2)
        assert got == losses, threads
        assert out.tobytes() == want.tobytes(), threads
    assert (tmp_path / "1.safetensors").read_bytes() == (tmp_path / "2.safetensors").read_bytes()
    found = duo.load(tmp_path / "1.safetensors")
    for part, mine in ((found["model"], model.state_dict()), (found["optimizer"]["state"][0], opt.state_dict()["state"][0])):
        for key, value in mine.items():
            assert np.asarray(part[key]).tobytes() == np.asarray(value).tobytes(), key


@pytest.mark.parametrize("name", ["dense-adam", "images"])
def test_a_checkpoint_goes_from_c_to_eager_mode_and_to_a_session_and_back(tmp_path, name):
    trainer = Trainer(tmp_path, name)
    trainer.run(range(3), 7, tmp_path / "c.safetensors")
    whole, _ = trainer.run(range(7), 7, tmp_path / "whole.safetensors")

    model, opt = trainer.made()
    restore(tmp_path / "c.safetensors", model, opt)
    assert trainer.eager(model, opt, (3, 4)) == whole[3:5]
    duo.save(checkpoint(model, opt), tmp_path / "eager.safetensors")

    model, opt = trainer.made()
    restore(tmp_path / "c.safetensors", model, opt)
    with tf.Graph().as_default(), tf.Session() as session:
        x, y = tf.placeholder(tf.float32, [None, *trainer.make.shape]), tf.placeholder(tf.int64, [None])
        loss = F.cross_entropy(model.train()(x), y)
        train = opt.minimize(loss)
        got = [session.run([loss, train], dict(zip((x, y), trainer.batch(k))))[0] for k in (3, 4)]
    assert [float(v) for v in got] == whole[3:5]
    duo.save(checkpoint(model, opt), tmp_path / "session.safetensors")

    for start in ("eager", "session"):
        for threads in (1, 2):
            got, _ = trainer.run((5, 6), tmp_path / f"{start}.safetensors", tmp_path / "end.safetensors", threads)
            assert got == whole[5:7], (start, threads)
        assert tensors(tmp_path / "end.safetensors") == tensors(tmp_path / "whole.safetensors")


def tensors(path) -> dict[str, bytes]:
    """The bytes of each tensor of a safetensors file."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    rows = json.loads(content[8 : 8 + length])
    rows.pop("__metadata__", None)
    return {name: content[8 + length :][slice(*row["data_offsets"])] for name, row in rows.items()}


@pytest.mark.parametrize("name", ["dense-adam", "images"])
def test_training_under_sanitizers(tmp_path, name):
    trainer = Trainer(tmp_path, name)
    for threads in (1, 2):
        want = trainer.run(range(4), 5, tmp_path / "a", threads, bad=1)
        got = trainer.run(range(4), 5, tmp_path / "b", threads, "sanitized", bad=1)
        assert got[0] == want[0] and got[1].tobytes() == want[1].tobytes()


@pytest.mark.skipif(shutil.which("valgrind") is None, reason="needs valgrind")
@pytest.mark.parametrize("name", ["dense-momentum", "images"])
def test_training_under_memcheck(tmp_path, name):
    """Nothing uninitialised is read, what is saved included, and nothing is lost."""
    trainer = Trainer(tmp_path, name, "x86-64-v3")
    checks = ["valgrind", "-q", "--error-exitcode=9", "--leak-check=full", "--fair-sched=yes"]
    want = trainer.run(range(2), 5, tmp_path / "a", bad=1)
    got = trainer.run(range(2), 5, tmp_path / "b", 2, "plain", checks, bad=1)
    assert got[0] == want[0] and got[1].tobytes() == want[1].tobytes()
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
