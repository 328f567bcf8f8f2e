"""Options for settings: name, help and default come from the setting that an option stands for."""

from collections.abc import Mapping
from typing import Annotated, Any

import typer

from lmtrain import config, schema

_HELP = schema.settings()

# The most used settings; all others are set by --set or a settings file.
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
    """The option for a parameter in OPTIONS.

    Args:
        parameter: the name of the parameter.
        aliases: other names of the option.
    """
    path = OPTIONS[parameter]
    value = schema.default(path)
    shown = "" if value is None or value == () else f"  [default: {value}]"
    return typer.Option(
        f"--{parameter.replace('_', '-')}", *aliases, help=_HELP[path] + shown, show_default=False
    )


def chosen_settings(values: Mapping[str, object], assignments: list[str]) -> dict[str, object]:
    """Settings by path from `--set` and from named options, which take precedence.

    Args:
        values: the command's parameters by name.
        assignments: the values of `--set`.

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
        help="Any setting by its path, such as train.patience=3; none for no limit.",
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
