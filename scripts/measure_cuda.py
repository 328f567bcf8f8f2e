"""Checks, times and trains on a GPU, one after the other, each within a time limit.

    python scripts/measure_cuda.py OUT PTB                    # all, in ten minutes
    python scripts/measure_cuda.py OUT PTB --parts check      # check_cuda.py alone

PTB is the folder of the Penn Treebank, with train.txt, valid.txt and test.txt. The folder OUT gets
check.txt of check_cuda.py, bench.jsonl of bench_cuda.py, and train.txt and metrics.jsonl of a
training that takes the rest of the time: a model with the shape and the regularization of AWD-LSTM
(Merity, Keskar & Socher 2018). Its learning rate, threshold and weight decay are those published,
converted to a loss that is summed over the steps of a window; the rate falls to 0. All is written
as it is printed, so that a part that is killed has results too.
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SCRIPTS = Path(__file__).parent
# Most seconds of each part.
LIMITS = {"check": 200.0, "bench": 170.0, "train": float("inf")}
# Of the parts that are scripts: the words of their commands, and the file of their results.
COMMANDS = {
    "check": ([SCRIPTS / "check_cuda.py"], "check.txt"),
    "bench": ([SCRIPTS / "bench_cuda.py", "--json"], "bench.jsonl"),
}
# Seconds in which a part may end after its limit, and those of the evaluation after a training.
GRACE_SECONDS, EVALUATION_SECONDS = 25, 40
AWD = {
    "data.splitter": "whitespace",
    "model.embedding_size": 400, "model.hidden_size": 1150, "model.num_layers": 3,
    "model.tied_embeddings": "true", "model.locked_dropout": "true",
    "model.dropout": 0.25, "model.input_dropout": 0.4, "model.output_dropout": 0.4,
    "model.word_dropout": 0.1, "model.weight_dropout": 0.5,
    "model.activation_regularization": 2, "model.temporal_regularization": 1,
    "model.init_scale": 0.04, "model.forget_bias": 0,
    "optimizer.name": "sgd", "optimizer.learning_rate": 0.43, "optimizer.max_grad_norm": 17.5,
    "optimizer.weight_decay": 8.4e-5,
    "train.batch_size": 40, "train.seq_len": 70, "train.random_seq_len": "true",
    "train.max_epochs": 500, "train.eval_every": 1000, "train.state_reset": 0,
}  # fmt: skip


def run(command: list[str | Path], out: Path, log: Path, seconds: float) -> int:
    """Runs a command and returns its exit code, 124 if it was killed after some seconds.

    Its output is appended to the file `out`, its messages to `log`.
    """
    with out.open("a", encoding="utf-8") as stdout, log.open("a", encoding="utf-8") as stderr:
        process = subprocess.Popen(command, stdout=stdout, stderr=stderr, start_new_session=True)
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            return 124


def train(out: Path, seconds: float, ptb: Path) -> int:
    """Trains on the Penn Treebank and evaluates the model."""
    # -P: the installed package, not the folder of this name.
    lmtrain: list[str | Path] = [sys.executable, "-P", "-m", "lmtrain"]
    test, log = str(ptb / "test.txt"), out / "train.txt"
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "awd"
        command = [*lmtrain, "train", ptb / "train.txt", "--valid", ptb / "valid.txt"]
        command += [f"--max-seconds={max(1.0, seconds - EVALUATION_SECONDS)}", "--out", model]
        for setting in ({"data.test": [test]} | AWD).items():
            command += ["--set", "{}={}".format(*setting)]
        code = run(command, log, log, seconds + GRACE_SECONDS)
        if (model / "metrics.jsonl").exists():
            shutil.copy(model / "metrics.jsonl", out)
        return max(code, run([*lmtrain, "evaluate", model], log, log, 3 * EVALUATION_SECONDS))


def main() -> int:
    """Runs the parts and returns how many failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("ptb", type=Path)
    parser.add_argument("--parts", nargs="+", choices=LIMITS, default=list(LIMITS))
    parser.add_argument("--max-seconds", type=float, default=570)
    options = parser.parse_args()
    end = time.monotonic() + options.max_seconds
    options.out.mkdir(parents=True, exist_ok=True)
    os.environ["PYTHONUNBUFFERED"] = "1"
    failed = 0
    for part in options.parts:
        begin = time.monotonic()
        seconds = min(LIMITS[part], end - begin)
        if part == "train":
            code = train(options.out, seconds, options.ptb)
        else:
            words, name = COMMANDS[part]
            command = [sys.executable, *words, f"--max-seconds={seconds}"]
            log = options.out / f"{part}.txt"
            code = run(command, options.out / name, log, seconds + GRACE_SECONDS)
        print(f"{part}: exit code {code} after {time.monotonic() - begin:.0f} s", flush=True)
        failed += code != 0
    for path in sorted(options.out.glob("*.txt")):
        print(f"\n{path.name}:", *path.read_text(encoding="utf-8").splitlines()[-12:], sep="\n")
    return failed


if __name__ == "__main__":
    sys.exit(main() > 0)
