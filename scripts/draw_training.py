"""Draws how a character model learns: its loss, and samples from several of its checkpoints.

    python scripts/draw_training.py runs/shakespeare --steps 100,300,1000,2940

The run must have kept these checkpoints, as that of docs/training.svg in docs/getting-started.md.
"""

import argparse
import json
from pathlib import Path

from matplotlib.figure import Figure

import lmtrain

_INK, _LIGHT, _ACCENT = "#1f2933", "#9aa5b1", "#d9480f"


def losses(run: Path, kind: str) -> tuple[list[int], list[float]]:
    """Steps and losses of a run's lines of metrics of that kind."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = [(line["step"], line["loss"]) for line in lines if line["kind"] == kind]
    return [step for step, _ in found], [loss for _, loss in found]


def draw(run: Path, steps: list[int], prompt: str, out: Path) -> None:
    """Draws the losses on the left and a sample from each checkpoint on the right."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.25))
    left.plot(*losses(run, "train"), color=_LIGHT, linewidth=1, label="training")
    valid_steps, valid_losses = losses(run, "valid")
    left.plot(valid_steps, valid_losses, color=_INK, linewidth=1.5, label="validation")
    left.set(xscale="log", xlabel="updates", ylabel="loss, nats per character")
    left.xaxis.set_major_formatter("{x:,.0f}")
    left.spines[["top", "right"]].set_visible(False)
    left.legend(frameon=False)
    right.axis("off")
    for index, step in enumerate(steps):
        loss = valid_losses[valid_steps.index(step)]
        left.plot([step], [loss], "o", color=_ACCENT, markersize=5)
        model = lmtrain.load(run / "checkpoints" / f"step-{step:08d}", device_name="cpu")
        text = model.sample(prompt + "\n", max_tokens=200, temperature=0.8, seed=1)[0]
        lines = [line for line in text.splitlines() if line.strip()][1:4]
        top = 1 - index / len(steps)
        title = f"after {step:,} updates, loss {loss:.2f}"
        right.text(0, top, title, color=_ACCENT, va="top", fontsize=9, weight="bold")
        shown = "\n".join(line[:52] for line in lines)
        right.text(0, top - 0.06, shown, color=_INK, va="top", fontsize=8.5, family="monospace")
    figure.savefig(out.with_suffix(".svg"), metadata={"Date": None})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--steps", default="100,300,1000,2940")
    parser.add_argument("--prompt", default="ROMEO:")
    parser.add_argument("--out", type=Path, default=Path("docs/training"))
    options = parser.parse_args()
    draw(options.run, [int(step) for step in options.steps.split(",")], options.prompt, options.out)
