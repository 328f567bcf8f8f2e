"""Times lmtrain and torch on a GPU: training steps, the loss, and recurrent layers.

    python scripts/bench_cuda.py                    # the whole table
    python scripts/bench_cuda.py --json > out.jsonl
    TRITON_INTERPRET=1 python scripts/bench_cuda.py    # without a GPU: a trial of this script

Layers run forward and backward on random inputs as CUDA graphs, which is how lmtrain trains;
"launched" is without graphs. Compared: lmtrain's LSTM, the same with the alternating schedule,
nn.LSTM, nn.GRU and nn.RNN on cuDNN, for bf16 nn.LSTM in fp16 too, lmtrain's other cells, and,
without graphs, a Python loop over nn.LSTMCell, eager and with torch.compile. Two lower bounds of a
scan: the recurrent products at the rate of a large product, and T grid barriers with nothing
between them. The loss is compared with torch's linear layer and cross-entropy, a training step (as
a CUDA graph) with the same model of torch.nn under autocast (without). Competitors alternate; times
are medians of CUDA events, in microseconds. Each result is printed when it is there; after
--max-seconds no layers are timed.
"""

import argparse
import concurrent.futures
import functools
import itertools
import json
import math
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from bench_training import SHAPES, Shape, lmtrain_step, torch_step
from check_cuda import DEVICE, HAS_GPU, select_kernels
from torch import Tensor, nn

from lmtrain import device
from lmtrain.cells import create
from lmtrain.kernels.cross_entropy import cross_entropy
from lmtrain.kernels.triton.memory import arrive, wait
from lmtrain.model.dropout import Dropout
from lmtrain.model.generator import ModelGenerator
from lmtrain.model.recurrent import Recurrent

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
LAYERS = (1, 2)
if HAS_GPU:
    HIDDEN, ROWS, STEPS = (256, 512, 1024, 2048), (16, 64, 256), (64, 512)
    # The only size of the Python loops: compiling one takes several seconds.
    LOOP_UNITS, LOOP_ROWS, LOOP_STEPS = 512, 64, 64
    TRAINING_SHAPES = {name: SHAPES[name] for name in ("ptb-medium", "char-3x512")}
    VOCABULARIES = (10_000, 250_000)
    PRODUCT_SIZE = 8192
else:
    # The interpreter has no bf16 products.
    DTYPES["bf16"] = torch.float16
    HIDDEN, ROWS, STEPS = (8, 16), (3,), (4,)
    LOOP_UNITS, LOOP_ROWS, LOOP_STEPS = 8, 3, 4
    TRAINING_SHAPES = {"trial": Shape(50, 8, (8, 8), 2, 4)}
    VOCABULARIES = (100,)
    PRODUCT_SIZE = 64
CELLS = {
    "lstm": ("lstm", {}), "simple-gru": ("simple-gru", {}), "gru": ("gru", {}),
    "diagonal": ("peephole-lstm", {"peephole": "diagonal"}),
    "full": ("peephole-lstm", {"peephole": "full"}), "rnn": ("rnn", {}),
}  # fmt: skip
CUDNN = {"cudnn lstm": nn.LSTM, "cudnn gru": nn.GRU, "cudnn rnn": nn.RNN}
WARMUP_ROUNDS, MIN_ROUNDS, MAX_ROUNDS = 2, 3, 9
# Seconds of the rounds of all competitors, after which no round begins.
ROUNDS_SECONDS = 1.5
# Steps timed together, unless they take longer than this number of microseconds.
STEPS_PER_TIME, LONG_MICROSECONDS = 5, 20_000
# Most seconds of the compilation of the kernels before anything is timed.
COMPILE_SECONDS = 60

Step = Callable[[], None]


def backward(hidden: Tensor, upstream: Tensor) -> None:
    """Runs the backward of the hidden states."""
    hidden.backward(upstream)


def lmtrain_layers(name: str, units: int, layers: int, inputs: Tensor) -> Step:
    """Forward and backward of lmtrain's layers."""
    cell, options = CELLS[name]
    stack = Recurrent(
        lambda size, hidden: create(cell, size, hidden, options),
        units, [units] * layers, Dropout(0.0, ModelGenerator(1)),
    ).to(DEVICE)  # fmt: skip
    for parameter in stack.parameters():
        nn.init.uniform_(parameter, -(units**-0.5), units**-0.5)
    upstream = torch.randn_like(inputs)

    def step() -> None:
        stack.zero_grad(set_to_none=True)
        backward(stack(inputs)[0], upstream)

    return step


def alternating(step: Step) -> Step:
    """The step with the alternating schedule."""

    def run() -> None:
        os.environ["LMTRAIN_SCHEDULE"] = "alternating"
        step()
        del os.environ["LMTRAIN_SCHEDULE"]

    return run


def cudnn(layer: type[nn.RNNBase], units: int, layers: int, inputs: Tensor) -> Step:
    """Forward and backward of torch's layers, on cuDNN."""
    stack = layer(units, units, layers).to(inputs)
    upstream = torch.randn_like(inputs)

    def step() -> None:
        stack.zero_grad(set_to_none=True)
        backward(stack(inputs)[0], upstream)

    return step


def loop(units: int, inputs: Tensor, *, is_compiled: bool) -> Step:
    """Forward and backward of a Python loop over nn.LSTMCell."""
    cell = nn.LSTMCell(units, units).to(inputs)
    upstream, zeros = torch.randn_like(inputs), torch.zeros_like(inputs[0])
    forward = torch.compile(cell) if is_compiled else cell

    def step() -> None:
        cell.zero_grad(set_to_none=True)
        state, hidden = (zeros, zeros), []
        for each in inputs.unbind():
            state = forward(each, state)
            hidden.append(state[0])
        backward(torch.stack(hidden), upstream)

    return step


def as_graphs(steps: dict[str, Step]) -> dict[str, Step]:
    """The steps as CUDA graphs, without those that cannot be captured; without a GPU, the steps."""
    if not HAS_GPU:
        return steps
    graphs: dict[str, Step] = {}
    for name, step in steps.items():
        for _ in range(WARMUP_ROUNDS):
            step()
        try:
            # Each has its own memory: a failed capture leaves that of a shared pool unusable.
            graph, _ = device.capture_graph(step, torch.Generator("cuda"))
        except RuntimeError as error:
            print(f"{name} cannot be captured: {error}", file=sys.stderr, flush=True)
            continue
        graphs[name] = functools.partial(replay, graph, step)
    return graphs


def replay(graph: torch.cuda.CUDAGraph, step: Step) -> None:
    """Replays the graph of a step; the reference to the step keeps its tensors alive."""
    del step
    graph.replay()


def timed(step: Step, count: int) -> float:
    """Microseconds of a step, the mean of several that follow each other."""
    if not HAS_GPU:
        begin = time.perf_counter()
        for _ in range(count):
            step()
        return 1e6 * (time.perf_counter() - begin) / count
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(count):
        step()
    end.record()
    torch.cuda.synchronize()
    return 1000 * start.elapsed_time(end) / count


def microseconds(steps: dict[str, Step]) -> dict[str, float]:
    """The median time of each step, timed in alternation."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    counts = {}
    for _, (name, step) in itertools.product(range(WARMUP_ROUNDS), steps.items()):
        counts[name] = 1 if timed(step, 1) > LONG_MICROSECONDS else STEPS_PER_TIME
    end = time.monotonic() + ROUNDS_SECONDS
    for number in range(MAX_ROUNDS):
        if number >= MIN_ROUNDS and time.monotonic() > end:
            break
        for name, step in steps.items():
            times[name].append(timed(step, counts[name]))
    return {name: statistics.median(each) for name, each in times.items()}


def rate(dtype: torch.dtype) -> float:
    """FLOP per microsecond of a large product."""
    size = PRODUCT_SIZE, PRODUCT_SIZE
    a, b = (torch.randn(size, device=DEVICE).to(dtype) for _ in range(2))
    return 2 * PRODUCT_SIZE**3 / microseconds({"product": lambda: torch.mm(a, b)})["product"]


@triton.jit
def _barriers(counter, count):
    """Runs `count` grid barriers."""
    for number in range(count):
        arrive(counter)
        wait(counter, (number + 1) * tl.num_programs(0))


def barrier() -> float:
    """Microseconds of a grid barrier with one program per multiprocessor; 0 without a GPU."""
    if not HAS_GPU:
        return 0.0
    count, programs = 1000, torch.cuda.get_device_properties(DEVICE).multi_processor_count

    def barriers() -> None:
        counter = torch.zeros(1, dtype=torch.int32, device=DEVICE)
        _barriers[(programs,)](counter, count, num_warps=8, launch_cooperative_grid=True)

    return microseconds({"barriers": barriers})["barriers"] / count


def row(units: int, rows: int, steps: int, layers: int, precision: str) -> dict[str, float]:
    """Microseconds of each competitor for one size."""
    inputs = torch.randn(steps, rows, units, device=DEVICE).to(DTYPES[precision])
    competitors = {name: lmtrain_layers(name, units, layers, inputs) for name in CELLS}
    competitors["alternating"] = alternating(lmtrain_layers("lstm", units, layers, inputs))
    for name, layer in CUDNN.items():
        competitors[name] = cudnn(layer, units, layers, inputs)
    if precision == "bf16":
        competitors["cudnn lstm fp16"] = cudnn(nn.LSTM, units, layers, inputs.half())
    launched = {f"{name} launched": competitors[name] for name in ("lstm", "cudnn lstm")}
    competitors = as_graphs(competitors) | launched
    if (units, rows, steps, layers) == (LOOP_UNITS, LOOP_ROWS, LOOP_STEPS, 1):
        torch.compiler.reset()
        competitors["loop"] = loop(units, inputs, is_compiled=False)
        competitors["compiled"] = loop(units, inputs, is_compiled=True)
    return microseconds(competitors)


def compile_kernels(size: tuple[str, int, str]) -> None:
    """Compiles the kernels of a cell, a number of units and a precision, for all rows."""
    set_precision()
    name, units, precision = size
    for rows in ROWS:
        inputs = torch.randn(2, rows, units, device=DEVICE).to(DTYPES[precision])
        step = lmtrain_layers(name, units, 1, inputs)
        step()
        alternating(step)()


def losses(vocab_size: int) -> dict[str, dict[str, float]]:
    """Microseconds and megabytes of the loss of 4,096 predictions and its gradients, in bf16."""
    dtype, shape = DTYPES["bf16"], (64, 64) if HAS_GPU else (2, 2)
    hidden = torch.randn(*shape, 512, device=DEVICE).to(dtype).requires_grad_()
    weight = (torch.randn(vocab_size, 512, device=DEVICE) / 512**0.5).requires_grad_()
    bias = torch.zeros(vocab_size, device=DEVICE, requires_grad=True)
    targets = torch.randint(vocab_size, shape, device=DEVICE)
    leaves = [hidden, weight, bias]

    def lmtrain_loss() -> None:
        torch.autograd.grad(cross_entropy(hidden, weight, bias, targets, 1.0), leaves)

    def torch_loss() -> None:
        logits = nn.functional.linear(hidden, weight.to(dtype), bias.to(dtype)).flatten(0, 1)
        loss = nn.functional.cross_entropy(logits, targets.flatten(), reduction="sum")
        torch.autograd.grad(loss, leaves)

    steps = {"lmtrain": lmtrain_loss, "torch": torch_loss}
    peaks = {}
    for name, step in steps.items() if HAS_GPU else ():
        step()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        gradients = sum(leaf.numel() * leaf.element_size() for leaf in leaves)
        peaks[name] = (torch.cuda.max_memory_allocated() - before - gradients) / 1e6
    return {"microseconds": microseconds(as_graphs(steps)), "megabytes": peaks}


def training(name: str) -> dict[str, float]:
    """Microseconds of a training step of a shape."""
    shape, has_bf16, where = TRAINING_SHAPES[name], HAS_GPU, DEVICE.type
    return microseconds(
        {
            "lmtrain": lmtrain_step(shape, "lstm", is_bf16=has_bf16, device_type=where),
            "torch bf16": torch_step(shape, "lstm", is_bf16=has_bf16, device_type=where),
            "torch fp32": torch_step(shape, "lstm", is_bf16=False, device_type=where),
        }
    )


def set_precision() -> None:
    """Makes fp32 products those of full precision."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


def records(end: float) -> Iterator[dict[str, Any]]:
    """Results by name, one after the other; no layers are timed after `end`, of time.monotonic."""
    begin = time.monotonic()
    pool = concurrent.futures.ProcessPoolExecutor(
        len(os.sched_getaffinity(0)), multiprocessing.get_context("spawn")
    )
    sizes = itertools.product(CELLS, HIDDEN, DTYPES)
    # What has not been compiled in time is compiled when it is needed.
    tasks = [pool.submit(compile_kernels, size) for size in sizes]
    concurrent.futures.wait(tasks, COMPILE_SECONDS)
    pool.shutdown(wait=False, cancel_futures=True)
    rates, barrier_time = {name: rate(dtype) for name, dtype in DTYPES.items()}, barrier()
    yield {
        "gpu": torch.cuda.get_device_name() if HAS_GPU else "Triton's interpreter",
        "torch": torch.__version__, "triton": triton.__version__, "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(), "barrier": barrier_time,
        "tflops": {name: value / 1e6 for name, value in rates.items()},
        "compile_seconds": time.monotonic() - begin,
    }  # fmt: skip
    for name in TRAINING_SHAPES:
        yield {"training": name, **training(name)}
    for vocab_size in VOCABULARIES:
        yield {"loss": vocab_size, **losses(vocab_size)}
    table = []
    all_sizes = list(itertools.product(LAYERS, DTYPES, STEPS, HIDDEN, ROWS))
    for layers, precision, steps, units, rows in all_sizes:
        if time.monotonic() > end:
            break
        size = {"H": units, "B": rows, "T": steps, "layers": layers, "precision": precision}
        try:
            times = row(units, rows, steps, layers, precision)
        except RuntimeError as error:
            yield size | {"error": str(error)}
            continue
        # Three products with (4H, H) weights: one in the forward, two in the backward.
        times["products"] = layers * 3 * 8 * units**2 * rows * steps / rates[precision]
        times["barriers"] = layers * 2 * steps * barrier_time
        ratio = times.get("cudnn lstm", math.nan) / times.get("lstm", math.nan)
        yield size | {"ratio": ratio} | times
        table.append(times)
    yield {"sizes": len(table), "not_timed": len(all_sizes) - len(table), **ratios(table)}


def ratios(table: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    """The time of cuDNN's LSTM and of lmtrain's other cells over that of lmtrain's LSTM."""
    found = {}
    for name in ("cudnn lstm", "cudnn lstm fp16", *(name for name in CELLS if name != "lstm")):
        # A competitor that cannot be captured has no time.
        each = [times[name] / times["lstm"] for times in table if {name, "lstm"} <= times.keys()]
        if each:
            mean = math.exp(statistics.fmean(map(math.log, each)))
            found[f"{name} / lstm"] = {"least": min(each), "mean": mean, "most": max(each)}
    return found


def text(value: object) -> str:
    """A value for people to read."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {text(each)}" for key, each in value.items())
    if isinstance(value, float):
        return f"{value:.2f}" if value < 100 else f"{value:,.0f}"
    return str(value)


def main() -> None:
    """Prints the results."""
    begin = time.monotonic()
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="print a line of JSON for each result")
    parser.add_argument("--max-seconds", type=float, default=float("inf"))
    options = parser.parse_args()
    select_kernels()
    set_precision()
    for record in records(begin + options.max_seconds):
        print(json.dumps(record) if options.json else text(record), flush=True)


if __name__ == "__main__":
    main()
