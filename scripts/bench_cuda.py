"""Times lmtrain and torch on a GPU: recurrent layers, the loss, and training steps.

    python scripts/bench_cuda.py                    # the whole table
    python scripts/bench_cuda.py --json > out.json

Layers run forward and backward on random inputs as CUDA graphs, which is how lmtrain trains;
"launched" is without graphs. Compared: lmtrain's LSTM, the same with the alternating schedule,
nn.LSTM and nn.GRU on cuDNN, lmtrain's other cells, and, without graphs, a Python loop over
nn.LSTMCell, eager and with torch.compile. Two lower bounds of a scan: the recurrent products at the
rate of a large product, and T grid barriers with nothing between them. The loss is compared with
torch's linear layer and cross-entropy, a training step (as a CUDA graph) with the same model of
torch.nn under autocast (without). Competitors alternate; times are medians of CUDA events, in
microseconds.
"""

import argparse
import functools
import itertools
import json
import math
import os
import statistics
import sys
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from bench_training import SHAPES, lmtrain_step, torch_step
from torch import Tensor, nn

from lmtrain import device
from lmtrain.cells import create
from lmtrain.kernels.cross_entropy import cross_entropy
from lmtrain.kernels.triton.memory import arrive, wait
from lmtrain.model.dropout import Dropout
from lmtrain.model.generator import ModelGenerator
from lmtrain.model.recurrent import Recurrent

HIDDEN = (256, 512, 1024, 2048)
ROWS = (16, 64, 256)
STEPS = (64, 512)
LAYERS = (1, 2)
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
OTHERS = {
    "simple-gru": ("simple-gru", {}), "gru": ("gru", {}),
    "diagonal": ("peephole-lstm", {"peephole": "diagonal"}),
    "full": ("peephole-lstm", {"peephole": "full"}),
}  # fmt: skip
ROUNDS, WARMUP_ROUNDS = 7, 3
# Most steps of the Python loops, which are slow.
MAX_LOOP_STEPS = 64
TRAINING_SHAPES = ("ptb-medium", "char-3x512")
VOCABULARIES = (10_000, 250_000)

Step = Callable[[], None]


def backward(hidden: Tensor, upstream: Tensor) -> None:
    """Runs the backward of the hidden states."""
    hidden.backward(upstream)


def lmtrain_layers(
    cell: str, options: dict[str, str], units: int, layers: int, inputs: Tensor
) -> Step:
    """Forward and backward of lmtrain's layers."""
    stack = Recurrent(
        lambda size, hidden: create(cell, size, hidden, options),
        units, [units] * layers, Dropout(0.0, ModelGenerator(1)),
    ).cuda()  # fmt: skip
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


def cudnn(layer: type[nn.LSTM | nn.GRU], units: int, layers: int, inputs: Tensor) -> Step:
    """Forward and backward of torch's layers, on cuDNN."""
    stack = layer(units, units, layers).cuda().to(inputs.dtype)
    upstream = torch.randn_like(inputs)

    def step() -> None:
        stack.zero_grad(set_to_none=True)
        backward(stack(inputs)[0], upstream)

    return step


def loop(units: int, inputs: Tensor, *, is_compiled: bool) -> Step:
    """Forward and backward of a Python loop over nn.LSTMCell."""
    cell = nn.LSTMCell(units, units).cuda().to(inputs.dtype)
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
    """The steps as CUDA graphs in one memory pool."""
    generator = torch.Generator("cuda")
    graphs: list[torch.cuda.CUDAGraph] = []
    for step in steps.values():
        for _ in range(WARMUP_ROUNDS):
            step()
        graphs.append(device.capture_graph(step, generator, graphs[0] if graphs else None)[0])
    return {
        name: functools.partial(replay, graph, step)
        for (name, step), graph in zip(steps.items(), graphs, strict=True)
    }


def replay(graph: torch.cuda.CUDAGraph, step: Step) -> None:
    """Replays the graph of a step; the reference to the step keeps its tensors alive."""
    del step
    graph.replay()


def microseconds(steps: dict[str, Step]) -> dict[str, float]:
    """The median time of each step, timed in alternation."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(WARMUP_ROUNDS + ROUNDS):
        for name, step in steps.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            step()
            end.record()
            torch.cuda.synchronize()
            if number >= WARMUP_ROUNDS:
                times[name].append(1000 * start.elapsed_time(end))
    return {name: statistics.median(each) for name, each in times.items()}


def rate(dtype: torch.dtype) -> float:
    """FLOP per microsecond of a large product."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=dtype) for _ in range(2))
    return 2 * 8192**3 / microseconds({"product": lambda: torch.mm(a, b)})["product"]


@triton.jit
def _barriers(counter, count):
    """Runs `count` grid barriers."""
    for number in range(count):
        arrive(counter)
        wait(counter, (number + 1) * tl.num_programs(0))


def barrier() -> float:
    """Microseconds of a grid barrier with one program per multiprocessor."""
    count, gpu = 1000, torch.device("cuda", torch.cuda.current_device())
    programs = torch.cuda.get_device_properties(gpu).multi_processor_count

    def barriers() -> None:
        counter = torch.zeros(1, dtype=torch.int32, device=gpu)
        _barriers[(programs,)](counter, count, num_warps=8, launch_cooperative_grid=True)

    return microseconds({"barriers": barriers})["barriers"] / count


def row(units: int, rows: int, steps: int, layers: int, precision: str) -> dict[str, float]:
    """Microseconds of each competitor for one size."""
    inputs = torch.randn(steps, rows, units, device="cuda", dtype=DTYPES[precision])
    competitors = {
        "lstm": lmtrain_layers("lstm", {}, units, layers, inputs),
        "alternating": alternating(lmtrain_layers("lstm", {}, units, layers, inputs)),
        "cudnn lstm": cudnn(nn.LSTM, units, layers, inputs),
        "cudnn gru": cudnn(nn.GRU, units, layers, inputs),
    }
    for name, (cell, options) in OTHERS.items():
        competitors[name] = lmtrain_layers(cell, options, units, layers, inputs)
    launched = {f"{name} launched": competitors[name] for name in ("lstm", "cudnn lstm")}
    competitors = as_graphs(competitors) | launched
    if steps <= MAX_LOOP_STEPS and layers == 1:
        torch.compiler.reset()
        competitors["loop"] = loop(units, inputs, is_compiled=False)
        competitors["compiled"] = loop(units, inputs, is_compiled=True)
    return microseconds(competitors)


def losses(vocab_size: int) -> dict[str, dict[str, float]]:
    """Microseconds and megabytes of the loss of 4,096 predictions and its gradients, in bf16."""
    hidden = torch.randn(64, 64, 512, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = (torch.randn(vocab_size, 512, device="cuda") / 512**0.5).requires_grad_()
    bias = torch.zeros(vocab_size, device="cuda", requires_grad=True)
    targets = torch.randint(vocab_size, (64, 64), device="cuda")
    leaves = [hidden, weight, bias]

    def lmtrain_loss() -> None:
        torch.autograd.grad(cross_entropy(hidden, weight, bias, targets, 1.0), leaves)

    def torch_loss() -> None:
        logits = nn.functional.linear(hidden, weight.bfloat16(), bias.bfloat16()).flatten(0, 1)
        loss = nn.functional.cross_entropy(logits, targets.flatten(), reduction="sum")
        torch.autograd.grad(loss, leaves)

    steps = {"lmtrain": lmtrain_loss, "torch": torch_loss}
    peaks = {}
    for name, step in steps.items():
        step()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        gradients = sum(leaf.numel() * leaf.element_size() for leaf in leaves)
        peaks[name] = (torch.cuda.max_memory_allocated() - before - gradients) / 1e6
    return {"microseconds": microseconds(steps), "megabytes": peaks}


def training(name: str) -> dict[str, float]:
    """Microseconds of a training step of a shape."""
    return microseconds(
        {
            "lmtrain": lmtrain_step(SHAPES[name], "lstm", is_bf16=True, device_type="cuda"),
            "torch bf16": torch_step(SHAPES[name], "lstm", is_bf16=True, device_type="cuda"),
            "torch fp32": torch_step(SHAPES[name], "lstm", is_bf16=False, device_type="cuda"),
        }
    )


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="Print JSON.")
    is_json = parser.parse_args().json
    if not torch.cuda.is_available():
        sys.exit("no CUDA device on this machine")
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    rates = {name: rate(dtype) for name, dtype in DTYPES.items()}
    barrier_time = barrier()
    training_times = {name: training(name) for name in TRAINING_SHAPES}
    loss_costs = {vocab_size: losses(vocab_size) for vocab_size in VOCABULARIES}
    print(f"training steps: {training_times}\nlosses: {loss_costs}", file=sys.stderr, flush=True)
    table = []
    sizes = itertools.product(DTYPES, LAYERS, HIDDEN, ROWS, STEPS)
    for precision, layers, units, rows, steps in sizes:
        times = row(units, rows, steps, layers, precision)
        # Three products with (4H, H) weights: one in the forward, two in the backward.
        times["products"] = layers * 3 * 8 * units**2 * rows * steps / rates[precision]
        times["barriers"] = layers * 2 * steps * barrier_time
        size = {"H": units, "B": rows, "T": steps, "layers": layers, "precision": precision}
        table.append(size | times)
        ratio = times["cudnn lstm"] / times["lstm"]
        print(
            f"H {units:4} B {rows:3} T {steps:3} x{layers} {precision}: {ratio:5.2f} x cuDNN;",
            ", ".join(f"{name} {value:,.0f}" for name, value in times.items()),
            file=sys.stderr, flush=True,
        )  # fmt: skip
    ratios = [each["cudnn lstm"] / each["lstm"] for each in table]
    mean = math.exp(statistics.fmean(map(math.log, ratios)))
    summary = {
        "gpu": torch.cuda.get_device_name(), "torch": torch.__version__,
        "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version(),
        "tflops": {name: value / 1e6 for name, value in rates.items()},
        "training": training_times, "losses": loss_costs,
        "least": min(ratios), "geometric_mean": mean, "rows": table,
    }  # fmt: skip
    if is_json:
        print(json.dumps(summary, indent=1))
    else:
        print(f"{summary['gpu']}, torch {torch.__version__}, CUDA {torch.version.cuda}")
        print(f"time of cuDNN / lmtrain: minimum {min(ratios):.2f}, geometric mean {mean:.2f}")


if __name__ == "__main__":
    main()
