"""The command `duo`: what it prints, its exit codes, and that the demo's comparisons can fail."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import duo
from duo import cli, runtime
from duo.demo import digits, modes, report
from duo_ir.errors import DuoError


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """`python -m duo` as a user runs it."""
    return subprocess.run(
        [sys.executable, "-m", "duo", *arguments], env={**os.environ, **environment}, capture_output=True, text=True
    )


def test_demo_trains_and_finds_equal_bits(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    done = run("demo", "--epochs", "2", DUO_CACHE_DIR=str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert len(lines) <= 80
    assert sum("equal, bit for bit" in line for line in lines) == 2 and "the same program" in done.stdout
    for what in ("eager mode", "graph mode", "@duo.compile", "func @", "contract(", str(tmp_path)):
        assert what in done.stdout
    (row,) = [line.split() for line in lines if line.startswith("    2 ")]
    assert row[1:3] == row[4:6] == row[7:9]
    assert float(row[2].rstrip("%")) > 60


def test_demo_fails_when_a_bit_differs(capsys: pytest.CaptureFixture) -> None:
    first, second = modes.eager(), modes.eager()
    second.resume(first.checkpoint())
    assert report._differences([first, second]) == []
    with duo.no_grad():
        second.model.layers[0].bias[3] += 1e-8
    first.losses.append(np.float32(1.0))
    second.losses.append(np.nextafter(np.float32(1.0), np.float32(2.0)))
    found = report._differences([first, second])
    assert len(found) == 2 and "at step 0" in found[0] and "layers.0.bias" in found[1]
    assert not report._report("weights", found, "")
    assert "DIFFERENT" in capsys.readouterr().out


def test_digits_are_split_and_batched_alike_every_time() -> None:
    pytest.importorskip("sklearn")
    data = digits.load_digits()
    assert data.train_images.shape == (1408, 64) and data.test_images.shape == (389, 64)
    assert data.train_images.dtype == np.float32 and data.train_images.max() == 1.0
    first = [labels for _, labels in data.batches(0, 7)]
    assert all(np.array_equal(a, b) for a, (_, b) in zip(first, data.batches(0, 7)))
    assert not all(np.array_equal(a, b) for a, (_, b) in zip(first, data.batches(1, 7)))
    assert sorted(np.concatenate(first)) == sorted(data.train_labels)


def test_missing_scikit_learn_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    assert cli.main(["demo"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("duo: ") and error.count("\n") == 1 and "pip install 'duo[examples]'" in error


def test_errors_are_one_line_unless_debugging(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    def fail(*_: object) -> int:
        raise DuoError("first line\n  second line")

    monkeypatch.setattr(cli, "demo", fail)
    monkeypatch.delenv("DUO_DEBUG", raising=False)
    assert cli.main(["demo"]) == 1
    assert capsys.readouterr().err == "duo: first line second line\n"
    monkeypatch.setenv("DUO_DEBUG", "1")
    with pytest.raises(DuoError):
        cli.main(["demo"])


def test_wrong_settings_are_errors_of_one_line() -> None:
    done = run("info", DUO_CPU="nonsense")
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "nonsense" in done.stderr


def test_interrupt_has_the_usual_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "demo", interrupted)
    assert cli.main(["demo"]) == 130


@pytest.mark.parametrize("arguments", [[], ["nonsense"], ["demo", "--epochs", "0"], ["demo", "--epochs", "x"]])
def test_wrong_usage_is_exit_code_2(arguments: list[str], capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    assert "usage: duo" in capsys.readouterr().err


def test_info(capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["info", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["duo"] == duo.__version__
    assert found["threads"] == duo.get_num_threads()
    assert found["cpu"]["vector_bits"] == runtime.backend().target.vector_bytes * 8
    assert cli.main(["info"]) == 0
    text = capsys.readouterr().out
    assert duo.__version__ in text and found["cpu"]["name"] in text


def test_cache_shows_and_clears_its_own_files_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("DUO_CACHE_DIR", str(tmp_path / "cache"))
    disk = runtime.backend().disk
    disk.put("ab" * 32, b"x" * 100)
    disk.put("cd" * 32, b"y" * 100)
    other = tmp_path / "cache" / "ab" / "notes.txt"
    other.write_text("mine")
    assert cli.main(["cache"]) == 0
    assert "2 files" in capsys.readouterr().out
    assert cli.main(["cache", "--clear"]) == 0
    assert "removed" in capsys.readouterr().out
    assert disk.usage() == (0, 0) and disk.get("ab" * 32) is None
    assert other.read_text() == "mine"
    monkeypatch.setenv("DUO_CACHE_DIR", "off")
    assert cli.main(["cache", "--clear"]) == 0
    assert "off" in capsys.readouterr().out


def test_version() -> None:
    done = run("--version")
    assert done.returncode == 0 and done.stdout == f"duo {duo.__version__}\n"


def test_a_reader_that_goes_away_is_no_traceback() -> None:
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as out:
        done = subprocess.run(
            [sys.executable, "-u", "-m", "duo", "info"], stdout=out, stderr=subprocess.PIPE, text=True
        )
    assert "Traceback" not in done.stderr and done.returncode == 1
