"""Measures memory and time of the softmax cross-entropy with a large vocabulary.

    python scripts/bench_cross_entropy.py bf16
    python scripts/bench_cross_entropy.py fp32

Loss and gradients of 8,192 predictions (batch 64, 128 steps), 512 hidden units, 100,000 words. The
memory is the peak of the process without weights, hidden states and gradients.
"""

import argparse
import threading
import time
from pathlib import Path

import torch

from lmtrain.kernels.cross_entropy import cross_entropy

STEPS, ROWS, UNITS, VOCAB_SIZE = 128, 64, 512, 100_000


def resident_mb() -> float:
    """Resident memory of this process, in MB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e6


def measure(dtype: torch.dtype) -> tuple[float, float]:
    """Seconds, and peak MB without inputs and gradients."""
    hidden = torch.randn(STEPS, ROWS, UNITS).to(dtype).requires_grad_()
    weight = (torch.randn(VOCAB_SIZE, UNITS) / UNITS**0.5).requires_grad_()
    bias = torch.zeros(VOCAB_SIZE, requires_grad=True)
    targets = torch.randint(0, VOCAB_SIZE, (STEPS, ROWS))
    cross_entropy(hidden[:2], weight[:100], bias[:100], targets[:2] % 100, 1.0)
    before, peak, is_done = resident_mb(), [0.0], threading.Event()

    def monitor() -> None:
        while not is_done.wait(0.002):
            peak[0] = max(peak[0], resident_mb())

    thread = threading.Thread(target=monitor)
    thread.start()
    begin = time.perf_counter()
    cross_entropy(hidden, weight, bias, targets, 1.0)
    seconds = time.perf_counter() - begin
    is_done.set()
    thread.join()
    gradients = sum(t.numel() * t.element_size() for t in (hidden, weight, bias)) / 1e6
    return seconds, peak[0] - before - gradients


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("precision", choices=["fp32", "bf16"])
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    seconds, extra = measure({"fp32": torch.float32, "bf16": torch.bfloat16}[options.precision])
    print(f"{options.precision}: {extra:.0f} MB beyond inputs and gradients, {seconds:.1f} s")


if __name__ == "__main__":
    main()
