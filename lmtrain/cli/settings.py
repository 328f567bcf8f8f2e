"""Options that stand for settings: each knows its path; name, help and default come from there."""

from collections.abc import Mapping
from typing import Annotated, Any

import typer

from lmtrain import config, schema

_TEXTS = schema.settings()

# The frequent settings. Everything else is reached by --set or a configuration file.
OPTIONS: dict[str, str] = {
    "task": "data.task",
    "valid": "data.valid",
    "target": "data.target",
    "level": "data.level",
    "vocab_size": "data.vocab_size",
    "cell": "model.cell",
    "hidden_size": "model.hidden_size",
    "num_layers": "model.num_layers",
    "lr": "optimizer.learning_rate",
    "batch_size": "train.batch_size",
    "seq_len": "train.seq_len",
    "epochs": "train.max_epochs",
    "max_seconds": "train.max_seconds",
    "seed": "train.seed",
    "device": "train.device",
}


def setting(parameter: str, *aliases: str) -> Any:
    """The option of a parameter named in OPTIONS.

    Args:
        parameter: its name in Python.
        aliases: further names on the command line.
    """
    path = OPTIONS[parameter]
    value = schema.default(path)
    shown = "" if value is None or value == () else f"  [default: {value}]"
    return typer.Option(
        f"--{parameter.replace('_', '-')}", *aliases, help=_TEXTS[path] + shown, show_default=False
    )


def given(values: Mapping[str, object], assignments: list[str]) -> dict[str, object]:
    """Settings by path, from `--set` and, over it, the named options that were given.

    Args:
        values: the command's parameters by name.
        assignments: the texts of `--set`.

    Raises:
        ConfigError: a `--set` without a value.
    """
    chosen = config.assignments(assignments)
    for name, path in OPTIONS.items():
        if values.get(name) not in (None, []):
            chosen[path] = values[name]
    return chosen


SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Any setting by its path, such as train.patience=3; none takes a limit away.",
    ),
]

ConfigOption = Annotated[
    str | None,
    typer.Option(
        help="A recipe that comes with lmtrain, or a TOML file; without it and without CORPUS, "
        "the recipe python-docs.",
        metavar="NAME|FILE",
        show_default=False,
    ),
]
