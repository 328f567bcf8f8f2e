"""lmtrain on a GPU beside torch: layers, the loss, and whole training steps, in one run.

    python scripts/bench_cuda.py                    # the whole table
    python scripts/bench_cuda.py --json > out.json

Layers run forward and backward on random inputs, as CUDA graphs, which is how lmtrain trains;
"launched" is without. Beside lmtrain's LSTM: the same by the alternating schedule, whatever the
sizes are, nn.LSTM on cuDNN, lmtrain's other cells, and, both launched, a Python loop over
nn.LSTMCell and the loop over a step under torch.compile. Two limits no scan can beat: the recurrent
products alone at the rate of a large product measured here, and T barriers of the whole grid with
nothing between them. The loss stands beside a product and torch's cross-entropy, a training step,
recorded, beside the same model of torch.nn under autocast, launched. Competitors take turns; times
are medians of CUDA events, in microseconds.
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
from bench_training import SHAPES, own_step, torch_step
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
KINDS = {"bf16": torch.bfloat16, "fp32": torch.float32}
OTHERS = {
    "simple-gru": ("simple-gru", {}), "gru": ("gru", {}),
    "diagonal": ("peephole-lstm", {"peephole": "diagonal"}),
    "full": ("peephole-lstm", {"peephole": "full"}),
}  # fmt: skip
ROUNDS, WARM = 7, 3
# A loop of Python is timed where it does not take longer than all the rest.
LONGEST_LOOP = 64
TRAINED = ("ptb-medium", "char-3x512")
VOCABULARIES = (10_000, 250_000)

Step = Callable[[], None]


def backward(hidden: Tensor, upstream: Tensor) -> None:
    """Differentiates hidden states, as a loss would."""
    hidden.backward(upstream)


def own(cell: str, options: dict[str, str], units: int, layers: int, inputs: Tensor) -> Step:
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
    """The same by the schedule that large sizes have."""

    def run() -> None:
        os.environ["LMTRAIN_SCHEDULE"] = "alternating"
        step()
        del os.environ["LMTRAIN_SCHEDULE"]

    return run


def cudnn(kind: type[nn.LSTM | nn.GRU], units: int, layers: int, inputs: Tensor) -> Step:
    """Forward and backward of torch's layers, on cuDNN."""
    stack = kind(units, units, layers).cuda().to(inputs.dtype)
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


def recorded(steps: dict[str, Step]) -> dict[str, Step]:
    """The same as CUDA graphs, which share their memory."""
    chance = torch.Generator("cuda")
    graphs: list[torch.cuda.CUDAGraph] = []
    for step in steps.values():
        for _ in range(WARM):
            step()
        graphs.append(device.capture_graph(step, chance, graphs[0] if graphs else None)[0])
    return {
        name: functools.partial(replay, graph, step)
        for (name, step), graph in zip(steps.items(), graphs, strict=True)
    }


def replay(graph: torch.cuda.CUDAGraph, kept: Step) -> None:
    """Repeats what a graph recorded of a step, whose tensors must be kept for it."""
    del kept
    graph.replay()


def microseconds(steps: dict[str, Step]) -> dict[str, float]:
    """The median time of each; they take turns."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(WARM + ROUNDS):
        for name, step in steps.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            step()
            end.record()
            torch.cuda.synchronize()
            if number >= WARM:
                times[name].append(1000 * start.elapsed_time(end))
    return {name: statistics.median(each) for name, each in times.items()}


def rate(kind: torch.dtype) -> float:
    """FLOP in a microsecond of a large product."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=kind) for _ in range(2))
    return 2 * 8192**3 / microseconds({"product": lambda: torch.mm(a, b)})["product"]


@triton.jit
def _meetings(counter, many):
    """So many barriers of the whole grid."""
    for number in range(many):
        arrive(counter)
        wait(counter, (number + 1) * tl.num_programs(0))


def barrier() -> float:
    """Microseconds of a barrier of as many programs as the chip has cores."""
    many, place = 1000, torch.device("cuda", torch.cuda.current_device())
    cores = torch.cuda.get_device_properties(place).multi_processor_count

    def meetings() -> None:
        counter = torch.zeros(1, dtype=torch.int32, device=place)
        _meetings[(cores,)](counter, many, num_warps=8, launch_cooperative_grid=True)

    return microseconds({"barriers": meetings})["barriers"] / many


def row(units: int, rows: int, steps: int, layers: int, kind: str) -> dict[str, float]:
    """One row of the table."""
    inputs = torch.randn(steps, rows, units, device="cuda", dtype=KINDS[kind])
    competitors = {
        "lstm": own("lstm", {}, units, layers, inputs),
        "alternating": alternating(own("lstm", {}, units, layers, inputs)),
        "cudnn lstm": cudnn(nn.LSTM, units, layers, inputs),
        "cudnn gru": cudnn(nn.GRU, units, layers, inputs),
    }
    for name, (cell, options) in OTHERS.items():
        competitors[name] = own(cell, options, units, layers, inputs)
    launched = {f"{name} launched": competitors[name] for name in ("lstm", "cudnn lstm")}
    competitors = recorded(competitors) | launched
    if steps <= LONGEST_LOOP and layers == 1:
        torch.compiler.reset()
        competitors["loop"] = loop(units, inputs, is_compiled=False)
        competitors["compiled"] = loop(units, inputs, is_compiled=True)
    return microseconds(competitors)


def losses(vocab: int) -> dict[str, dict[str, float]]:
    """Time and memory of the loss of 4,096 predictions and its gradients, in bf16."""
    hidden = torch.randn(64, 64, 512, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = (torch.randn(vocab, 512, device="cuda") / 512**0.5).requires_grad_()
    bias = torch.zeros(vocab, device="cuda", requires_grad=True)
    targets = torch.randint(vocab, (64, 64), device="cuda")
    leaves = [hidden, weight, bias]

    def ours() -> None:
        torch.autograd.grad(cross_entropy(hidden, weight, bias, targets, 1.0), leaves)

    def theirs() -> None:
        logits = nn.functional.linear(hidden, weight.bfloat16(), bias.bfloat16()).flatten(0, 1)
        loss = nn.functional.cross_entropy(logits, targets.flatten(), reduction="sum")
        torch.autograd.grad(loss, leaves)

    steps = {"lmtrain": ours, "torch": theirs}
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
    """Whole training steps of a shape."""
    return microseconds(
        {
            "lmtrain": own_step(SHAPES[name], "lstm", is_mixed=True, place="cuda"),
            "torch bf16": torch_step(SHAPES[name], "lstm", is_mixed=True, place="cuda"),
            "torch fp32": torch_step(SHAPES[name], "lstm", is_mixed=False, place="cuda"),
        }
    )


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="Print JSON.")
    wants_json = parser.parse_args().json
    if not torch.cuda.is_available():
        sys.exit("no CUDA device on this machine")
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    rates = {name: rate(kind) for name, kind in KINDS.items()}
    of_barrier = barrier()
    steps_of = {name: training(name) for name in TRAINED}
    losses_of = {vocab: losses(vocab) for vocab in VOCABULARIES}
    print(f"training steps: {steps_of}\nlosses: {losses_of}", file=sys.stderr, flush=True)
    table = []
    for kind, layers, units, rows, steps in itertools.product(KINDS, LAYERS, HIDDEN, ROWS, STEPS):
        times = row(units, rows, steps, layers, kind)
        # Forward and both products of the backward, of 4 H rows and H columns.
        times["products"] = layers * 3 * 8 * units**2 * rows * steps / rates[kind]
        times["barriers"] = layers * 2 * steps * of_barrier
        table.append({"H": units, "B": rows, "T": steps, "layers": layers, "kind": kind, **times})
        ratio = times["cudnn lstm"] / times["lstm"]
        print(
            f"H {units:4} B {rows:3} T {steps:3} x{layers} {kind}: {ratio:5.2f} times cuDNN;",
            ", ".join(f"{name} {value:,.0f}" for name, value in times.items()),
            file=sys.stderr, flush=True,
        )  # fmt: skip
    ratios = [each["cudnn lstm"] / each["lstm"] for each in table]
    mean = math.exp(statistics.fmean(map(math.log, ratios)))
    summary = {
        "gpu": torch.cuda.get_device_name(), "torch": torch.__version__,
        "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version(),
        "tflops": {name: value / 1e6 for name, value in rates.items()},
        "training": steps_of, "losses": losses_of,
        "least": min(ratios), "geometric_mean": mean, "rows": table,
    }  # fmt: skip
    if wants_json:
        print(json.dumps(summary, indent=1))
    else:
        print(f"{summary['gpu']}, torch {torch.__version__}, CUDA {torch.version.cuda}")
        print(f"nn.LSTM on cuDNN over lmtrain: at least {min(ratios):.2f}, in the mean {mean:.2f}")


if __name__ == "__main__":
    main()
