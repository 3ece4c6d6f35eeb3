"""The command `duo`: `demo`, `info`, `cache`, and for artefacts `compile`, `run`, `inspect`, `bench` (aot/commands.py).

An error that duo raises on purpose, or a file that cannot be used, is one line on stderr and exit code 1; `DUO_DEBUG=1` shows the traceback.
Wrong usage is exit code 2, as argparse has it.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import sys
from collections.abc import Sequence
from importlib import metadata
from typing import Any

import duo
from duo import runtime
from duo.aot.progress import Progress
from duo.demo.report import demo
from duo_ir.errors import DuoError


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; gives the exit code."""
    options = _parser().parse_args(argv)
    try:
        with Progress() as options.progress:
            return options.run(options)
    except DuoError as error:
        if os.environ.get("DUO_DEBUG") == "1":
            raise
        print(f"duo: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader has gone; say nothing at exit
        return 1
    except OSError as error:
        if error.filename is None or os.environ.get("DUO_DEBUG") == "1":
            raise
        print(f"duo: {error.filename}: {error.strerror}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="duo", description="duo: a graph mode, an eager mode, and one result.")
    parser.add_argument("--version", action="version", version=f"duo {duo.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser("demo", help="train a classifier in three modes and compare the bits")
    command.add_argument("--epochs", type=_positive, default=8, help="passes over the images (default: %(default)s)")
    command.add_argument(
        "--seed", type=int, default=0, help="seed of weights, dropout and batches (default: %(default)s)"
    )
    command.set_defaults(run=lambda options: demo(options.epochs, options.seed))

    command = commands.add_parser("info", help="versions, CPU, threads, cache")
    command.add_argument("--json", action="store_true", help="as JSON")
    command.set_defaults(run=_info)

    command = commands.add_parser("cache", help="show or clear the cache of object code")
    command.add_argument("--clear", action="store_true", help="remove all entries")
    command.set_defaults(run=_cache)
    importlib.import_module("duo.aot.commands").add_commands(commands)
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not a positive number")
    return value


# -------------------------------------------------------------------------------------------------------------- info
def facts() -> dict[str, Any]:
    """What `duo info --json` prints."""
    backend = runtime.backend()
    files, nbytes = backend.disk.usage()
    return {
        "duo": duo.__version__,
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "packages": {
            name: _version(name) for name in ("numpy", "llvmlite", "ml_dtypes", "safetensors", "scikit-learn")
        },
        "platform": platform.platform(),
        "cpu": {
            "name": backend.machine.cpu,
            "architecture": backend.target.arch,
            "vector_bits": backend.target.vector_bytes * 8,
        },
        "gpus": [_gpu(n) for n in range(runtime.gpu_count())],
        "no_gpu": runtime.why_no_gpu(),
        "threads": duo.get_num_threads(),
        "cache": {
            "folder": None if backend.disk.directory is None else str(backend.disk.directory),
            "files": files,
            "bytes": nbytes,
            "limit": backend.disk.limit,
        },
        "environment": {k: v for k, v in sorted(os.environ.items()) if k.startswith("DUO_")},
    }


def _gpu(number: int) -> dict[str, Any]:
    found = runtime.backend(runtime.check_device(f"cuda:{number}")).driver.properties
    return {"name": found.name, "capability": f"{found.arch // 10}.{found.arch % 10}", "bytes": found.memory}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _info(options: argparse.Namespace) -> int:
    found = facts()
    if options.json:
        print(json.dumps(found, indent=2))
        return 0
    cpu, cache = found["cpu"], found["cache"]
    rows = [
        ("duo", f"{found['duo']} on {found['python']}"),
        (
            "packages",
            ", ".join(f"{name} {version or '(not installed)'}" for name, version in found["packages"].items()),
        ),
        ("platform", found["platform"]),
        ("cpu", f"{cpu['name']} ({cpu['architecture']}), vectors of {cpu['vector_bits']} bits"),
        *[
            ("gpu", f"{g['name']}, compute capability {g['capability']}, {g['bytes'] / 1e9:.1f} GB")
            for g in found["gpus"]
        ],
        *([("gpu", f"none: {found['no_gpu']}")] if found["no_gpu"] else []),
        ("threads", str(found["threads"])),
        ("cache", _cache_line(cache["folder"], cache["files"], cache["bytes"])),
    ]
    if found["environment"]:
        rows.append(("environment", " ".join(f"{k}={v}" for k, v in found["environment"].items())))
    for name, text in rows:
        print(f"{name:12}{text}")
    return 0


# ------------------------------------------------------------------------------------------------------------- cache
def _cache(options: argparse.Namespace) -> int:
    disk = runtime.backend().disk
    if disk.directory is None:
        print("off: DUO_CACHE_DIR says so, or the folder cannot be written, or others may write to it")
        return 0
    files, nbytes = disk.clear() if options.clear else disk.usage()
    print(f"{'removed from ' if options.clear else ''}{_cache_line(str(disk.directory), files, nbytes)}")
    return 0


def _cache_line(folder: str | None, files: int, nbytes: int) -> str:
    return "off" if folder is None else f"{folder}: {files} files, {nbytes / 1e6:.1f} MB"
