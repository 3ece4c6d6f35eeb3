"""The README is true: its code runs, its links and folders exist, its variables are read somewhere. The examples run too."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```$", README, re.M | re.S)


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_code_blocks_run(number: int, tmp_path: Path) -> None:
    script = tmp_path / "block.py"
    script.write_text(BLOCKS[number])
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    said = {"vmap": "(64, 1, 10)\n", "export": "(3, 10)\n"}
    for word, want in said.items():
        if word in BLOCKS[number]:
            assert done.stdout == want
            return
    losses = [float(text) for text in re.findall(r"\d+\.\d+(?:e-\d+)?", done.stdout)]
    assert losses and losses[-1 if "loss" in done.stdout else 2] < 1, done.stdout


def test_there_is_a_block_per_way_to_run() -> None:
    assert len(BLOCKS) == 5


def test_links_and_folders_exist() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", README)
    folders = re.findall(r"`((?:duo|duo_ir|duo_backends|tests|examples)(?:/\w+)*)`", README)
    missing = [p for p in {*links, *folders} if not p.startswith("http") and not (ROOT / p).exists()]
    assert links and folders and not missing


def test_variables_are_the_ones_that_the_code_reads() -> None:
    named = set(re.findall(r"^\| `(DUO_\w+)=", README, re.M))
    read: set[str] = set()
    for package in ("duo", "duo_ir", "duo_backends"):
        for path in (ROOT / package).rglob("*.py"):
            lines = [line for line in path.read_text().splitlines() if "environ" in line]
            read.update(re.findall(r"\"(DUO_[A-Z_]+)\"", "\n".join(lines)))
    assert named == read


@pytest.mark.parametrize(
    "name, options", [("digits_eager", 2), ("digits_graph", 2), ("digits_cnn", 1), ("tiny_gpt", 30)]
)
def test_examples_run(name: str, options: int, capsys: pytest.CaptureFixture) -> None:
    if name.startswith("digits"):
        pytest.importorskip("sklearn")
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    result = module.main(options)
    if name == "tiny_gpt":
        loss, text = result
        assert loss < 3.2 and text.startswith("Beautiful") and len(text) == 129
    else:
        assert result > 0.6
        modes = 2 if name == "digits_cnn" else 1
        assert capsys.readouterr().out.count("accuracy") == options * modes
