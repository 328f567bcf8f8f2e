"""Tests what lmtrain guarantees under faults, and prints a table of the outcome.

    python scripts/faults.py            the long form: about twenty minutes on two processor cores
    python scripts/faults.py --short    the same in about a minute
    python scripts/faults.py --fuzz 3600

Trainings are tiny and full-featured: dropouts, averaged weights, windows of
random length, a schedule, early stopping. They run in forks of one process that has imported
everything, so that a thousand of them fit into minutes; `kill -9` among whole processes, started as
a user starts them, is tried as well. The exit code is 1 if anything did not hold.
"""

import argparse
import concurrent.futures
import contextlib
import functools
import hashlib
import importlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import lmtrain
from lmtrain import api, checkpoint, files
from lmtrain import config as configuration
from lmtrain.cli import main as door
from lmtrain.data import corpus
from lmtrain.data.tokenizer import Tokenizer
from lmtrain.data.vocabulary import read_vocabulary
from lmtrain.data.word_vectors import read_word_vectors
from lmtrain.errors import LmtrainError
from lmtrain.training import run as training

# Short enough for 40 updates to go over its end.
TEXT = "the cat sat on the mat\nthe dog sat on the log\na cat and a dog sat\n" * 16
SETTINGS = """
[data]
level = "char"
[model]
hidden_size = 12
num_layers = 3
embedding_size = 6
dropout = 0.2
locked_dropout = true
word_dropout = 0.1
weight_dropout = 0.3
tied_embeddings = true
residual = true
[optimizer]
average = "ema"
warmup_steps = 5
[train]
batch_size = 4
seq_len = 8
random_seq_len = true
max_steps = 40
eval_every = 10
save_every = 3
log_every = 4
patience = 9
keep_checkpoints = 2
threads = {threads}
"""
SAVED_EVERY = 3
TIMES = ("time", "seconds", "tokens_per_second", "train_seconds", "save_seconds")
NAMES = ("model.safetensors", "state.safetensors", "state.json", "config.toml", "tokenizer.json",
         "MANIFEST.json")  # fmt: skip


@dataclass
class Row:
    """A line of the table."""

    promise: str
    tried: int = 0
    held: int = 0
    seconds: list[float] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def count(self, held: bool, problem: str = "") -> None:
        """Takes note of a trial."""
        self.tried += 1
        self.held += held
        if not held:
            self.problems.append(problem)

    def add(self, other: "Row") -> None:
        """Takes in the trials of another row of the same promise."""
        self.tried += other.tried
        self.held += other.held
        self.seconds += other.seconds
        self.problems += other.problems

    def __str__(self) -> str:
        times = ""
        if self.seconds:
            ranked = sorted(self.seconds)
            p99 = ranked[min(len(ranked) - 1, int(0.99 * len(ranked)))]
            times = f"{statistics.median(ranked):.2f} s / {p99:.2f} s"
        return f"| {self.promise} | {self.tried:,} | {self.held:,} | {times} |"


class Ground:
    """A folder with a text and settings, in which trainings are run and damaged."""

    def __init__(self, folder: Path, seed: int, threads: int = 1) -> None:
        self.folder = folder
        self.generator = random.Random(seed)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "text.txt").write_text(TEXT)
        (folder / "settings.toml").write_text(SETTINGS.format(threads=threads))
        self.run = folder / "run"
        self.straight: dict[str, Any] = {}
        self.duration = 0.0

    def clear(self) -> None:
        """No run, no tokens kept from the one before."""
        for name in ("run", "cache"):
            shutil.rmtree(self.folder / name, ignore_errors=True)

    def words(self) -> list[str]:
        """The command that begins the run or goes on with it."""
        if (self.run / "config.toml").exists():
            return ["train", "--resume", "run"]
        return ["train", "text.txt", "--config", "settings.toml", "--out", "run"]

    def fork(self, words: list[str], before: Callable[[], None] = lambda: None) -> int:
        """Runs lmtrain in a fork of this process; returns its number."""
        if process := os.fork():
            return process
        code = 1
        try:
            os.chdir(self.folder)
            os.environ["LMTRAIN_CACHE"] = str(self.folder / "cache")
            with Path("log.txt").open("a") as log:
                os.dup2(log.fileno(), 1)
                os.dup2(log.fileno(), 2)
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, signal.SIG_DFL)
            before()
            sys.argv = ["lmtrain", *words]
            door.main()
        except SystemExit as end:
            code = int(end.code or 0)
        finally:
            os._exit(code)

    def finish(self) -> int:
        """Trains to the end, without any harm; returns the exit code."""
        return os.waitstatus_to_exitcode(os.waitpid(self.fork(self.words()), 0)[1])

    def learn_the_truth(self) -> None:
        """Trains once without harm: what every other run is compared with."""
        self.clear()
        began = time.monotonic()
        if code := self.finish():
            sys.exit(
                f"a run without harm ended with {code}: {(self.folder / 'log.txt').read_text()}"
            )
        self.duration = time.monotonic() - began
        self.straight = self.outcome()

    def outcome(self) -> dict[str, Any]:
        """All that a run came to, without times."""
        step = checkpoint.steps(self.run)[-1]
        place = checkpoint.folder(self.run, step)
        lines = (self.run / "metrics.jsonl").read_text().splitlines()
        return {
            "step": step,
            "model": digest(place / "model.safetensors"),
            "state": digest(place / "state.safetensors"),
            "progress": without_times(json.loads((place / "state.json").read_text())),
            "metrics": [without_times(json.loads(line)) for line in lines],
            "best": (self.run / "best.json").read_text(),
            "samples": api.load(self.run).sample("the", num=3, max_tokens=50, seed=7),
        }

    def is_identical(self) -> bool:
        """Whether the run came to what it comes to without harm."""
        return self.outcome() == self.straight

    def problem(self) -> str:
        """Where the run came to something else."""
        found = self.outcome()
        return ", ".join(key for key in found if found[key] != self.straight[key])


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def without_times(tree: Any) -> Any:
    """What a JSON tree says apart from times, which differ in every run."""
    if isinstance(tree, dict):
        return {key: without_times(value) for key, value in tree.items() if key not in TIMES}
    return tree


def is_whole(run: Path) -> bool:
    """Whether every checkpoint that is there is intact."""
    return all(problem is None for _, problem in checkpoint.verify(run))


def last_recorded(run: Path) -> int:
    """The last step that the metrics have a line of."""
    path = run / "metrics.jsonl"
    steps = [0]
    for line in path.read_bytes().splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError):
            steps.append(json.loads(line)["step"])
    return max(steps)


def kills(ground: Ground, number: int, *, whole: bool = False) -> list[Row]:
    """SIGKILL at random moments, from the first reading of the text to the end."""
    what = "a process" if whole else "a forked process"
    usable = Row(f"{what} killed (SIGKILL): the run is usable, at most one save interval is lost")
    same = Row(f"{what} killed and resumed: same result bit for bit")
    start = whole_process(ground) if whole else lambda: ground.fork(ground.words())
    longest = 0.9 * ground.duration
    if whole:
        # A whole process imports everything first, which a machine may take seconds for.
        ground.clear()
        began = time.monotonic()
        os.waitpid(start(), 0)
        longest = 1.1 * (time.monotonic() - began)
    while usable.tried < number:
        ground.clear()
        while True:
            process = start()
            time.sleep(ground.generator.uniform(0, longest))
            os.kill(process, signal.SIGKILL)
            code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
            if code == 0:
                break
            steps = checkpoint.steps(ground.run)
            lost = last_recorded(ground.run) - max(steps, default=0)
            whole = not steps or is_whole(ground.run)
            is_kept = code == -signal.SIGKILL and whole and lost <= SAVED_EVERY
            usable.count(is_kept, f"exit code {code}, {lost} steps lost")
        same.count(ground.is_identical(), ground.problem())
    return [usable, same]


PHASES = {
    "reading text": (corpus.Source, "chunks"),
    "counting words": ("lmtrain.data.tokens", "_write_header"),
    "building the model": ("lmtrain.tasks.language_model:LanguageModelling", "build"),
    "opening the logs": ("lmtrain.training.run", "Logger"),
    "training": ("lmtrain.training.optimizer:Optimizer", "apply"),
    "validating": ("lmtrain.model.language_model:LanguageModel", "log_probs"),
    "sampling": ("lmtrain.tasks.sampling", "stream"),
    "saving": ("lmtrain.files", "publish_folder"),
    "removing old checkpoints": ("lmtrain.files", "remove_folder"),
}


OFTEN = ("training", "validating", "saving")


def signal_in(phase: str, number: int, call: int, note: Path) -> None:
    """Lets this process send itself a signal as a phase begins for the `call`-th time."""
    place, name = PHASES[phase]
    owner: Any = place
    if isinstance(place, str):
        module, _, inner = place.partition(":")
        owner = importlib.import_module(module)
        owner = getattr(owner, inner) if inner else owner
    real, calls = getattr(owner, name), iter(range(1, 10**9))

    def damaged(*arguments: Any, **options: Any) -> Any:
        if next(calls) == call:
            note.write_text(str(time.monotonic()))
            os.kill(os.getpid(), number)
        return real(*arguments, **options)

    setattr(owner, name, damaged)


def signals(ground: Ground, phase: str, number: int) -> list[Row]:
    """SIGTERM, SIGINT and SIGHUP in a phase: the right exit code, in time, nothing lost."""
    note = ground.folder / "signalled"
    row = Row(f"SIGTERM, SIGINT or SIGHUP while {phase}: exit 143, 130, 129, nothing lost")
    for index in range(number):
        ground.clear()
        note.unlink(missing_ok=True)
        sent = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)[index % 3]
        call = ground.generator.randint(1, 4 if phase in OFTEN else 1)
        sender = functools.partial(signal_in, phase, sent, call, note)
        process = ground.fork(ground.words(), sender)
        code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        row.seconds.append(time.monotonic() - float(note.read_text()))
        ground.finish()
        held = code == 128 + sent and ground.is_identical()
        row.count(held, f"exit code {code}, {ground.problem()}")
    return [row]


def second_signals(ground: Ground, number: int) -> list[Row]:
    """A second signal ends at once; what was saved before is whole."""
    row = Row("a second signal ends the process at once, earlier checkpoints are whole")
    for _ in range(number):
        ground.clear()
        process = ground.fork(ground.words())
        time.sleep(ground.generator.uniform(0.2, ground.duration))
        began = time.monotonic()
        os.kill(process, signal.SIGTERM)
        os.kill(process, signal.SIGTERM)
        code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        row.seconds.append(time.monotonic() - began)
        steps = checkpoint.steps(ground.run)
        whole = not steps or is_whole(ground.run)
        ground.finish()
        row.count(
            code in (0, 143, -signal.SIGTERM) and whole and ground.is_identical(),
            f"exit code {code}, {ground.problem()}",
        )
    return [row]


def checkpoints_on_demand(ground: Ground, number: int) -> list[Row]:
    """SIGUSR1 saves and changes nothing."""
    row = Row("SIGUSR1 saves and continues, the result is unchanged")
    for _ in range(number):
        ground.clear()
        process = ground.fork(ground.words())
        for _ in range(4):
            time.sleep(ground.duration / 6)
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGUSR1)
        code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        row.count(code == 0 and ground.is_identical(), f"exit code {code}")
    return [row]


def resumes(ground: Ground, steps: list[int], engine: str) -> list[Row]:
    """The process ends right after the checkpoint of each step; the run goes on from there."""
    row = Row(f"resumed from each step, {engine}: same result bit for bit")

    def end_after(step: int) -> None:
        real = training.Trainer._handle_signals

        def handle(trainer: Any) -> None:
            real(trainer)
            if trainer.optimizer.step == step:
                trainer.save()
                os._exit(9)

        training.Trainer._handle_signals = handle  # type: ignore[method-assign]

    for step in steps:
        ground.clear()
        os.waitpid(ground.fork(ground.words(), functools.partial(end_after, step)), 0)
        reached = checkpoint.steps(ground.run)[-1]
        ground.finish()
        row.count(reached == step and ground.is_identical(), f"step {step}: {ground.problem()}")
    return [row]


def damaged_bytes(ground: Ground, number: int) -> list[Row]:
    """Bytes changed and files cut in every file of a checkpoint."""
    flips = Row("changed bytes in each file of a checkpoint: detected")
    cuts = Row("files of a checkpoint cut short: detected")
    place = checkpoint.folder(ground.run, checkpoint.steps(ground.run)[-1])

    def is_detected(path: Path, content: bytes, old: bytes) -> bool:
        path.write_bytes(content)
        try:
            checkpoint.read(place).require_intact()
        except LmtrainError:
            return True
        finally:
            path.write_bytes(old)
        return False

    for name in NAMES:
        old = (place / name).read_bytes()
        for _ in range(number):
            at = ground.generator.randrange(len(old))
            changed = bytearray(old)
            changed[at] ^= ground.generator.randint(1, 255)
            flips.count(is_detected(place / name, bytes(changed), old), f"{name}, byte {at}")
        for size in (0, 1, 7, 8, 9, 100, len(old) // 2, len(old) - 1):
            cuts.count(is_detected(place / name, old[:size], old), f"{name} cut to {size}")
    return [flips, cuts]


VECTORS = b"3 3\nthe 1 2.5 -3e-2\n. . . 0 0 0\ncat 4 5 6 \n"


def text(place: str) -> list[str]:
    """A text in pieces."""
    return list(corpus.open_text([place]).chunks())


def vectors(place: str) -> object:
    """The vectors of some words."""
    return read_word_vectors(place, ["<UNK>", "the", "cat"], 3)


def readers(ground: Ground) -> Iterator[tuple[str, bytes, Callable[[bytes], object]]]:
    """Every reader of a file that may come from anyone: its name, a good file, how it is read."""
    place = checkpoint.folder(ground.run, checkpoint.steps(ground.run)[-1])
    damaged = ground.folder / "damaged"

    def in_a_run(name: str) -> Callable[[bytes], object]:
        def load(content: bytes) -> object:
            # The manifest agrees, as one of an attacker would.
            shutil.rmtree(damaged, ignore_errors=True)
            target = damaged / "checkpoints" / place.name
            shutil.copytree(place, target)
            (target / name).write_bytes(content)
            manifest = json.loads((place / "MANIFEST.json").read_text())
            manifest["files"][name] = {"bytes": len(content), "sha256": files.sha256([content])}
            (target / "MANIFEST.json").write_text(json.dumps(manifest, indent=1))
            return api.load(damaged).sample("the", max_tokens=3)

        return load

    def manifest(content: bytes) -> object:
        shutil.rmtree(damaged, ignore_errors=True)
        shutil.copytree(place, damaged / "checkpoints" / place.name)
        (damaged / "checkpoints" / place.name / "MANIFEST.json").write_bytes(content)
        return api.load(damaged)

    def of_a_file(read: Callable[[str], object]) -> Callable[[bytes], object]:
        def load(content: bytes) -> object:
            path = ground.folder / "damaged.txt"
            path.write_bytes(content)
            return read(str(path))

        return load

    def resumed(name: str) -> Callable[[bytes], object]:
        def resume(content: bytes) -> object:
            shutil.rmtree(damaged, ignore_errors=True)
            shutil.copytree(ground.run, damaged)
            (damaged / name).write_bytes(content)
            return training.run_training(
                out=damaged, resume=True, overrides={"train.max_steps": 41}, is_quiet=True
            )

        return resume

    for name in ("config.toml", "tokenizer.json", "state.json", "model.safetensors"):
        yield f"{name} of a checkpoint", (place / name).read_bytes(), in_a_run(name)
    yield "MANIFEST.json", (place / "MANIFEST.json").read_bytes(), manifest
    yield "text", (TEXT + "é 你好 🙂").encode(), of_a_file(text)
    yield "vocabulary", "the\n</s>\né\n".encode(), of_a_file(read_vocabulary)
    yield "word vectors", VECTORS, of_a_file(vectors)
    settings = (ground.folder / "settings.toml").read_bytes()
    yield "settings", settings, lambda c: configuration.parse(c.decode("utf-8", "replace"), "x")
    tokens = (place / "tokenizer.json").read_bytes()
    yield "tokenizer", tokens, lambda c: Tokenizer.from_json(c.decode("utf-8", "replace"))
    for name in ("metrics.jsonl", "best.json", "run.json"):
        yield f"{name} of a resumed run", (ground.run / name).read_bytes(), resumed(name)


INTERESTING = (
    b"", b"\0", b"\xff", b"-1", b"1e999", b"NaN", b"null", b"{}", b"[]", b'"', b"../../x",
    b"9" * 30, b"[" * 5000, b"\x1b]0;x\x07", b"\r\n", b"true", b"0.5", b"\xc3",
)  # fmt: skip


def mutated(content: bytes, generator: random.Random) -> bytes:
    """Bytes changed, taken out, doubled or put in at some places."""
    changed = bytearray(content)
    for _ in range(generator.randint(1, 4)):
        at = generator.randrange(len(changed) + 1)
        until = min(len(changed), at + generator.randint(0, 1 << generator.randint(0, 8)))
        changed[at:until] = generator.choice(
            (
                generator.choice(INTERESTING),
                bytes(changed[at:until]) * 2,
                generator.randbytes(until - at),
                b"",
            )
        )
    return bytes(changed)


def fuzz(ground: Ground, seconds: float) -> list[Row]:
    """Hurt files in every reader: nothing comes out but lmtrain's own errors."""
    rows = []
    known = list(readers(ground))
    os.environ["LMTRAIN_CACHE"] = str(ground.folder / "cache")
    for name, content, read in known:
        row = Row(f"fuzzed {name}: read, or refused with an error of one to three lines")
        until = time.monotonic() + seconds / len(known)
        while time.monotonic() < until:
            damaged = mutated(content, ground.generator)
            try:
                read(damaged)
            except LmtrainError as error:
                row.count(len(str(error).splitlines()) <= 3, str(error))
            except Exception as error:  # noqa: BLE001  # what this looks for
                row.count(False, f"{error!r} for {damaged!r}"[:300])
            else:
                row.count(True)
        rows.append(row)
    return rows


def readers_while_training(ground: Ground, number: int) -> list[Row]:
    """A run is used again and again while it is trained, saved and rotated."""
    row = Row("loaded, sampled and evaluated while training saves and removes checkpoints")
    os.environ["LMTRAIN_CACHE"] = str(ground.folder / "own cache")
    while row.tried < number:
        ground.clear()
        process = ground.fork(ground.words())
        while os.waitpid(process, os.WNOHANG) == (0, 0):
            if not checkpoint.steps(ground.run):
                continue
            try:
                model = api.load(ground.run)
                model.sample("the", max_tokens=3)
                model.evaluate([str(ground.folder / "text.txt")], batch_size=8)
                row.count(True)
            except LmtrainError as error:
                row.count(False, str(error))
    return [row]


def two_trainers(ground: Ground, number: int) -> list[Row]:
    """The second trainer of a folder is sent away; a dead one leaves no lock."""
    row = Row("a second training in the same folder: refused with exit code 7")
    for _ in range(number):
        ground.clear()
        first = ground.fork(ground.words())
        while not checkpoint.steps(ground.run):
            time.sleep(0.01)
        os.kill(first, signal.SIGSTOP)
        began = time.monotonic()
        second = ground.fork(["train", "--resume", "run"])
        code = os.waitstatus_to_exitcode(os.waitpid(second, 0)[1])
        row.seconds.append(time.monotonic() - began)
        os.kill(first, signal.SIGKILL)
        os.waitpid(first, 0)
        row.count(code == 7 and ground.finish() == 0 and ground.is_identical(), f"exit code {code}")
    return [row]


def whole_process(ground: Ground) -> Callable[[], int]:
    """Starts lmtrain as a user does."""

    def start() -> int:
        with (ground.folder / "log.txt").open("a") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "lmtrain", *ground.words()],
                cwd=ground.folder,
                env={**os.environ, "LMTRAIN_CACHE": str(ground.folder / "cache")},
                stdout=log,
                stderr=log,
            ).pid

    return start


Suite = Callable[[Ground], list[Row]]


def suites(args: argparse.Namespace) -> list[tuple[Suite, int, dict[str, str]]]:
    """All suites, in parts that two processors share; with their threads and environments."""
    short, parts = args.short, 1 if args.short else 4
    plain: list[Suite] = [
        *[functools.partial(kills, number=3 if short else 50, whole=True)] * parts,
        *[functools.partial(kills, number=12 if short else 250)] * parts,
        *[functools.partial(signals, phase=phase, number=1 if short else 50) for phase in PHASES],
        functools.partial(damaged_bytes, number=40 if short else 500),
        functools.partial(fuzz, seconds=args.fuzz),
        functools.partial(second_signals, number=2 if short else 50),
        functools.partial(checkpoints_on_demand, number=1 if short else 20),
        functools.partial(readers_while_training, number=5 if short else 200),
        functools.partial(two_trainers, number=1 if short else 20),
    ]
    steps = [4, 20] if short else list(range(1, 41))
    engines: list[tuple[str, int, dict[str, str]]] = [
        ("one thread", 1, {}),
        ("one thread, without native kernels", 1, {"LMTRAIN_KERNELS": "torch"}),
        ("two threads", 2, {}),
    ]
    return [(suite, 1, {}) for suite in plain] + [
        (functools.partial(resumes, steps=steps, engine=engine), threads, environment)
        for engine, threads, environment in engines
    ]


def tried(number: int, folder: Path, args: argparse.Namespace) -> list[Row]:
    """The rows of a suite, in a folder of its own."""
    suite, threads, environment = suites(args)[number]
    os.environ.update(environment)
    ground = Ground(folder / str(number), args.seed + number, threads)
    ground.learn_the_truth()
    rows = suite(ground)
    for name in environment:
        del os.environ[name]
    return rows


def main() -> None:
    """Runs the suites and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="about a minute instead of twenty")
    parser.add_argument("--fuzz", type=float, metavar="SECONDS", help="how long readers are fuzzed")
    parser.add_argument("--seed", type=int, default=1, help="of moments, places and bytes")
    args = parser.parse_args()
    args.fuzz = args.fuzz or (6.0 if args.short else 60.0)
    # Threads that this process had started would be missing in its forks.
    torch.set_num_threads(1)
    # torch imports it with the first optimizer; here once for all forks.
    importlib.import_module("torch._dynamo")
    print(f"lmtrain {lmtrain.__version__}, torch {torch.__version__}, seed {args.seed}\n")
    print("| Guarantee | Tests | Passed | p50 / p99 |\n|---|---|---|---|")
    rows: dict[str, Row] = {}
    forks = multiprocessing.get_context("fork")
    with (
        tempfile.TemporaryDirectory() as folder,
        concurrent.futures.ProcessPoolExecutor(os.cpu_count(), mp_context=forks) as workers,
    ):
        parts = [
            workers.submit(tried, number, Path(folder), args) for number in range(len(suites(args)))
        ]
        for part in parts:
            for row in part.result():
                rows.setdefault(row.promise, Row(row.promise)).add(row)
    for row in rows.values():
        print(row)
    failed = [f"{row.promise}: {each}" for row in rows.values() for each in row.problems]
    for problem in failed[:20]:
        print(problem, file=sys.stderr)
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
