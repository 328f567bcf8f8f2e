"""Prints the curve of a run as JSON lines, the format of docs/results/.

    python scripts/summarize_run.py runs/ptb-small > docs/results/ptb-small.jsonl

The first line has settings and versions of the run; then one line per validation, with the mean of
the training losses logged since the previous one, and times in seconds since the first line of the
metrics.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from lmtrain import config


def summary(run: Path) -> list[dict[str, Any]]:
    """The lines about a run folder."""
    start = json.loads((run / "run.json").read_text())["starts"][-1]
    settings = config.load(run / "config.toml").model_dump(mode="json")
    # The places of texts are those of one machine.
    del settings["data"]["train"], settings["data"]["valid"], settings["data"]["test"]
    versions = ("lmtrain", "torch", "python", "device", "threads", "precision")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    began, losses = lines[0]["time"], []
    points: list[dict[str, Any]] = [{name: start[name] for name in versions}, settings]
    for line in lines:
        if line["kind"] == "train":
            losses.append(line["loss"])
        elif line["kind"] == "valid":
            points.append(
                {
                    "step": line["step"],
                    "epoch": line["epoch"],
                    "seconds": round(line["time"] - began),
                    "mean_train_loss": round(statistics.mean(losses), 4) if losses else None,
                    **{
                        f"valid_{name}": round(line[name], 5)
                        for name in ("loss", "perplexity", "accuracy")
                        if name in line
                    },
                }
            )
            losses = []
    return points


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    for point in summary(parser.parse_args().run):
        print(json.dumps(point))
