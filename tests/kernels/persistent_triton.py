"""Runs the persistent kernels with all programs at the same time; run by test_triton.

Triton's interpreter runs the programs of a grid one after the other, so that none could wait for
another at a grid barrier. Here each program is a process, with random pauses before loads, stores
and barriers, and the tensors are in shared memory. Prints a line for each cell: the error, the
cell, the direction, and whether rows have lengths.
"""

import functools
import itertools
import os
import random
import sys
import time

import torch
from numpy import array, int32
from scans import by_reference, make, randn, results
from triton.language import core
from triton.runtime import interpreter

from lmtrain.kernels import operator
from lmtrain.kernels.triton import engine, persistent, persistent_gru, scan

# One of each kernel.
CELLS = [
    ("rnn", {}), ("simple-gru", {}), ("gru", {}), ("lstm", {}),
    ("peephole-lstm", {"peephole": "diagonal"}), ("peephole-lstm", {"peephole": "full"}),
]  # fmt: skip
# Two programs for the units and two for the rows.
HIDDEN_SIZE, ROWS, STEPS = 11, 17, 4
MAX_PAUSE_SECONDS = 0.002


class Concurrent:
    """A kernel whose programs run at the same time."""

    def __init__(self, kernel) -> None:
        self._kernel = kernel

    def __getitem__(self, grid):
        return functools.partial(self._launch, grid)

    def _launch(self, grid, *arguments, **constants) -> None:
        for tensor in arguments:
            if isinstance(tensor, torch.Tensor):
                tensor.share_memory_()
        programs = []
        for place in itertools.product(*map(range, grid)):
            if not (process := os.fork()):
                become(place, grid)
                self._kernel[1, 1](*arguments, **constants)
                os._exit(0)
            programs.append(process)
        codes = [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in programs]
        assert not any(codes), codes


def become(place: tuple[int, ...], grid: tuple[int, ...]) -> None:
    """Makes this process the program at a place of the grid."""
    builder = interpreter.interpreter_builder
    chance = random.Random(str((place, os.getpid())))

    def number(values, axis):
        return interpreter.TensorHandle(array([values[axis]], dtype=int32), core.int32)

    def pausing(function):
        def run(*arguments):
            if chance.random() < 0.1:
                time.sleep(MAX_PAUSE_SECONDS * chance.random())
            return function(*arguments)

        return run

    builder.create_get_program_id = functools.partial(number, place)
    builder.create_get_num_programs = functools.partial(number, grid)
    for name in ("create_masked_load", "create_masked_store", "create_atomic_rmw"):
        setattr(builder, name, pausing(getattr(builder, name)))


def by_persistent(cell, inputs, state, reverse, lengths):
    return operator.scan(cell, inputs, state, lengths, reverse=reverse)


def error(name: str, options: dict[str, str], *, reverse: bool, has_lengths: bool) -> float:
    """The largest relative error of outputs, final state and gradients."""
    cell = make(name, options, 5, HIDDEN_SIZE)
    inputs = randn(STEPS, ROWS, 5, seed=1)
    state = [randn(ROWS, HIDDEN_SIZE, seed=2 + part) for part in range(len(cell.state_names))]
    lengths = 1 + torch.arange(ROWS) % STEPS if has_lengths else None
    found = results(by_persistent, cell, inputs, state, reverse, lengths)
    expected = results(
        by_reference, cell.double(), inputs.double(), [s.double() for s in state], reverse, lengths
    )
    errors = [(a - b).norm() / b.norm() for a, b in zip(found, expected, strict=True)]
    return float(torch.stack(errors).max())


def main() -> None:
    torch.set_num_threads(1)
    for module, kernel in itertools.product((persistent, persistent_gru), ("forward", "backward")):
        setattr(module, kernel, Concurrent(getattr(module, kernel)))
    # As on a GPU, where one launch runs all steps.
    engine.supports = lambda tensor: True
    engine.is_interpreted = lambda: False
    scan.program_shape = lambda *arguments: (scan._ROWS[0], scan._UNITS[0])
    for number, (name, options) in enumerate(CELLS):
        reverse, has_lengths = bool(number % 2), bool(number // 2 % 2)
        found = error(name, options, reverse=reverse, has_lengths=has_lengths)
        words = [name, *options.values(), "reverse" * reverse, "lengths" * has_lengths]
        sys.stdout.write(f"{found:.1e} {' '.join(filter(None, words))}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
