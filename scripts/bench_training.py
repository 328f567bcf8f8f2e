"""Times training steps of lmtrain and of the same models of torch.nn.

    python scripts/bench_training.py                       # every configuration, LSTM
    python scripts/bench_training.py ptb-small --cells     # one configuration, every cell
    python scripts/bench_training.py snips multi30k digits --cells    # padded batches
    python scripts/bench_training.py --json > result.json

A step is forward, backward, clipping and SGD on random tokens. Each competitor runs in a separate
process, and only one is active at a time; with --keep-memory, `device.keep_memory` applies to
torch.nn too. Times are medians. FLOP/s count 2 FLOP per weight and token in products, times 3 with
the backward; `utilization` is that rate over the rate of a large product in the same run, `of peak`
the rate in fp32 over that of independent multiply-adds in registers. Memory is
the peak growth of a process, model and optimizer included. bf16 is skipped on CPUs without it.

snips, multi30k and digits are bidirectional layers alone, forward and backward, over rows with
random lengths like those of these data sets; torch.nn packs them. `whole` is lmtrain's time per
valid step over that of rows of equal length with as many steps in total.
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
from lmtrain.model.lookup import allow_sparse_gradients
from lmtrain.model.recurrent import Recurrent
from lmtrain.tasks.base import Shard
from lmtrain.tasks.language_model import LanguageModelling, TextData
from lmtrain.training.optimizer import Optimizer
from lmtrain.training.ranks import Ranks
from lmtrain.training.step import Stepper

MAX_GRAD_NORM = 5.0
# Seconds after which the idle OpenMP threads of a process stop spinning.
PAUSE_SECONDS = 0.02
# Time of a turn, in which steps follow each other as in a training.
TURN_SECONDS = 0.15
# Small enough that the weights hardly change, since one batch is used for all steps.
LEARNING_RATE = 1e-5


@dataclass(frozen=True)
class Shape:
    """A model and a batch: vocabulary, embedding size, hidden size of each layer, B x T tokens."""

    vocab_size: int
    embedding_size: int
    layers: tuple[int, ...]
    batch_size: int
    seq_len: int

    @property
    def is_tied(self) -> bool:
        """Whether embeddings are tied: if the last layer is narrower than the first."""
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
    """Bidirectional layers and a batch of rows with log-normal lengths.

    `log_mean` and `log_deviation` are the mean and the standard deviation of log lengths.
    """

    input_size: int
    layers: tuple[int, ...]
    batch_size: int
    log_mean: float
    log_deviation: float
    is_whole: bool = False

    def flops(self, gates: int, peephole: int = 0) -> float:
        """FLOP of forward and backward in matrix products, without padding."""
        width, weights = self.input_size, 0
        for units in self.layers:
            weights += 2 * (units * gates * (width + units) + peephole * units**2)
            width = 2 * units
        return 6.0 * weights * int(self.lengths().sum())

    def lengths(self) -> Tensor:
        """Steps of each row, (B,); their mean for all rows if `is_whole`."""
        drawn = np.random.default_rng(1).normal(self.log_mean, self.log_deviation, self.batch_size)
        lengths = np.exp(drawn).round().astype(int).clip(1)
        if self.is_whole:
            lengths[:] = round(lengths.mean())
        return torch.from_numpy(lengths)


# Means and standard deviations of log lengths in the training data.
PADDED = {
    "snips": PaddedShape(200, (200,), 32, 2.13, 0.37),
    "multi30k": PaddedShape(256, (256,), 64, 2.47, 0.32),
    "digits": PaddedShape(80, (100, 100), 32, 3.68, 0.32),
}
GATES = {"rnn": 1, "simple-gru": 2, "gru": 3, "lstm": 4, "peephole-lstm": 4}
TORCH = {"rnn": nn.RNN, "gru": nn.GRU, "lstm": nn.LSTM}


class TorchModel(nn.Module):
    """The model of a shape with layers of torch.nn."""

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
        """Logits (T, B, V) of tokens (T, B), and the detached final state."""
        hidden, after = self.embedding(tokens), []
        for layers, before in zip(self.layers, state or [None] * len(self.layers), strict=True):
            hidden, last = layers(hidden, before)
            parts = last.detach() if isinstance(last, Tensor) else tuple(s.detach() for s in last)
            after.append(parts)
        return self.decoder(hidden), after


def torch_step(
    shape: Shape, cell: str, *, is_bf16: bool, device_type: str = "cpu"
) -> Callable[[], None]:
    """A training step of torch.nn, in fp32 or under bf16 autocast."""
    model = TorchModel(shape, cell).to(device_type)
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, foreach=True)
    inputs, targets = tokens(shape).to(device_type)
    state: list[Any] = []

    def step() -> None:
        nonlocal state
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device_type, torch.bfloat16, enabled=is_bf16):
            logits, state = model(inputs, state)
            loss = nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
        (loss * shape.seq_len).backward()
        nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM, foreach=True)
        optimizer.step()

    return step


def lmtrain_step(
    shape: Shape, cell: str, *, is_bf16: bool, device_type: str = "cpu"
) -> Callable[[], None]:
    """A training step of lmtrain."""
    resolved = config.load(
        overrides={
            "model.cell": cell,
            "model.embedding_size": shape.embedding_size,
            "model.hidden_size": shape.layers[0],
            "model.num_layers": len(shape.layers),
            "model.tied_embeddings": shape.is_tied,
            "optimizer.name": "sgd",
            "train.batch_size": shape.batch_size,
            "train.seq_len": shape.seq_len,
            "train.precision": "bf16" if is_bf16 else "fp32",
        }
    )
    words = [UNK, EOS, *(f"w{index}" for index in range(2, shape.vocab_size))]
    data = TextData(Tokenizer(words), {"train": text(shape)})
    model = LanguageModelling.build(resolved, data).to(device_type)
    allow_sparse_gradients(model)
    task = LanguageModelling(resolved, data, model, Shard())
    optimizer = Optimizer(
        model,
        name="sgd",
        weight_decay=0.0,
        clip="l2",
        max_grad_norm=MAX_GRAD_NORM,
        max_embedding_grad_norm=None,
        schedule=lambda steps: lambda step: LEARNING_RATE,
        total_steps=1,
    )
    stepper = Stepper(task, optimizer, Ranks(), report=lambda text: print(text, file=sys.stderr))
    # All steps use one batch; the state is carried over.
    batch = replace(task.batch(0), is_continued=True)

    def step() -> None:
        stepper.enqueue(batch)

    return step


def torch_padded_step(shape: PaddedShape, cell: str, *, is_bf16: bool) -> Callable[[], None]:
    """Forward and backward of torch.nn's bidirectional layers over packed rows."""
    lengths = shape.lengths()
    layers = TORCH[cell](shape.input_size, shape.layers[0], len(shape.layers), bidirectional=True)
    inputs = torch.randn(int(lengths.max()), len(lengths), shape.input_size, requires_grad=True)

    def step() -> None:
        layers.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=is_bf16):
            packed = nn.utils.rnn.pack_padded_sequence(inputs, lengths, enforce_sorted=False)
            hidden, _ = nn.utils.rnn.pad_packed_sequence(layers(packed)[0])
        hidden.float().square().sum().backward()

    return step


def lmtrain_padded_step(shape: PaddedShape, cell: str, *, is_bf16: bool) -> Callable[[], None]:
    """Forward and backward of lmtrain's bidirectional layers over padded rows."""
    lengths = shape.lengths()
    no_dropout = Dropout(0.0, ModelGenerator(1))
    layers = Recurrent(
        partial(cells.create, cell, options={}),
        shape.input_size,
        shape.layers,
        no_dropout,
        is_bidirectional=True,
    )
    for each in layers.cells:
        each.initialize(device.generator(1), None, 1.0)
    inputs = torch.randn(int(lengths.max()), len(lengths), shape.input_size, requires_grad=True)
    row_lengths = None if shape.is_whole else lengths

    def step() -> None:
        layers.zero_grad(set_to_none=True)
        hidden, _ = layers(inputs.bfloat16() if is_bf16 else inputs, None, row_lengths)
        hidden.float().square().sum().backward()

    return step


def text(shape: Shape) -> Tokens:
    """A text whose first batch has the inputs and targets of `tokens`."""
    inputs, targets = tokens(shape)
    streams = torch.cat([inputs, targets[-1:]]).T.numpy().astype(np.uint32)
    return Tokens(streams.reshape(-1), streams.size, "0" * 64, "random tokens")


def tokens(shape: Shape) -> Tensor:
    """Inputs and targets, (2, T, B)."""
    generator = torch.Generator().manual_seed(1)
    size = (2, shape.seq_len, shape.batch_size)
    return torch.randint(0, shape.vocab_size, size, generator=generator)


def product_rate(dtype: torch.dtype) -> float:
    """FLOP/s of a large product, the best of six."""
    size = 2048
    a, b = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
    times = []
    for _ in range(6):
        begin = time.perf_counter()
        a @ b
        times.append(time.perf_counter() - begin)
    return 2 * size**3 / min(times)


def peak_mb() -> int:
    """Peak resident memory of this process, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def compete(
    turns: Connection,
    name: str,
    shape: Shape | PaddedShape,
    cell: str,
    threads: int,
    keeps_memory: bool,
) -> None:
    """Runs one competitor: sends the seconds of a step for each message, and finally the memory."""
    library_name, precision = name.split()
    device.set_threads(threads)
    if library_name != "torch" or keeps_memory:
        device.keep_memory()
    before = peak_mb()
    step = STEPS[type(shape), library_name == "torch"](shape, cell, is_bf16=precision == "bf16")
    while turns.recv():
        step()  # Not timed: it starts with the CPU caches of another process.
        begin, count = time.perf_counter(), 0
        while time.perf_counter() < begin + TURN_SECONDS:
            step()
            count += 1
        turns.send((time.perf_counter() - begin) / count)
    turns.send(peak_mb() - before)


STEPS: dict[tuple[type, bool], Callable[..., Callable[[], None]]] = {
    (Shape, False): lmtrain_step,
    (Shape, True): torch_step,
    (PaddedShape, False): lmtrain_padded_step,
    (PaddedShape, True): torch_padded_step,
}


class Competitor:
    """A process that runs steps on request."""

    def __init__(self, *arguments: Any) -> None:
        self._turns, other = multiprocessing.Pipe()
        self._process = multiprocessing.Process(target=compete, args=(other, *arguments))
        self._process.start()
        self.times: list[float] = []

    def step(self) -> None:
        """Runs one turn and appends its time."""
        self._turns.send(True)
        self.times.append(self._turns.recv())
        time.sleep(PAUSE_SECONDS)

    def end(self) -> int:
        """Ends the process; its peak memory growth in MiB."""
        self._turns.send(False)
        memory: int = self._turns.recv()
        self._process.join()
        return memory


def medians(competitors: dict[str, Competitor], seconds: float) -> dict[str, float]:
    """Median seconds of a step of each competitor, timed in alternation for `seconds`."""
    for _ in range(2):
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
    name: str, cell: str, options: argparse.Namespace, rates: dict[str, float], peak: float
) -> dict[str, Any]:
    """Times, ratios and rates of one shape and cell; `rates` has the precisions to time.

    `peak` is the rate of multiply-adds in fp32.
    """
    shape: Shape | PaddedShape = {**SHAPES, **PADDED}[name]
    names = [f"lmtrain {precision}" for precision in rates]
    if cell in TORCH:
        names += [f"torch {precision}" for precision in rates]
    shapes = dict.fromkeys(names, shape)
    if isinstance(shape, PaddedShape):
        shapes |= {f"whole {each}": replace(shape, is_whole=True) for each in rates}
    setting = options.threads, options.keep_memory
    competitors = {each: Competitor(each, of, cell, *setting) for each, of in shapes.items()}
    times = medians(competitors, options.seconds)
    flops = shape.flops(GATES[cell], 3 if cell == "peephole-lstm" else 0)
    best = min(time for each, time in times.items() if each.startswith("lmtrain"))
    row: dict[str, Any] = {
        "shape": name,
        "cell": cell,
        "seconds": times,
        "gflops": {each: flops / time / 1e9 for each, time in times.items()},
        "utilization": flops / best / max(rates.values()),
        "peak_share": flops / times["lmtrain fp32"] / peak,
        "memory_mb": {each: competitor.end() for each, competitor in competitors.items()},
    }
    if cell in TORCH:
        row["ratio"] = min(times[f"torch {precision}"] for precision in rates) / best
        row["ratio_fp32"] = times["torch fp32"] / times["lmtrain fp32"]
    if isinstance(shape, PaddedShape):
        steps = [int(each.lengths().sum()) for each in (shape, replace(shape, is_whole=True))]
        row["whole"] = {
            each: times[f"lmtrain {each}"] / steps[0] / (times[f"whole {each}"] / steps[1])
            for each in rates
        }
    return row


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("shapes", nargs="*", default=[*SHAPES, *PADDED], metavar="shape")
    parser.add_argument("--cells", action="store_true", help="every cell, not only the LSTM")
    parser.add_argument("--seconds", type=float, default=12.0, help="for each row")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--keep-memory", action="store_true", help="keep freed memory in torch.nn's processes too"
    )
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if unknown := set(options.shapes) - {*SHAPES, *PADDED}:
        parser.error(f"no shape {', '.join(unknown)}; there are {', '.join([*SHAPES, *PADDED])}")
    device.set_threads(options.threads)
    rates = {"fp32": product_rate(torch.float32)}
    if library.has_bf16():
        # Without bf16 instructions torch's products take minutes.
        rates["bf16"] = product_rate(torch.bfloat16)
    peak = library.multiply_add_rate()
    machine = {
        "processor": platform.processor() or platform.machine(),
        "instruction_set": library.INSTRUCTION_SETS[library.instruction_set()],
        "torch": torch.__version__,
        "threads": options.threads,
        "product_gflops": {precision: rate / 1e9 for precision, rate in rates.items()},
        "peak_gflops": peak / 1e9,
    }
    rows = []
    if not options.json:
        print(*(f"{key}: {value}" for key, value in machine.items()), sep="\n")
    for name in options.shapes:
        for cell in GATES if options.cells else ["lstm"]:
            row = measure(name, cell, options, rates, peak)
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
    whole = "".join(f"whole {each} {cost:.2f}; " for each, cost in row.get("whole", {}).items())
    ratio = f"ratio {row['ratio']:.2f}, in fp32 {row['ratio_fp32']:.2f}; " if "ratio" in row else ""
    print(
        f"{row['shape']:>10} {row['cell']:>13}: {ratio}{whole}"
        f"utilization {row['utilization']:.0%}, of peak {row['peak_share']:.0%}; "
        f"{'; '.join(parts)}"
    )


if __name__ == "__main__":
    multiprocessing.set_start_method("spawn")
    with contextlib.suppress(KeyboardInterrupt):
        main()
