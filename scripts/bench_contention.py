"""Times training steps while other processes use the processor too.

    python scripts/bench_contention.py             # the small Penn Treebank model
    python scripts/bench_contention.py --json > result.json

Prints the speed of lmtrain and of torch.nn alone, the share of it that each of two trainings at
once has left, and that of one training beside one and beside two processes that only compute. With
two cores and two threads, fair shares are 1/2, 2/3 and 1/2. Medians over rounds; every training
uses all `--threads`. torch.nn runs with the GOMP_SPINCOUNT that GNU OpenMP has by default.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Iterator
from multiprocessing.synchronize import Barrier, Event
from typing import Any

# Before torch: lmtrain sets the variables that torch reads when it is imported.
from lmtrain import device
from lmtrain.kernels.native import library

import bench_training  # isort: skip

# Trainings and busy processes of each situation.
SITUATIONS = {
    "alone": (1, 0),
    "two at once": (2, 0),
    "beside one busy process": (1, 1),
    "beside two": (1, 2),
}
WARM_UP_STEPS = 5
# Of GNU OpenMP.
DEFAULT_SPINS = "300000"


def train(name: str, shape: str, threads: int, seconds: float, start: Barrier, speeds: Any) -> None:
    """Runs training steps for `seconds` after `start`, and sends their number per second."""
    device.set_threads(threads)
    library_name, precision = name.split()
    if library_name != "torch":
        device.keep_memory()
    make = bench_training.torch_step if library_name == "torch" else bench_training.lmtrain_step
    step = make(bench_training.SHAPES[shape], "lstm", is_bf16=precision == "bf16")
    for _ in range(WARM_UP_STEPS):
        step()
    start.wait()
    begin, count = time.monotonic(), 0
    while time.monotonic() < begin + seconds:
        step()
        count += 1
    speeds.put(count / (time.monotonic() - begin))
    # The others are measured until the last one ends.
    start.wait()


def compute(end: Event) -> None:
    """Keeps a core busy until `end`."""
    while not end.is_set():
        sum(range(100_000))


@contextlib.contextmanager
def busy(count: int) -> Iterator[None]:
    """Runs `count` busy processes in its scope."""
    end = multiprocessing.Event()
    processes = [multiprocessing.Process(target=compute, args=(end,)) for _ in range(count)]
    for process in processes:
        process.start()
    try:
        yield
    finally:
        end.set()
        for process in processes:
            process.join()


def speed(name: str, trainings: int, busy_processes: int, options: argparse.Namespace) -> float:
    """Mean steps per second of each of `trainings` at once."""
    start = multiprocessing.Barrier(trainings)
    speeds: Any = multiprocessing.SimpleQueue()
    arguments = (name, options.shape, options.threads, options.seconds, start, speeds)
    with busy(busy_processes):
        processes = [
            multiprocessing.Process(target=train, args=arguments) for _ in range(trainings)
        ]
        for process in processes:
            process.start()
        found = [speeds.get() for _ in processes]
        for process in processes:
            process.join()
    return statistics.mean(found)


def main() -> None:
    """Prints a row for each library and precision."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=bench_training.SHAPES, default="ptb-small")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=4.0, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    multiprocessing.set_start_method("spawn")
    precision = "bf16" if library.has_bf16() else "fp32"
    rows: dict[str, dict[str, float]] = {}
    spins = os.environ["GOMP_SPINCOUNT"]
    for name in (f"lmtrain {precision}", f"torch {precision}"):
        os.environ["GOMP_SPINCOUNT"] = DEFAULT_SPINS if name.startswith("torch") else spins
        speeds: dict[str, list[float]] = {situation: [] for situation in SITUATIONS}
        for _ in range(options.rounds):
            for situation, counts in SITUATIONS.items():
                speeds[situation].append(speed(name, *counts, options))
        medians = {situation: statistics.median(found) for situation, found in speeds.items()}
        alone = medians.pop("alone")
        rows[name] = {"steps/s alone": alone} | {
            situation: each / alone for situation, each in medians.items()
        }
    if options.json:
        print(json.dumps(rows, indent=1))
        return
    print(f"{options.shape}, {options.threads} threads; shares of the speed alone")
    for name, row in rows.items():
        alone, *shares = row.items()
        print(f"{name:<13} {alone[1]:7.1f} steps/s alone", end="")
        print("".join(f"; {situation}: {share:.0%}" for situation, share in shares))


if __name__ == "__main__":
    main()
