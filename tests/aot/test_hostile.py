"""Files that are not what they say, and calls from many threads at once."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import struct
import sys
import threading
import time
import tracemalloc

import numpy as np
import pytest

import duo
from duo_backends.aot import container
from duo_ir.errors import DuoError, FormatError
from tests.aot.models import cnn, floats, mlp

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="artefacts are for Linux")


@pytest.fixture(scope="module")
def content(tmp_path_factory):
    path = tmp_path_factory.mktemp("aot") / "m.duo"
    duo.export(mlp(), "f32[batch,20]", path=path)
    return path.read_bytes()


def edited(content: bytes, change) -> bytes:
    """The file with another manifest, whose digest is right."""
    length = struct.unpack_from("<Q", content, 16)[0]
    manifest = json.loads(content[64 : 64 + length])
    change(manifest)
    text = json.dumps(manifest, separators=(",", ":")).encode().ljust(length)
    out = bytearray(content)
    first = min(s["offset"] for s in json.loads(content[64 : 64 + length])["sections"])
    assert 64 + len(text) <= first
    out[64 : 64 + len(text)] = text
    out[64 + len(text) : first] = bytes(first - 64 - len(text))
    struct.pack_into("<Q", out, 16, len(text))
    out[32:64] = hashlib.sha256(text).digest()
    return bytes(out)


def section(number, **new):
    return lambda m: m["sections"][number].update(new)


CHANGES = {
    "offset beyond": section(0, offset=1 << 40),
    "offset within the header": section(0, offset=0),
    "odd offset": section(0, offset=4097),
    "negative": section(0, offset=-4096),
    "size beyond": section(0, size=1 << 40),
    "size a float": section(0, size=1.5),
    "size true": section(0, size=True),
    "overlap": lambda m: m["sections"][1].update(offset=m["sections"][0]["offset"]),
    "kind": section(0, kind="program"),
    "no sections": lambda m: m.pop("sections"),
    "sections a dict": lambda m: m.update(sections={}),
    "digest": lambda m: m["sections"][-1].update(sha256="0" * 64),
    "weights of another kind": lambda m: m["sections"][-1].update(weights=1),
    "weights missing": lambda m: m["sections"][-1].update(weights=99),
    "no programs": lambda m: m.update(programs=[]),
    "two of one name": lambda m: m["programs"].append(m["programs"][0]),
    "dtype": lambda m: m["programs"][0]["inputs"][0].update(dtype="f128"),
    "absurd shape": lambda m: m["programs"][0]["inputs"][0].update(shape=[1 << 60]),
    "shape of text": lambda m: m["programs"][0]["inputs"][0].update(shape="many"),
    "unknown size": lambda m: m["programs"][0]["inputs"][0].update(shape=[[[1, "zzz"]]]),
    "program's name": lambda m: m["programs"][0].update(name="a b"),
    "name": lambda m: m.update(name="../x"),
    "nesting": lambda m: m["programs"][0].update(dims=[[[[]]]]),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_manifests_that_lie(tmp_path, content, name):
    (tmp_path / "bad.duo").write_bytes(edited(content, CHANGES[name]))
    with pytest.raises(FormatError, match=r"bad\.duo is damaged"):
        duo.load_executable(tmp_path / "bad.duo")


def test_a_code_that_is_for_another_cpu_is_not_run(tmp_path, content):
    def other(manifest):
        manifest["sections"][-1]["needs"] = ["amx-tile-99"]

    (tmp_path / "m.duo").write_bytes(edited(content, other))
    assert duo.load_executable(tmp_path / "m.duo").target == "compiled here"


def test_a_new_version_is_refused_by_its_number(tmp_path, content):
    out = bytearray(content)
    struct.pack_into("<I", out, 8, 3)
    (tmp_path / "new.duo").write_bytes(out)
    with pytest.raises(FormatError, match="version 3 of the format; this duo reads versions up to 2"):
        duo.load_executable(tmp_path / "new.duo")


def test_weights_are_verified_on_request(tmp_path, content):
    (where,) = [s for s in container.read(content, "m").sections if s.kind == "weights"]
    out = bytearray(content)
    out[where.offset + where.size - 1] ^= 1
    (tmp_path / "m.duo").write_bytes(out)
    duo.load_executable(tmp_path / "m.duo")
    with pytest.raises(FormatError, match="its weights is not what was written"):
        duo.load_executable(tmp_path / "m.duo", verify=True)


def test_mutations_never_get_as_far_as_code(content):
    """Random damage anywhere but in the weights, which have a digest of their own: refused, within the file's memory."""
    rng = random.Random(0)
    manifest = container.read(content, "m")
    (weights,) = [s for s in manifest.sections if s.kind == "weights"]
    tracemalloc.start()
    for _ in range(300):
        out = bytearray(content)
        kind = rng.randrange(4)
        at = rng.randrange(len(out))
        while weights.offset <= at < weights.offset + weights.size:
            at = rng.randrange(len(out))
        if kind == 0:
            out[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del out[at:]
        elif kind == 2:
            out[at:at] = rng.randbytes(rng.randrange(1, 64))
        else:
            out[at : at + 8] = struct.pack("<Q", rng.choice([0, 1, 1 << 31, 1 << 63, (1 << 64) - 1]))
        if out == content:
            continue
        try:
            found = container.read(bytes(out), "m")
            for s in found.sections:
                container.section_bytes(bytes(out), s, "m")
        except DuoError:
            continue
        padding = all(not s.offset <= at < s.offset + s.size for s in found.sections)
        assert padding and found == manifest  # between sections there is nothing to be damaged
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8 * len(content) + (1 << 20)


def test_threads_and_models(tmp_path):
    """Two artefacts, several models of each, eight threads."""
    jobs = []
    for name, make, spec, shape in (("a", mlp, "f32[batch,20]", (20,)), ("b", cnn, "f32[batch,1,14,14]", (1, 14, 14))):
        model = make()
        duo.export(model, spec, path=tmp_path / f"{name}.duo")
        for k in range(4):
            x = floats(k, 3 + k, *shape)
            loaded = duo.load_executable(tmp_path / f"{name}.duo", threads=1 + k % 2)
            jobs.append((loaded, x, model(duo.tensor(x)).detach().numpy()))
    wrong = []

    def work(loaded, x, want):
        for k in range(40):
            part = x[: 1 + k % len(x)]
            if loaded(part).tobytes() != want[: len(part)].tobytes():
                wrong.append(k)

    threads = [threading.Thread(target=work, args=job) for job in jobs]
    threads += [threading.Thread(target=work, args=jobs[0])]  # the same model from two threads
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_child_goes_on_with_a_model_that_another_thread_was_running(tmp_path):
    """Fork finds the model's lock and its pool of threads in the hands of a thread that the child does not have."""
    model, x = mlp(), floats(0, 400, 20)
    duo.export(model, "f32[batch,20]", path=tmp_path / "m.duo")
    duo.export(model, "f32[400,20]", path=tmp_path / "fixed.duo")
    files = [duo.load_executable(tmp_path / name, threads=2) for name in ("m.duo", "fixed.duo")]
    want = [f(x).tobytes() for f in files]
    on = True

    def loop(loaded):
        while on:
            loaded(x)

    threads = [threading.Thread(target=loop, args=(f,)) for f in files]
    for t in threads:
        t.start()
    codes = []
    for _ in range(8):
        time.sleep(0.003)
        child = os.fork()
        if child == 0:
            signal.alarm(200)
            ended = [f(x).tobytes() for f in files] == want and duo.load_executable(tmp_path / "m.duo")(x).tobytes() == want[0]
            os._exit(0 if ended else 1)
        codes.append(os.waitpid(child, 0)[1])
        if codes[-1]:
            break
    on = False
    for t in threads:
        t.join()
    assert codes == [0] * 8


def test_control_flow_and_integers(tmp_path):
    def steps(x, n):
        def body(k, v):
            return k + 1, v * 2 + 1

        _, v = duo.while_loop(lambda k, v: k < n, body, (n * 0, x))
        return duo.cond(v.sum() > 10, lambda: v, lambda: -v)

    duo.export(steps, "i32[m]", "i64[]", path=tmp_path / "w.duo")
    loaded = duo.load_executable(tmp_path / "w.duo")
    for m, n in ((1, 0), (3, 2), (5, 7)):
        x = np.arange(m, dtype="i4")
        want = steps(duo.tensor(x), duo.tensor(n)).numpy()
        assert (loaded(x, np.int64(n)) == want).all(), (m, n)
