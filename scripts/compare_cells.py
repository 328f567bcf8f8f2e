"""Which cell should I use? All five, with equal parameters and equal training time, on one text.

    python scripts/compare_cells.py novel.txt --out cells
    python scripts/compare_cells.py novel.txt --set data.level=char --seconds 120 --parameters 1e6

For each cell the hidden size is the one that comes nearest to the number of parameters, and the
learning rate the one of a few whose short training ends with the lowest validation loss; that
training also measures its speed. The whole one then has so many updates, with their learning rate
falling to 0, as fit into the seconds of training steps. Draws OUT.svg, validation loss over time
and over tokens, and prints a table. Nothing else may run meanwhile.
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

from lmtrain import assembly, config
from lmtrain.training.run import run_training

CELLS = ("rnn", "simple-gru", "gru", "lstm", "peephole-lstm")
RATES = (0.001, 0.002, 0.004)
VALIDATIONS = 8


def fitted(base: dict[str, Any], cell: str, parameters: float) -> dict[str, Any]:
    """The settings of a cell as large as its parameters allow."""
    vocab_size = assembly.prepare(config.load(overrides=base))[0].vocab_size

    def count(hidden_size: int) -> int:
        settings = {**base, "model.cell": cell, "model.hidden_size": hidden_size}
        return assembly.build_model(config.load(overrides=settings), vocab_size).num_parameters

    low, high = 8, 16
    while count(high) < parameters:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if count(middle) <= parameters else (low, middle)
    return {**base, "model.cell": cell, "model.hidden_size": low}


def curve(run: Path, tokens_a_step: int) -> list[tuple[float, int, float]]:
    """Seconds of training steps, tokens and loss at each validation of a run."""
    points, seconds, step = [], 0.0, 0
    for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()):
        if line["kind"] == "train":
            seconds += (line["step"] - step) * tokens_a_step / line["tokens_per_second"]
            step = line["step"]
        else:
            points.append((seconds, step * tokens_a_step, line["loss"]))
    return points


def trained(
    settings: dict[str, Any], seconds: float, pilot_steps: int
) -> tuple[list[tuple[float, int, float]], int, float]:
    """The curve of a cell trained for so many seconds, its tokens a second and learning rate."""
    with tempfile.TemporaryDirectory() as folder:
        pilots = {}
        for rate in RATES:
            pilot = {
                **settings,
                "optimizer.learning_rate": rate,
                "train.max_steps": pilot_steps,
                "train.eval_every": pilot_steps,
            }
            place = Path(folder) / f"pilot-{rate}"
            pilots[rate] = run_training(config.load(overrides=pilot), place, is_quiet=True)
        rate = min(RATES, key=lambda each: pilots[each].valid_loss or math.inf)
        train = config.load(overrides=settings).train
        tokens_a_step = train.batch_size * train.seq_len
        steps = round(seconds * pilots[rate].tokens_per_second / tokens_a_step)
        whole = {
            **settings,
            "optimizer.learning_rate": rate,
            "train.max_steps": steps,
            "train.max_epochs": 10**6,
            "train.eval_every": max(1, steps // VALIDATIONS),
            "train.log_every": max(1, steps // VALIDATIONS // 4),
            "train.keep_checkpoints": 1,
        }
        summary = run_training(config.load(overrides=whole), Path(folder) / "run", is_quiet=True)
        points = curve(Path(folder) / "run", tokens_a_step)
    return points, round(summary.tokens_per_second), rate


def drawn(curves: dict[str, list[tuple[float, int, float]]], title: str, out: Path) -> None:
    """One picture of all curves, over time and over tokens."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    by_time, by_tokens = figure.subplots(1, 2, sharey=True)
    for cell, points in curves.items():
        seconds, tokens, losses = zip(*points, strict=True)
        by_time.plot(seconds, losses, label=cell)
        by_tokens.plot([count / 1e6 for count in tokens], losses, label=cell)
    by_time.set(xlabel="seconds of training steps", ylabel="validation loss, nats a token")
    by_tokens.set(xlabel="million tokens")
    lowest = min(points[-1][2] for points in curves.values())
    by_time.set_ylim(lowest - 0.05, lowest + 0.6)
    for axes in (by_time, by_tokens):
        axes.grid(visible=True, alpha=0.3)
    by_time.legend()
    figure.suptitle(title)
    figure.savefig(out, metadata={"Date": None})


def main() -> None:
    """Trains, prints and draws."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", nargs="+", help="training text, as for lmtrain train")
    parser.add_argument("--parameters", type=float, default=1e6, help="of each model")
    parser.add_argument("--seconds", type=float, default=120, help="of training steps for each")
    parser.add_argument("--pilot-steps", type=int, default=500, help="for each learning rate")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--out", type=Path, default=Path("cells"), help="picture, no suffix")
    options = parser.parse_args()
    base = {
        "data.train": options.text,
        "train.threads": options.threads,
        "model.num_layers": 1,
        **config.assignments(options.set),
    }
    curves = {}
    rows = ["| cell | hidden size | learning rate | tokens/s | tokens | loss | perplexity |"]
    rows.append("|---|---|---|---|---|---|---|")
    for cell in CELLS:
        settings = fitted(base, cell, options.parameters)
        curves[cell], speed, rate = trained(settings, options.seconds, options.pilot_steps)
        _, tokens, loss = curves[cell][-1]
        rows.append(
            f"| {cell} | {settings['model.hidden_size']} | {rate:g} | {speed:,} "
            f"| {tokens:,} | {loss:.4f} | {math.exp(loss):.2f} |"
        )
        print(rows[-1], flush=True)
    head = (
        f"{options.seconds:g} s of training steps each, about {options.parameters:,.0f} "
        f"parameters, {options.threads} threads, torch {torch.__version__}"
    )
    print("\n".join([head, "", *rows]))
    drawn(curves, head, options.out.with_suffix(".svg"))


if __name__ == "__main__":
    main()
