"""Whole training steps of lmtrain beside the same models of torch.nn, taking turns.

    python scripts/bench_training.py                       # every configuration, LSTM
    python scripts/bench_training.py ptb-small --cells     # one configuration, every cell
    python scripts/bench_training.py snips multi30k digits --cells    # padded batches
    python scripts/bench_training.py --json > result.json

A step is forward, backward, clipping and SGD on random tokens. Each competitor has a process of its
own, in the state a user finds it in, and waits while another takes its turn; with --keep-memory,
torch.nn gets what `device.keep_memory` does, too. Times are medians; `rate` is model FLOP/s, 2 FLOP
for each weight a token meets in a product and thrice that with the backward; `share` is that rate
over the rate of a large product measured in the same run; memory is what a process grew by at most,
model and optimizer included. bf16 is left out where the processor does not multiply it.

snips, multi30k and digits are bidirectional layers alone, forward and backward, over rows whose
lengths are drawn like those of these data sets; torch.nn packs them. `whole` is the time that
lmtrain takes a valid step here over that of rows of one length, as many steps in all.
"""

import argparse
import contextlib
import itertools
import json
import multiprocessing
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lmtrain import cells, config, device
from lmtrain.data.tokenizer import EOS, UNK, Tokenizer
from lmtrain.data.tokens import Tokens
from lmtrain.kernels.native import library
from lmtrain.model.dropout import Dropout
from lmtrain.model.generator import ModelGenerator
from lmtrain.model.recurrent import Recurrent
from lmtrain.tasks.base import Shard
from lmtrain.tasks.language_model import LanguageModelling, TextData
from lmtrain.training.optimizer import Optimizer
from lmtrain.training.ranks import Ranks
from lmtrain.training.step import Stepper

LIMIT = 5.0
# Seconds in which the threads of the one whose turn is over cease to look for work.
PAUSE = 0.02
STEPS_A_TURN = 20
# So small that the weights stay what they are when training begins: one batch serves all steps.
RATE = 1e-5


@dataclass(frozen=True)
class Shape:
    """A model and a batch: V tokens, E numbers an embedding, layers of H units, B x T tokens."""

    vocab_size: int
    embedding_size: int
    layers: tuple[int, ...]
    batch_size: int
    seq_len: int

    @property
    def is_tied(self) -> bool:
        """Whether the output weights are the embeddings: where the last layer is narrower."""
        return self.layers[-1] == self.embedding_size != self.layers[0]

    def flops(self, gates: int, peephole: int = 0) -> float:
        """FLOP of one training step in matrix products."""
        width, weights = self.embedding_size, self.vocab_size * self.layers[-1]
        for units in self.layers:
            weights += units * (gates * (width + units)) + peephole * units**2
            width = units
        return 6.0 * weights * self.batch_size * self.seq_len


SHAPES = {
    "ptb-small": Shape(10_000, 200, (200, 200), 20, 20),
    "ptb-medium": Shape(10_000, 650, (650, 650), 20, 35),
    "ptb-large": Shape(10_000, 1500, (1500, 1500), 20, 35),
    "char-2x256": Shape(65, 256, (256, 256), 64, 64),
    "char-3x512": Shape(65, 512, (512, 512, 512), 64, 64),
    "awd": Shape(10_000, 400, (1150, 1150, 400), 40, 70),
}


@dataclass(frozen=True)
class PaddedShape:
    """Bidirectional layers and a batch: I numbers an input, layers of H units, rows of lengths.

    Lengths are e to the power of normal numbers, of that mean and deviation.
    """

    input_size: int
    layers: tuple[int, ...]
    batch_size: int
    log_mean: float
    log_deviation: float
    is_whole: bool = False

    def flops(self, gates: int, peephole: int = 0) -> float:
        """FLOP of forward and backward in matrix products, of valid steps."""
        width, weights = self.input_size, 0
        for units in self.layers:
            weights += 2 * (units * gates * (width + units) + peephole * units**2)
            width = 2 * units
        return 6.0 * weights * int(self.lengths().sum())

    def lengths(self) -> Tensor:
        """Steps of each row, (B,); where the shape is whole, of one length, nearly as many."""
        drawn = np.random.default_rng(1).normal(self.log_mean, self.log_deviation, self.batch_size)
        lengths = np.exp(drawn).round().astype(int).clip(1)
        if self.is_whole:
            lengths[:] = round(lengths.mean())
        return torch.from_numpy(lengths)


# Means and deviations of the logarithms of lengths in the training data.
PADDED = {
    "snips": PaddedShape(200, (200,), 32, 2.13, 0.37),
    "multi30k": PaddedShape(256, (256,), 64, 2.47, 0.32),
    "digits": PaddedShape(80, (100, 100), 32, 3.68, 0.32),
}
GATES = {"rnn": 1, "simple-gru": 2, "gru": 3, "lstm": 4, "peephole-lstm": 4}
TORCH = {"rnn": nn.RNN, "gru": nn.GRU, "lstm": nn.LSTM}


class TorchModel(nn.Module):
    """The same model of torch.nn's own layers."""

    def __init__(self, shape: Shape, cell: str) -> None:
        super().__init__()
        self.embedding = nn.Embedding(shape.vocab_size, shape.embedding_size)
        if len(set(shape.layers)) == 1:
            sizes = [(shape.embedding_size, shape.layers[0], len(shape.layers))]
        else:
            widths = [shape.embedding_size, *shape.layers]
            sizes = [(*pair, 1) for pair in itertools.pairwise(widths)]
        self.layers = nn.ModuleList(TORCH[cell](*each) for each in sizes)
        self.decoder = nn.Linear(shape.layers[-1], shape.vocab_size)
        if shape.is_tied:
            self.decoder.weight = self.embedding.weight

    def forward(self, tokens: Tensor, state: list[Any]) -> tuple[Tensor, list[Any]]:
        """Logits (T, B, V) and the state after the tokens (T, B)."""
        hidden, after = self.embedding(tokens), []
        for layers, before in zip(self.layers, state or [None] * len(self.layers), strict=True):
            hidden, last = layers(hidden, before)
            cut = last.detach() if isinstance(last, Tensor) else tuple(s.detach() for s in last)
            after.append(cut)
        return self.decoder(hidden), after


def torch_step(
    shape: Shape, cell: str, *, is_mixed: bool, place: str = "cpu"
) -> Callable[[], None]:
    """A training step of torch.nn, in fp32 or under bf16 autocast."""
    model = TorchModel(shape, cell).to(place)
    rule = torch.optim.SGD(model.parameters(), lr=RATE, foreach=True)
    inputs, targets = tokens(shape).to(place)
    state: list[Any] = []

    def step() -> None:
        nonlocal state
        rule.zero_grad(set_to_none=True)
        with torch.autocast(place, torch.bfloat16, enabled=is_mixed):
            logits, state = model(inputs, state)
            loss = nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
        (loss * shape.seq_len).backward()
        nn.utils.clip_grad_norm_(model.parameters(), LIMIT, foreach=True)
        rule.step()

    return step


def own_step(shape: Shape, cell: str, *, is_mixed: bool, place: str = "cpu") -> Callable[[], None]:
    """A training step of lmtrain."""
    chosen = config.load(
        overrides={
            "model.cell": cell,
            "model.embedding_size": shape.embedding_size,
            "model.hidden_size": shape.layers[0],
            "model.num_layers": len(shape.layers),
            "model.tied_embeddings": shape.is_tied,
            "optimizer.name": "sgd",
            "train.batch_size": shape.batch_size,
            "train.seq_len": shape.seq_len,
            "train.precision": "bf16" if is_mixed else "fp32",
        }
    )
    words = [UNK, EOS, *(f"w{index}" for index in range(2, shape.vocab_size))]
    data = TextData(Tokenizer(words), {"train": text(shape)})
    model = LanguageModelling.build(chosen, data).to(place)
    task = LanguageModelling(chosen, data, model, Shard())
    rule = Optimizer(
        model,
        name="sgd",
        weight_decay=0.0,
        clip="l2",
        max_grad_norm=LIMIT,
        schedule=lambda steps: lambda step: RATE,
        total_steps=1,
    )
    stepper = Stepper(task, rule, Ranks(), report=lambda text: print(text, file=sys.stderr))
    # One window serves all steps; the state is carried.
    batch = replace(task.batch(0), is_continued=True)

    def step() -> None:
        stepper.enqueue(batch)

    return step


def torch_padded_step(shape: PaddedShape, cell: str, *, is_mixed: bool) -> Callable[[], None]:
    """Forward and backward of torch.nn's bidirectional layers over packed rows."""
    lengths = shape.lengths()
    layers = TORCH[cell](shape.input_size, shape.layers[0], len(shape.layers), bidirectional=True)
    inputs = torch.randn(int(lengths.max()), len(lengths), shape.input_size, requires_grad=True)

    def step() -> None:
        layers.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=is_mixed):
            packed = nn.utils.rnn.pack_padded_sequence(inputs, lengths, enforce_sorted=False)
            hidden, _ = nn.utils.rnn.pad_packed_sequence(layers(packed)[0])
        hidden.float().square().sum().backward()

    return step


def own_padded_step(shape: PaddedShape, cell: str, *, is_mixed: bool) -> Callable[[], None]:
    """The same of lmtrain's layers."""
    lengths = shape.lengths()
    none = Dropout(0.0, ModelGenerator(1))
    layers = Recurrent(
        partial(cells.create, cell, options={}),
        shape.input_size,
        shape.layers,
        none,
        is_bidirectional=True,
    )
    for each in layers.cells:
        each.initialize(device.generator(1), None, 1.0)
    inputs = torch.randn(int(lengths.max()), len(lengths), shape.input_size, requires_grad=True)
    given = None if shape.is_whole else lengths

    def step() -> None:
        layers.zero_grad(set_to_none=True)
        hidden, _ = layers(inputs.bfloat16() if is_mixed else inputs, None, given)
        hidden.float().square().sum().backward()

    return step


def text(shape: Shape) -> Tokens:
    """A text whose first window has the inputs of `tokens`."""
    inputs, targets = tokens(shape)
    streams = torch.cat([inputs, targets[-1:]]).T.numpy().astype(np.uint32)
    return Tokens(streams.reshape(-1), streams.size, "0" * 64, "random tokens")


def tokens(shape: Shape) -> Tensor:
    """Inputs and targets, (2, T, B)."""
    chance = torch.Generator().manual_seed(1)
    size = (2, shape.seq_len, shape.batch_size)
    return torch.randint(0, shape.vocab_size, size, generator=chance)


def product_rate(kind: torch.dtype) -> float:
    """FLOP/s of a large product, the best of some."""
    size = 2048
    a, b = torch.randn(size, size).to(kind), torch.randn(size, size).to(kind)
    times = []
    for _ in range(6):
        begin = time.perf_counter()
        a @ b
        times.append(time.perf_counter() - begin)
    return 2 * size**3 / min(times)


def peak_mb() -> int:
    """The most memory this process has held, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def compete(
    turns: Connection,
    name: str,
    shape: Shape | PaddedShape,
    cell: str,
    threads: int,
    keeps_memory: bool,
) -> None:
    """One competitor: a step, and its seconds, for each message; in the end the memory."""
    who, kind = name.split()
    device.set_threads(threads)
    if who == "own" or keeps_memory:
        device.keep_memory()
    before = peak_mb()
    step = STEPS[type(shape), who == "torch"](shape, cell, is_mixed=kind == "bf16")
    # Steps of milliseconds would be measured with the caches that the others leave.
    count = STEPS_A_TURN if isinstance(shape, PaddedShape) else 1
    while turns.recv():
        begin = time.perf_counter()
        for _ in range(count):
            step()
        turns.send((time.perf_counter() - begin) / count)
    turns.send(peak_mb() - before)


STEPS: dict[tuple[type, bool], Callable[..., Callable[[], None]]] = {
    (Shape, False): own_step,
    (Shape, True): torch_step,
    (PaddedShape, False): own_padded_step,
    (PaddedShape, True): torch_padded_step,
}


class Competitor:
    """A process that makes steps when asked to."""

    def __init__(self, *arguments: Any) -> None:
        self._turns, other = multiprocessing.Pipe()
        self._process = multiprocessing.Process(target=compete, args=(other, *arguments))
        self._process.start()
        self.times: list[float] = []

    def step(self) -> None:
        """Takes a turn."""
        self._turns.send(True)
        self.times.append(self._turns.recv())
        time.sleep(PAUSE)

    def end(self) -> int:
        """Ends the process; the MiB it grew by."""
        self._turns.send(False)
        memory: int = self._turns.recv()
        self._process.join()
        return memory


def medians(competitors: dict[str, Competitor], seconds: float) -> dict[str, float]:
    """Median seconds of a step of each, all taking turns for about that long."""
    for _ in range(3):
        for competitor in competitors.values():
            competitor.step()
            competitor.times.clear()
    end = time.monotonic() + seconds
    rounds = 0
    while time.monotonic() < end or rounds < 5:
        for competitor in competitors.values():
            competitor.step()
        rounds += 1
    return {name: statistics.median(each.times) for name, each in competitors.items()}


def measure(
    name: str, cell: str, options: argparse.Namespace, rates: dict[str, float]
) -> dict[str, Any]:
    """One row: times, ratios and rates of one shape and cell; `rates` has the kinds to time."""
    shape: Shape | PaddedShape = {**SHAPES, **PADDED}[name]
    names = [f"own {kind}" for kind in rates]
    if cell in TORCH:
        names += [f"torch {kind}" for kind in rates]
    shapes = dict.fromkeys(names, shape)
    if isinstance(shape, PaddedShape):
        shapes |= {f"whole {kind}": replace(shape, is_whole=True) for kind in rates}
    setting = options.threads, options.keep_memory
    competitors = {each: Competitor(each, of, cell, *setting) for each, of in shapes.items()}
    found = medians(competitors, options.seconds)
    flops = shape.flops(GATES[cell], 3 if cell == "peephole-lstm" else 0)
    best = min(time for each, time in found.items() if each.startswith("own"))
    row: dict[str, Any] = {
        "shape": name,
        "cell": cell,
        "seconds": found,
        "gflops": {each: flops / time / 1e9 for each, time in found.items()},
        "share": flops / best / max(rates.values()),
        "memory_mb": {each: competitor.end() for each, competitor in competitors.items()},
    }
    if cell in TORCH:
        row["ratio"] = min(found[f"torch {kind}"] for kind in rates) / best
        row["ratio_fp32"] = found["torch fp32"] / found["own fp32"]
    if isinstance(shape, PaddedShape):
        steps = [int(each.lengths().sum()) for each in (shape, replace(shape, is_whole=True))]
        row["whole"] = {
            kind: found[f"own {kind}"] / steps[0] / (found[f"whole {kind}"] / steps[1])
            for kind in rates
        }
    return row


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("shapes", nargs="*", default=[*SHAPES, *PADDED], metavar="shape")
    parser.add_argument("--cells", action="store_true", help="every cell, not the LSTM alone")
    parser.add_argument("--seconds", type=float, default=12.0, help="for each row")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--keep-memory", action="store_true", help="torch.nn's processes too")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if unknown := set(options.shapes) - {*SHAPES, *PADDED}:
        parser.error(f"no shape {', '.join(unknown)}; there are {', '.join([*SHAPES, *PADDED])}")
    device.set_threads(options.threads)
    rates = {"fp32": product_rate(torch.float32)}
    if library.has_bf16():
        # Elsewhere torch's bf16 products take minutes.
        rates["bf16"] = product_rate(torch.bfloat16)
    machine = {
        "processor": platform.processor() or platform.machine(),
        "level": library.LEVELS[library.level()],
        "torch": torch.__version__,
        "threads": options.threads,
        "product_gflops": {kind: rate / 1e9 for kind, rate in rates.items()},
    }
    rows = []
    if not options.json:
        print(*(f"{key}: {value}" for key, value in machine.items()), sep="\n")
    for name in options.shapes:
        for cell in GATES if options.cells else ["lstm"]:
            row = measure(name, cell, options, rates)
            rows.append(row)
            if not options.json:
                show(row)
    if options.json:
        json.dump({"schema": "lmtrain.bench/1", "machine": machine, "rows": rows}, sys.stdout)


def show(row: dict[str, Any]) -> None:
    """Prints one row."""
    rates, memory = row["gflops"], row["memory_mb"]
    parts = [
        f"{each} {time * 1e3:.1f} ms {rates[each]:.0f} G {memory[each]} MiB"
        for each, time in row["seconds"].items()
    ]
    whole = "".join(f"whole {kind} {each:.2f}; " for kind, each in row.get("whole", {}).items())
    ratio = f"ratio {row['ratio']:.2f}, in fp32 {row['ratio_fp32']:.2f}; " if "ratio" in row else ""
    print(
        f"{row['shape']:>10} {row['cell']:>13}: {ratio}{whole}share {row['share']:.0%}; "
        f"{'; '.join(parts)}"
    )


if __name__ == "__main__":
    multiprocessing.set_start_method("spawn")
    with contextlib.suppress(KeyboardInterrupt):
        main()
