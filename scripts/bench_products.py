"""Times matrix products of torch and the native ones, in alternation.

    python scripts/bench_products.py
    python scripts/bench_products.py --bf16
    LMTRAIN_INSTRUCTION_SET=AVX2 python scripts/bench_products.py

Operands and results are fp32, or with --bf16, which needs AMX, all bf16.

The products are those of a training step of the medium Penn Treebank model (20 x 35 tokens) and of
a character model with 512 units (64 x 64), and those of sampling with 650 units: M rows, K summed,
N columns. T marks an operand whose lines are contiguous in the other direction. Rates are medians
in GFLOP/s; the last line is that of independent multiply-adds in registers, which no product
exceeds. `kernels/products.py` selects by what this prints.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

from lmtrain import device
from lmtrain.kernels.native import library

ROUNDS = 9
# Each product is repeated for at least this long.
SECONDS = 0.01

# M, K, N and which operands are transposed.
PRODUCTS = {
    "input products": (700, 650, 2600, "right"),
    "gradient of inputs": (700, 2600, 650, ""),
    "gradient of weights": (2600, 700, 650, "left"),
    "logits": (350, 650, 10_000, "right"),
    "gradient of hidden states": (350, 10_000, 650, ""),
    "gradient of the softmax": (10_000, 350, 650, "left"),
    "input products, characters": (4096, 512, 2048, "right"),
    "gradient of inputs, characters": (4096, 2048, 512, ""),
    "gradient of weights, characters": (2048, 4096, 512, "left"),
    "logits, characters": (4096, 512, 65, "right"),
    **{
        f"{name}, {rows} texts": (rows, 650, columns, "right")
        for name, columns in (("sampling, gates", 2600), ("sampling, logits", 10_000))
        for rows in (1, 4, 16, 32, 48, 64)
    },
}


def operand(rows: int, columns: int, dtype: torch.dtype, *, is_transposed: bool) -> Tensor:
    """A random matrix."""
    drawn = torch.randn((columns, rows) if is_transposed else (rows, columns)).to(dtype)
    return drawn.T if is_transposed else drawn


def seconds(multiply: Callable[[], Tensor]) -> float:
    """Seconds of a product, the mean of some repetitions."""
    begin, count = time.perf_counter(), 0
    while time.perf_counter() < begin + SECONDS:
        multiply()
        count += 1
    return (time.perf_counter() - begin) / count


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--bf16", action="store_true")
    options = parser.parse_args()
    dtype = torch.bfloat16 if options.bf16 else torch.float32
    if options.bf16 and not library.multiplies_bf16():
        sys.exit("there are native bf16 products on processors with AMX only")
    device.set_threads(options.threads)
    device.keep_memory()
    print(f"{'':32} {'M':>6} {'K':>6} {'N':>6}   {'torch':>6} {'native':>6} ratio")
    for name, (rows, depth, columns, transposed) in PRODUCTS.items():
        left = operand(rows, depth, dtype, is_transposed=transposed == "left")
        right = operand(depth, columns, dtype, is_transposed=transposed == "right")
        competitors = (lambda a=left, b=right: a @ b, lambda a=left, b=right: library.product(a, b))
        times: tuple[list[float], list[float]] = ([], [])
        for _ in range(ROUNDS):
            for each, multiply in zip(times, competitors, strict=True):
                each.append(seconds(multiply))
        flops = 2e-9 * rows * depth * columns
        rates = [flops / statistics.median(each) for each in times]
        marks = ("T" if transposed == "left" else "", "T" if transposed == "right" else "")
        sizes = f"{rows:>6}{marks[0]:1}{depth:>6} {columns:>6}{marks[1]:1}"
        print(f"{name:32} {sizes} {rates[0]:>6.1f} {rates[1]:>6.1f} {rates[1] / rates[0]:>5.2f}")
    print(f"multiply-adds: {library.multiply_add_rate() / 1e9:.1f}")


if __name__ == "__main__":
    main()
