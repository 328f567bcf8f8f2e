"""Settings of small trainings, and what their run folders hold."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lmtrain import checkpoint, config
from lmtrain.schema import Config

TIMING_KEYS = {"time", "tokens_per_second", "save_seconds"}


def load_settings(overrides: Mapping[str, Any], **changes: Any) -> Config:
    """Settings by path; in the names of changes two underscores stand for the point."""
    changed = {path.replace("__", "."): value for path, value in changes.items()}
    return config.load(overrides={**overrides, **changed})


def metrics(run: Path, kind: str | None = None) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, of one kind or all."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if kind in (None, line["kind"])]


def untimed_metrics(run: Path, kind: str | None = None) -> list[dict[str, Any]]:
    """The same without what differs in every run."""
    return [
        {key: value for key, value in line.items() if key not in TIMING_KEYS}
        for line in metrics(run, kind)
    ]


def weights(run: Path, step: int | None = None) -> bytes:
    """The model's file in the checkpoint of a step, or in the newest."""
    step = checkpoint.steps(run)[-1] if step is None else step
    return (checkpoint.folder(run, step) / "model.safetensors").read_bytes()
