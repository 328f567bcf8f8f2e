"""Compares all five cells on one text, with equal numbers of parameters and equal training time.

    python scripts/compare_cells.py novel.txt --out cells
    python scripts/compare_cells.py novel.txt --set data.level=char --seconds 120 --parameters 1e6

The hidden size of each cell is the largest with at most the given number of parameters. Each cell
is trained once with each of a few learning rates, which fall to 0 over the given seconds of wall
time; the run with the lowest final validation loss is reported. Draws OUT.svg, validation loss over
time and over tokens, and prints a table. Run it on an idle machine.

Allow enough seconds for several epochs: validation starts from a state of zeros, which training
sees once per epoch.
"""

import argparse
import json
import math
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from lmtrain import config
from lmtrain.tasks.language_model import LanguageModelling
from lmtrain.training.run import Summary, run_training

CELLS = ("rnn", "simple-gru", "gru", "lstm", "peephole-lstm")
RATES = (0.0005, 0.0015, 0.005)

Curve = list[tuple[float, int, float]]


def fitted(base: dict[str, Any], cell: str, parameters: float) -> dict[str, Any]:
    """Settings with the largest hidden size that has at most `parameters` parameters."""
    data = LanguageModelling.read(config.load(overrides=base))

    def count(hidden_size: int) -> int:
        settings = {**base, "model.cell": cell, "model.hidden_size": hidden_size}
        with torch.device("meta"):
            model = LanguageModelling.build(config.load(overrides=settings), data)
        return model.num_parameters

    low, high = 8, 16
    while count(high) < parameters:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if count(middle) <= parameters else (low, middle)
    return {**base, "model.cell": cell, "model.hidden_size": low}


def curve(run: Path, tokens_per_step: int) -> Curve:
    """Seconds since the start, tokens and loss at each validation of a run."""
    start = json.loads((run / "run.json").read_text())["starts"][0]["time"]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [
        (line["time"] - start, line["step"] * tokens_per_step, line["loss"])
        for line in lines
        if line["kind"] == "valid"
    ]


def best_training(settings: dict[str, Any]) -> tuple[Curve, Summary, float]:
    """The validation curve, the summary and the learning rate of the best training of a cell."""
    train = config.load(overrides=settings).train
    trainings = []
    with tempfile.TemporaryDirectory() as folder:
        for rate in RATES:
            run = Path(folder) / str(rate)
            summary = run_training(
                config.load(overrides={**settings, "optimizer.learning_rate": rate}),
                run,
                is_quiet=True,
            )
            trainings.append((curve(run, train.batch_size * train.seq_len), summary, rate))
    return min(trainings, key=lambda training: training[0][-1][2])


def draw(curves: dict[str, Curve], title: str, out: Path) -> None:
    """Writes a figure of all curves, over time and over tokens."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    by_time, by_tokens = figure.subplots(1, 2, sharey=True)
    for cell, points in curves.items():
        seconds, tokens, losses = zip(*points, strict=True)
        by_time.plot(seconds, losses, label=cell)
        by_tokens.plot([count / 1e6 for count in tokens], losses, label=cell)
    by_time.set(xlabel="seconds of wall time", ylabel="validation loss, nats per token")
    by_tokens.set(xlabel="million tokens")
    last = [points[-1][2] for points in curves.values()]
    # Show the ends of all curves, and the middle of the best.
    by_time.set_ylim(min(last) - 0.05, max(min(last) + 0.6, max(last) + 0.1))
    for axes in (by_time, by_tokens):
        axes.grid(visible=True, alpha=0.3)
    by_time.legend()
    figure.suptitle(title)
    figure.savefig(out, metadata={"Date": None})


def main() -> None:
    """Trains, prints a table and draws a figure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", nargs="+", help="training text, as for lmtrain train")
    parser.add_argument("--parameters", type=float, default=1e6, help="of each model")
    parser.add_argument("--seconds", type=float, default=120, help="of each training")
    parser.add_argument("--eval-every", type=int, default=100, help="updates between validations")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--out", type=Path, default=Path("cells"), help="figure, without suffix")
    options = parser.parse_args()
    base = {
        "data.train": options.text,
        "train.threads": options.threads,
        "train.max_seconds": options.seconds,
        "train.max_epochs": 10**6,
        "train.eval_every": options.eval_every,
        "train.keep_checkpoints": 1,
        "model.num_layers": 1,
        **config.assignments(options.set),
    }
    curves = {}
    rows = ["| cell | hidden size | learning rate | tokens/s | tokens | loss | perplexity |"]
    rows.append("|---|---|---|---|---|---|---|")
    for cell in CELLS:
        settings = fitted(base, cell, options.parameters)
        curves[cell], summary, rate = best_training(settings)
        _, tokens, loss = curves[cell][-1]
        rows.append(
            f"| {cell} | {settings['model.hidden_size']} | {rate:g} "
            f"| {summary.count_per_second:,.0f} "
            f"| {tokens:,} | {loss:.4f} | {math.exp(loss):.2f} |"
        )
        print(rows[-1], flush=True)
    head = (
        f"{options.seconds:g} s each, validation included, about {options.parameters:,.0f} "
        f"parameters, {options.threads} threads, torch {torch.__version__}"
    )
    print("\n".join([head, "", *rows]))
    draw(curves, head, options.out.with_suffix(".svg"))


if __name__ == "__main__":
    main()
