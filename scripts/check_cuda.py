"""Checks all cells, the losses and trainings on a GPU, at realistic sizes.

    python scripts/check_cuda.py
    TRITON_INTERPRET=1 python scripts/check_cuda.py    # without a GPU: small sizes, interpreted

Cells and losses are compared with a float64 reference: both directions, rows with lengths, both
schedules, twice with the same bits. Inputs are random and uninitialized memory is filled with NaN.
An error is the norm of the difference divided by the norm of the reference, the largest over hidden
states, last state and all gradients. Persistent scans are repeated many times, and every repetition
must have the same bits. Trainings run in deterministic mode: with CUDA graphs, resumed, and without
CUDA graphs they must end with the same weights bit for bit; the captured graphs are counted. If
compute-sanitizer is installed, it runs one small case.

Checks run in several processes, since the compiler takes most of the time. A check whose process
dies or takes too long has failed; what still runs after --max-seconds is stopped. Exits with 1 if a
check failed, was stopped, or was not run.
"""

import argparse
import functools
import itertools
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lmtrain import checkpoint, config, device
from lmtrain.cells import Cell, create
from lmtrain.kernels import operator, reference
from lmtrain.kernels.cross_entropy import cross_entropy, sampled_cross_entropy
from lmtrain.kernels.engines import kernels_for
from lmtrain.kernels.triton import scan as triton_scan
from lmtrain.kernels.variant import VARIANTS, index_of
from lmtrain.training.run import run_training

HAS_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda", 0) if HAS_GPU else torch.device("cpu")
CELLS = [
    ("lstm", {}), ("gru", {}), ("simple-gru", {}), ("peephole-lstm", {"peephole": "diagonal"}),
    ("peephole-lstm", {"peephole": "full"}), ("rnn", {"activation": "tanh"}),
    ("rnn", {"activation": "relu"}), ("lstm", {"cell_output": "linear"}),
]  # fmt: skip
SCHEDULES = ("persistent", "alternating")
if HAS_GPU:
    # H, B, T
    SIZES = [
        (256, 64, 64), (650, 20, 35), (1024, 64, 64), (512, 256, 32), (2048, 128, 16),
        (1150, 40, 70), (512, 16, 128), (1000, 33, 40), (37, 5, 19), (1, 1, 1),
    ]  # fmt: skip
    # Also reversed, with lengths, and both.
    DIRECTED_SIZES = [(333, 21, 17)]
    REPEATED_SIZES = [(1024, 64, 64), (512, 256, 32), (256, 16, 256)]
    REPETITIONS = 1000
    LIMITS = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
    VOCABULARIES = (65, 10_000, 250_000)
    TRAINING_UNITS, TRAINING_STEPS, TRAINING_WORDS = 256, 40, 30_000
else:
    SIZES, DIRECTED_SIZES, REPEATED_SIZES = [(19, 17, 3), (1, 1, 1)], [(9, 17, 4)], [(9, 17, 4)]
    REPETITIONS = 2
    # The interpreter has no bf16 products.
    LIMITS = {torch.float32: 1e-5, torch.float16: 4e-3}
    VOCABULARIES = (65, 3000)
    TRAINING_UNITS, TRAINING_STEPS, TRAINING_WORDS = 16, 4, 3000
# Beside those of every cell: several graphs in one memory, other updates, other softmaxes.
TRAININGS: list[dict[str, object]] = [
    {"train.random_seq_len": True},
    {"optimizer.name": "adamw", "optimizer.learning_rate": 0.002},
    {"model.softmax": "sampled", "model.samples": 300},
    {"model.softmax": "adaptive", "model.tied_embeddings": False},
]
# Seconds after which a check has failed.
MAX_CHECK_SECONDS = 120


@dataclass(frozen=True)
class Check:
    """A function that returns an error, and the limit of that error."""

    label: str
    error: Callable[[], float]
    limit: float = 0.0


def random(*shape: int, seed: int) -> Tensor:
    """Random numbers, the same on every machine."""
    return torch.randn(shape, generator=device.generator(seed)).to(DEVICE)


def worst(found: list[Tensor], expected: list[Tensor]) -> float:
    """The largest relative error; NaN if there is one."""
    pairs = [(a.detach().double(), b.detach()) for a, b in zip(found, expected, strict=True)]
    # Gradients of a single unit may cancel.
    errors = [(a - b).norm() / b.norm().clamp(min=1e-3) for a, b in pairs]
    # Python's own maximum would lose NaN.
    return float(torch.stack(errors).max())


@dataclass(frozen=True)
class Scan:
    """A scan of a cell: its operands, drawn at random, and its schedule."""

    name: str
    options: dict[str, str]
    size: tuple[int, int, int]
    dtype: torch.dtype
    schedule: str
    reverse: bool = False
    has_lengths: bool = False

    @property
    def label(self) -> str:
        """What is run."""
        words = [self.name, *self.options.values(), "H {} B {} T {}".format(*self.size)]
        words += [str(self.dtype).removeprefix("torch."), self.schedule]
        return " ".join(words + ["reverse"] * self.reverse + ["lengths"] * self.has_lengths)

    @functools.cached_property
    def cell(self) -> Cell:
        """The cell with random weights."""
        units = self.size[0]
        cell = create(self.name, 64, units, self.options)
        cell.initialize(device.generator(3), 0.5 / units**0.5, 0.5)
        return cell.to(DEVICE)

    @property
    def has_schedule(self) -> bool:
        """Whether the schedule can run this size; the persistent one needs the weights on chip."""
        os.environ["LMTRAIN_SCHEDULE"] = self.schedule
        units, rows, steps = self.size
        variant = VARIANTS[index_of(create(self.name, 1, 1, self.options))]
        gates = torch.empty(steps, rows, 1, dtype=self.dtype, device=DEVICE)
        is_persistent = triton_scan.program_shape(variant, gates, units) is not None
        return is_persistent == (self.schedule == "persistent")

    @functools.cached_property
    def operands(self) -> tuple[list[Tensor], list[Tensor]]:
        """Inputs and parts of the state, and the upstream gradients of all results."""
        units, rows, steps = self.size
        parts = range(len(self.cell.state_names))
        inputs = random(steps, rows, 64, seed=1).to(self.dtype)
        upstream = random(steps, rows, units, seed=20).to(self.dtype)
        return (
            [inputs, *(random(rows, units, seed=2 + part) for part in parts)],
            [upstream, *(random(rows, units, seed=21 + part) for part in parts)],
        )

    def results(self, *, is_reference: bool = False) -> list[Tensor]:
        """Outputs, last state, and every gradient with upstream gradients into all of them."""
        _, rows, steps = self.size
        cell, run = self.cell.float(), operator.scan
        (inputs, *state), upstream = self.operands
        if is_reference:
            cell, run = cell.double(), reference.scan
            inputs, *state = (tensor.double() for tensor in (inputs, *state))
            upstream = [tensor.double() for tensor in upstream]
        elif kernels_for(inputs, cell.bias) != "triton":
            raise RuntimeError("no Triton kernels run here")
        lengths = None
        if self.has_lengths:
            lengths = 1 + torch.arange(rows, device=DEVICE) * 7 % steps
        leaves = [tensor.detach().requires_grad_() for tensor in (inputs, *state)]
        os.environ["LMTRAIN_SCHEDULE"] = self.schedule
        hidden, last = run(cell, leaves[0], tuple(leaves[1:]), lengths, reverse=self.reverse)
        outputs = [hidden, *last]
        gradients = torch.autograd.grad(outputs, [*leaves, *cell.parameters()], upstream)
        return [tensor.detach() for tensor in (*outputs, *gradients)]

    def error(self) -> float:
        """The error against the reference; infinite if a second scan has other bits."""
        found, again = self.results(), self.results()
        expected = self.results(is_reference=True)
        if not all(map(torch.equal, found, again)):
            return float("inf")
        if self.options.get("activation") != "relu":
            return worst(found, expected)
        # The slope of relu jumps at 0, and rounding takes some sums across: the limit of gradients
        # is 500 times as high in fp32, and they are not checked in half precision.
        error = worst(found[:2], expected[:2])
        if self.dtype == torch.float32:
            error = max(error, worst(found[2:], expected[2:]) / 500)
        return error

    def differing_repetitions(self) -> float:
        """How many of many repetitions have other bits than the first."""
        first, differing = self.results(), torch.zeros((), device=DEVICE)
        for _ in range(REPETITIONS):
            pairs = zip(first, self.results(), strict=True)
            # Not compared on the CPU, so that scans follow each other without a pause.
            differing += torch.stack([(a != b).any() for a, b in pairs]).any()
        return float(differing)


def scans(
    sizes: list[tuple[int, int, int]], *, reverse: bool = False, has_lengths: bool = False
) -> Iterator[Check]:
    """Scans of some sizes by each cell, precision and schedule."""
    for size, (name, options) in itertools.product(sizes, CELLS):
        for dtype, schedule in itertools.product(LIMITS, SCHEDULES):
            scan = Scan(name, options, size, dtype, schedule, reverse, has_lengths)
            # 1 − a² of a single unit cancels if a is near 1: fp32 has a higher limit, and half
            # precision is not checked.
            if scan.has_schedule and (dtype == torch.float32 or size[0] > 1):
                limit = LIMITS[dtype] * (10 if size[0] == 1 else 1)
                yield Check(scan.label, scan.error, limit)


def repetitions() -> Iterator[Check]:
    """A race between the programs of a persistent scan would show as other bits."""
    # The last two cells have the kernels of others.
    for size, (name, options), dtype in itertools.product(REPEATED_SIZES, CELLS[:6], LIMITS):
        scan = Scan(name, options, size, dtype, "persistent")
        if scan.has_schedule:
            yield Check(f"{scan.label}: {REPETITIONS} repetitions", scan.differing_repetitions)


def loss_error(vocab_size: int, dtype: torch.dtype) -> float:
    """The error of the loss and its gradients."""
    hidden = random(35, 20, 256, seed=1).to(dtype).requires_grad_()
    weight, bias = (
        (random(*shape, seed=2) * 0.05).requires_grad_()
        for shape in ((vocab_size, 256), (vocab_size,))
    )
    targets = torch.randint(vocab_size, (35, 20), generator=device.generator(5)).to(DEVICE)
    targets[3, 4] = -1
    leaves = [hidden, weight, bias]
    loss = cross_entropy(hidden, weight, bias, targets, 1 / 20)
    logits = hidden.double() @ weight.to(dtype).double().T + bias.double()
    truth = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), ignore_index=-1, reduction="sum"
    ) / 20  # fmt: skip
    return worst(
        [loss, *torch.autograd.grad(loss, leaves)], [truth, *torch.autograd.grad(truth, leaves)]
    )


def sampled_loss_error(dtype: torch.dtype) -> float:
    """The same of the sampled softmax."""
    shapes = [(700, 256), (1_000, 256), (1_000,), (700, 256), (700,)]
    is_target = torch.rand(700, 1_000, generator=device.generator(6)).to(DEVICE) < 0.01
    operands = [
        (random(*shape, seed=seed) * 0.2).to(dtype if len(shape) == 2 else torch.float32)
        for seed, shape in enumerate(shapes)
    ]
    operands = [operand.requires_grad_() for operand in operands]
    loss = sampled_cross_entropy(*operands, is_target, 1 / 20)
    hidden, weight, bias, target_weight, target_bias = (each.double() for each in operands)
    score = (hidden * target_weight).sum(1) + target_bias
    others = (hidden @ weight.T + bias).masked_fill(is_target, -torch.inf).logsumexp(1)
    truth = (torch.logaddexp(score, others) - score).sum() / 20
    return worst(
        [loss, *torch.autograd.grad(loss, operands)], [truth, *torch.autograd.grad(truth, operands)]
    )


def losses() -> Iterator[Check]:
    """The softmaxes."""
    for vocab_size, (dtype, limit) in itertools.product(VOCABULARIES, LIMITS.items()):
        error = functools.partial(loss_error, vocab_size, dtype)
        yield Check(f"cross-entropy V {vocab_size} {dtype}", error, limit)
    for dtype, limit in LIMITS.items():
        error = functools.partial(sampled_loss_error, dtype)
        yield Check(f"sampled cross-entropy {dtype}", error, limit)


def write_text(path: Path) -> None:
    """Writes lines of random words, of which some are frequent."""
    ranks = (
        torch.rand(TRAINING_WORDS, generator=device.generator(7))
        .pow(4)
        .mul(TRAINING_WORDS // 10)
        .int()
        .tolist()
    )
    words = (f"w{rank}{chr(10) * (place % 15 == 0)}" for place, rank in enumerate(ranks))
    path.write_text(" ".join(words), encoding="utf-8")


def differing_trainings(special: dict[str, object]) -> float:
    """How many of a resumed training, one without graphs, and the counts of graphs are wrong."""
    os.environ.pop("LMTRAIN_SCHEDULE", None)
    capture_graph, graphs = device.capture_graph, []

    def count_captures(*arguments: Any, **options: Any) -> Any:
        graphs.append(capture_graph(*arguments, **options))
        return graphs[-1]

    weights, counts = [], []
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "text"
        write_text(text)
        changes = {
            "data.train": [str(text)], "data.splitter": "whitespace", "data.min_count": 2,
            "data.valid_fraction": 0.02,
            "model.hidden_size": TRAINING_UNITS, "model.dropout": 0.3, "model.weight_dropout": 0.2,
            "model.tied_embeddings": True, "optimizer.name": "sgd", "optimizer.learning_rate": 0.5,
            "optimizer.schedule": "constant", "optimizer.average": "ema",
            "train.batch_size": 20 if HAS_GPU else 2,
            "train.seq_len": 35 if HAS_GPU else 5, "train.device": DEVICE.type,
            "train.deterministic": True, "train.threads": 1,
            "train.eval_every": TRAINING_STEPS // 2,
        } | special  # fmt: skip
        for number, halves in enumerate((1, 2, 1)):
            run, has_graphs = Path(folder) / str(number), HAS_GPU and number < 2
            graphs.clear()
            device.capture_graph = count_captures
            device.supports_graphs = lambda device, answer=has_graphs: answer
            stop = {"train.max_steps": TRAINING_STEPS // halves}
            run_training(config.load(None, changes | stop), run, is_quiet=True)
            if halves == 2:
                stop = {"train.max_steps": TRAINING_STEPS}
                run_training(out=run, resume=True, overrides=stop, is_quiet=True)
            counts.append(len(graphs))
            path = checkpoint.folder(run, TRAINING_STEPS) / "model.safetensors"
            weights.append(path.read_bytes())
    device.capture_graph = capture_graph
    # The adaptive softmax reads values from the GPU, which a capture does not allow.
    expects_graphs = HAS_GPU and special.get("model.softmax") != "adaptive"
    is_wrong = [
        weights[0] != weights[1],
        weights[0] != weights[2],
        any(counts[:2]) != expects_graphs or counts[2] > 0,
    ]
    return float(sum(is_wrong))


def trainings() -> Iterator[Check]:
    """Trainings of every cell, and others."""
    cells = [
        {"model.cell": name} | {f"model.{key}": value for key, value in options.items()}
        for name, options in CELLS
    ]
    # With relu, higher rates diverge.
    cells = [
        cell | ({"optimizer.learning_rate": 0.05} if "relu" in cell.values() else {})
        for cell in cells
    ]
    for special in (*TRAININGS, *cells):
        label = " ".join(f"{key}={value}" for key, value in special.items())
        yield Check(f"training {label}", functools.partial(differing_trainings, special))


def sanitizer_errors(tool: str, label: str) -> float:
    """The exit code of a check under compute-sanitizer; 0 where it does not support the GPU."""
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9"]
    command += ["--target-processes", "application-only", "--report-api-errors", "no"]
    command += [sys.executable, __file__, "--only", label, "--jobs", "0"]
    # So that every tensor has an allocation of its own, which it may not exceed.
    variables = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=variables,
        start_new_session=True,
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=MAX_CHECK_SECONDS - 20)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    if "Device not supported" in output:
        print(f"compute-sanitizer {tool}: device not supported")
        return 0.0
    if process.returncode:
        print(output[-3000:])
    return float(process.returncode)


def sanitized() -> Iterator[Check]:
    """A small case under compute-sanitizer."""
    if shutil.which("compute-sanitizer") and HAS_GPU:
        scan = Scan("lstm", {}, (37, 5, 19), torch.bfloat16, "persistent")
        for tool in ("memcheck", "racecheck", "synccheck"):
            error = functools.partial(sanitizer_errors, tool, scan.label)
            yield Check(f"compute-sanitizer {tool}", error)


def checks() -> list[Check]:
    """All checks, the broadest first, in case that time runs out."""
    return [
        *scans(SIZES[:1]),
        *scans(DIRECTED_SIZES, reverse=True),
        *scans(DIRECTED_SIZES, has_lengths=True),
        *scans(DIRECTED_SIZES, reverse=True, has_lengths=True),
        *losses(),
        *trainings(),
        *repetitions(),
        *scans(SIZES[1:]),
        *sanitized(),
    ]


def work(connection: Connection) -> None:
    """Runs checks that the connection names; returns errors, or messages of exceptions."""
    while True:
        check = connection.recv()
        # A training in deterministic mode changes it.
        make_strict()
        try:
            connection.send(check.error())
        except Exception as error:  # noqa: BLE001
            connection.send(f"{type(error).__name__}: {error}")


def make_strict() -> None:
    """Restricts torch to deterministic operations and full precision; memory begins as NaN."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.backends.cuda.matmul.allow_tf32 = False


class Worker:
    """A process that runs one check at a time."""

    def __init__(self) -> None:
        self.check: Check | None = None
        self.begin = time.monotonic()
        self.connection, theirs = multiprocessing.Pipe()
        self.process = multiprocessing.Process(target=work, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()

    def start(self, check: Check) -> None:
        """Starts a check."""
        self.check, self.begin = check, time.monotonic()
        self.connection.send(check)

    def result(self) -> float | str | None:
        """The error of its check or a message; None while it runs."""
        try:
            if self.connection.poll():
                return self.connection.recv()
        except EOFError:
            self.process.join(1)
            return f"its process ended with code {self.process.exitcode}"
        if time.monotonic() - self.begin > MAX_CHECK_SECONDS:
            return f"no result after {MAX_CHECK_SECONDS} s"
        return None


def run(pending: deque[Check], jobs: int, max_seconds: float) -> int:
    """Runs checks in processes, prints a line for each, and returns the number of failures."""
    failed, end = 0, time.monotonic() + max_seconds
    workers = [Worker() for _ in range(min(jobs, len(pending)))]
    while time.monotonic() < end:
        for number, worker in enumerate(workers):
            if worker.check and (result := worker.result()) is not None:
                failed += show(worker.check, result, time.monotonic() - worker.begin)
                worker.check = None
                if isinstance(result, str):
                    # It has ended, or had an error of CUDA and cannot use the GPU any more.
                    worker.process.kill()
                    worker = workers[number] = Worker()
            if worker.check is None and pending:
                worker.start(pending.popleft())
        running = [worker for worker in workers if worker.check]
        if not running and not pending:
            break
        wait([worker.connection for worker in running], timeout=0.5)
    for worker in workers:
        worker.process.kill()
        if worker.check:
            print(f"STOPPED  {worker.check.label}", flush=True)
            failed += 1
    return failed


def show(check: Check, result: float | str, seconds: float) -> bool:
    """Prints the result of a check; whether it failed."""
    is_good = isinstance(result, float) and result <= check.limit
    text = f"{result:.2e}" if isinstance(result, float) else result
    print(f"{'ok' if is_good else 'FAILED':6}  {text}  {check.label}  {seconds:.1f} s", flush=True)
    return not is_good


def select_kernels() -> None:
    """Selects Triton's interpreter where there is no GPU; exits if it was not asked for."""
    if HAS_GPU:
        return
    if os.environ.get("TRITON_INTERPRET") != "1":
        sys.exit("no CUDA device on this machine; TRITON_INTERPRET=1 runs small sizes without one")
    os.environ["LMTRAIN_KERNELS"] = "triton"


def main() -> int:
    """Prints a line for each check and returns the number of those that failed or were not run."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--max-seconds", type=float, default=float("inf"))
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--only", default="", help="run the checks whose line has this text")
    options = parser.parse_args()
    begin = time.monotonic()
    select_kernels()
    name = torch.cuda.get_device_name() if HAS_GPU else "Triton's interpreter"
    print(f"{name}, torch {torch.__version__}", flush=True)
    pending = deque(check for check in checks() if options.only in check.label)
    if not (count := len(pending)):
        parser.error(f"no check has the text {options.only!r}")
    if options.jobs == 0:
        make_strict()
        failed = sum(show(check, check.error(), time.monotonic() - begin) for check in pending)
        pending.clear()
    else:
        failed = run(pending, options.jobs, options.max_seconds - (time.monotonic() - begin))
    print(f"{count} checks in {time.monotonic() - begin:.0f} s: {failed} failed, "
          f"{len(pending)} not run")  # fmt: skip
    return failed + len(pending)


if __name__ == "__main__":
    multiprocessing.set_start_method("spawn")
    sys.exit(main() > 0)
