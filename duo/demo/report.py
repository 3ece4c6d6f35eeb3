"""The demo itself: trains in each mode, compares, and shows what duo made of the program. Plain text, about a page."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator, Sequence

import numpy as np

import duo
import duo.graph as tf
from duo import runtime
from duo.demo.digits import Digits, load_digits
from duo.demo.modes import MODES, Trainer, eager, graph
from duo_ir import pipeline
from duo_ir.kernels.kernel import ContractKernel, Kernel
from duo_ir.kernels.program import Step
from duo_ir.kernels.text import print_kernel
from duo_ir.text import to_text

SHOWN = 12  # lines of the program, and of machine code
WIDTH = 120


def demo(epochs: int = 8, seed: int = 0) -> int:
    """Runs the whole; the exit code is 0 when every comparison came out equal, else 1."""
    data = load_digits()
    start = time.perf_counter()
    backend = runtime.backend()
    print(
        f"duo {duo.__version__} on {backend.machine.cpu}, vectors of {backend.target.vector_bytes * 8} bits, "
        f"{duo.get_num_threads()} threads\n"
        f"scikit-learn's digits: {len(data.train_labels)} images to train on, {len(data.test_labels)} to test on; "
        f"an MLP with dropout, Adam, seed {seed}\n"
    )
    trainers = [_train(mode, data, epochs, seed) for mode in MODES]
    print("\n".join(_table(trainers)))
    same_bits = _report("Losses, weights and Adam's state", _differences(trainers), _counted(trainers[0]))
    print()
    same_program = _show_program(trainers[0])
    print()
    resumed = _resume(data, epochs, seed)
    print()
    print("\n".join(_compiled()))
    print(f"Everything took {time.perf_counter() - start:.1f} s.")
    return 0 if same_bits and same_program and resumed else 1


def _train(mode: object, data: Digits, epochs: int, seed: int) -> Trainer:
    duo.manual_seed(seed)  # one stream for the weights and the dropout of each mode
    trainer: Trainer = mode()  # type: ignore[operator]
    for _ in range(epochs):
        trainer.train_epoch(data, seed)
    return trainer


# ------------------------------------------------------------------------------------------------------------- tables
def _table(trainers: Sequence[Trainer]) -> Iterator[str]:
    yield " " * 6 + "".join(f"{t.name:^30}" for t in trainers).rstrip()
    yield "epoch " + "".join(f"{'loss':>10}{'accuracy':>10}{'ms':>8}  " for _ in trainers).rstrip()
    for number, row in enumerate(zip(*[t.epochs for t in trainers]), 1):
        cells = "".join(f"{e.loss:10.6f}{e.accuracy:10.1%}{e.seconds * 1e3:8.1f}  " for e in row)
        yield f"{number:5} {cells.rstrip()}"
    yield "first " + "".join(f"{'step, with compiling':>20}{t.first_step * 1e3:8.1f}  " for t in trainers).rstrip()


def _report(what: str, differences: Sequence[str], counted: str) -> bool:
    if differences:
        print(f"{what}: DIFFERENT: {'; '.join(differences)}")
        return False
    print(f"{what}: equal, bit for bit ({counted}).")
    return True


def _counted(trainer: Trainer) -> str:
    numbers = sum(a.size for a in trainer.arrays().values())
    return f"{len(trainer.losses)} losses and {numbers} numbers, compared with =="


def _differences(trainers: Sequence[Trainer]) -> list[str]:
    """What is not `==` between the first trainer and the others."""
    first, *others = trainers
    wanted = first.arrays()
    out = []
    for other in others:
        pair = f"{first.name} and {other.name}"
        bad = [i for i, (a, b) in enumerate(zip(first.losses, other.losses)) if a != b]
        if bad or len(first.losses) != len(other.losses):
            out.append(f"{pair}: {len(bad)} losses, the first at step {bad[0] if bad else len(first.losses)}")
        found = other.arrays()
        names = [n for n in wanted if n not in found or not np.array_equal(wanted[n], found[n])]
        if names or found.keys() != wanted.keys():
            out.append(f"{pair}: {', '.join(names) or 'other names'}")
    return out


# -------------------------------------------------------------------------------------------------- what duo made of it
def _show_program(trainer: Trainer) -> bool:
    model = trainer.model.eval()
    from_eager = duo.lower(model, duo.zeros(64, 64))
    with tf.Graph().as_default():
        images = tf.placeholder(tf.float32, [64, 64])
        from_graph = tf.lower(model(images), [images])
    model.train()
    same = from_eager.hash == from_graph.hash
    relation = "the same program" if same else "NOT the same program"
    print(
        f"The forward pass is {relation} in eager mode (hash {from_eager.hash[:12]}) and in graph mode "
        f"({from_graph.hash[:12]}):"
    )
    lines = to_text(from_eager, locations=False).splitlines()
    print(_indented([*_first(lines[:-2]), *lines[-2:]]))
    kernels = [item.kernel for item in pipeline.lower(from_eager).items if isinstance(item, Step)]
    kernel = next((k for k in kernels if isinstance(k, ContractKernel)), kernels[0])
    print(f"It compiles to {len(kernels)} kernels. This one is a layer, its product, bias and ReLU in one pass:")
    print(_indented(print_kernel(kernel).splitlines()))
    loop, count = _inner_loop(kernel)
    print(f"and {count} lines of machine code, with this inner loop:")
    print(_indented(_first(loop)))
    return same


def _first(lines: list[str]) -> list[str]:
    """The first lines, and how many more there are."""
    more = len(lines) - SHOWN
    return [*lines[:SHOWN], f"  ... {more} more"] if more > 1 else lines


def _inner_loop(kernel: Kernel) -> tuple[list[str], int]:
    """The basic block with most fused multiply-adds, and how many lines the kernel has in all."""
    lines = runtime.backend().assembly(kernel).splitlines()
    blocks: list[list[str]] = [[]]
    for line in lines:
        if line and not line[0].isspace():
            blocks.append([line])
        else:
            operation, _, operands = line.strip().partition("\t")
            blocks[-1].append(f"  {operation:14}{operands}")
    return max(blocks, key=lambda block: sum("fmadd" in line or "fmla" in line for line in block)), len(lines)


def _indented(lines: Sequence[str]) -> str:
    return "\n".join(f"  {line[:WIDTH]}" for line in lines)


def _compiled() -> Iterator[str]:
    counts, code = runtime.statistics, runtime.backend().code_statistics
    yield (
        f"Compiled: {counts.compiled} programs, {counts.fused} of them fused as a whole; object code of "
        f"{code.compiled} modules generated, of {code.from_disk} read from disk."
    )
    files, nbytes = runtime.backend().disk.usage()
    folder = runtime.backend().disk.directory
    if folder is not None:
        yield f"The next run starts sooner: {folder} holds {files} objects, {nbytes / 1e6:.1f} MB."


# -------------------------------------------------------------------------------------------------------- checkpoints
def _resume(data: Digits, epochs: int, seed: int) -> bool:
    """An epoch in eager mode, a checkpoint, then one more epoch both in eager mode and in graph mode from the file."""
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "digits.safetensors")
        first = _train(eager, data, 1, seed)
        duo.save(first.checkpoint(), path)
        first.train_epoch(data, seed)
        duo.manual_seed(seed + 1)
        second = graph()
        second.resume(duo.load(path))
        second.epochs.append(first.epochs[0])  # which epoch comes next, and so its batches
        second.losses.extend(first.losses[: len(first.losses) // 2])
        second.train_epoch(data, seed)
        size = os.path.getsize(path)
    what = f"Checkpoint ({size / 1e3:.0f} kB, safetensors) saved in eager mode, resumed in graph mode; the next epoch"
    return _report(what, _differences([first, second]), _counted(second))
