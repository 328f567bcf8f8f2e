"""Recurrent layers of lmtrain on a GPU beside torch's, forward and backward, in one run.

    python scripts/bench_cuda.py                    # the whole table
    python scripts/bench_cuda.py --json > out.json

Each row is a stack of layers on random inputs. Beside lmtrain's LSTM: nn.LSTM on cuDNN, a Python
loop over nn.LSTMCell, the same loop under torch.compile, and lmtrain's other cells. Competitors
take turns; times are medians of CUDA events, in microseconds. Two limits no scan can beat: the
recurrent products alone at the rate of a large product measured here, and T launches of nothing.
"""

import argparse
import itertools
import json
import math
import statistics
import sys
from collections.abc import Callable

import torch
from torch import Tensor, nn

from lmtrain import device
from lmtrain.cells import create
from lmtrain.model.dropout import Dropout
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
# A loop of Python is timed where it takes no longer than the rest of the table together.
LONGEST_LOOP = 64

Step = Callable[[], None]


def backward(hidden: Tensor, upstream: Tensor) -> None:
    """Differentiates hidden states, as a loss would."""
    hidden.backward(upstream)


def own(cell: str, options: dict[str, str], units: int, layers: int, inputs: Tensor) -> Step:
    """Forward and backward of lmtrain's layers."""
    stack = Recurrent(
        lambda size, hidden: create(cell, size, hidden, options),
        units, [units] * layers, Dropout(0.0, device.generator(1)),
    ).cuda()  # fmt: skip
    for parameter in stack.parameters():
        nn.init.uniform_(parameter, -(units**-0.5), units**-0.5)
    upstream = torch.randn_like(inputs)

    def step() -> None:
        stack.zero_grad(set_to_none=True)
        backward(stack(inputs)[0], upstream)

    return step


def cudnn(kind: type[nn.LSTM | nn.GRU], units: int, layers: int, inputs: Tensor) -> Step:
    """Forward and backward of torch's layers, on cuDNN."""
    stack = kind(units, units, layers).cuda().to(inputs.dtype)
    upstream = torch.randn_like(inputs)

    def step() -> None:
        stack.zero_grad(set_to_none=True)
        backward(stack(inputs)[0], upstream)

    return step


def loop(units: int, layers: int, inputs: Tensor, *, is_compiled: bool) -> Step:
    """Forward and backward of a Python loop over nn.LSTMCell."""
    cells = nn.ModuleList(nn.LSTMCell(units, units) for _ in range(layers)).cuda()
    cells.to(inputs.dtype)
    upstream = torch.randn_like(inputs)

    def run(x: Tensor) -> Tensor:
        for cell in cells:
            state, hidden = None, []
            for each in x.unbind():
                state = cell(each, state)
                hidden.append(state[0])
            x = torch.stack(hidden)
        return x

    forward = torch.compile(run) if is_compiled else run

    def step() -> None:
        cells.zero_grad(set_to_none=True)
        backward(forward(inputs), upstream)

    return step


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


def launch() -> float:
    """Microseconds of a launch in a row of launches."""
    nothing = torch.zeros(1, device="cuda")

    def many() -> None:
        for _ in range(1000):
            nothing.zero_()

    return microseconds({"launches": many})["launches"] / 1000


def row(units: int, rows: int, steps: int, layers: int, kind: str) -> dict[str, float]:
    """One row of the table."""
    inputs = torch.randn(steps, rows, units, device="cuda", dtype=KINDS[kind])
    competitors = {
        "lstm": own("lstm", {}, units, layers, inputs),
        "cudnn lstm": cudnn(nn.LSTM, units, layers, inputs),
        "cudnn gru": cudnn(nn.GRU, units, layers, inputs),
    }
    for name, (cell, options) in OTHERS.items():
        competitors[name] = own(cell, options, units, layers, inputs)
    if steps <= LONGEST_LOOP:
        competitors["loop"] = loop(units, layers, inputs, is_compiled=False)
        competitors["compiled"] = loop(units, layers, inputs, is_compiled=True)
    return microseconds(competitors)


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
    barrier = launch()
    table = []
    for kind, layers, units, rows, steps in itertools.product(KINDS, LAYERS, HIDDEN, ROWS, STEPS):
        times = row(units, rows, steps, layers, kind)
        # Forward and both products of the backward, of 4 H rows and H columns.
        times["products"] = layers * 3 * 8 * units**2 * rows * steps / rates[kind]
        times["launches"] = layers * 2 * steps * barrier
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
        "least": min(ratios), "geometric_mean": mean, "rows": table,
    }  # fmt: skip
    if wants_json:
        print(json.dumps(summary, indent=1))
    else:
        print(f"{summary['gpu']}, torch {torch.__version__}, CUDA {torch.version.cuda}")
        print(f"nn.LSTM on cuDNN over lmtrain: at least {min(ratios):.2f}, in the mean {mean:.2f}")


if __name__ == "__main__":
    main()
