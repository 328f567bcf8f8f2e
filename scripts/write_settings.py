"""Writes docs/settings.md, the reference of all settings, from lmtrain/schema.py.

    python scripts/write_settings.py

A test compares the page with what this script would write.
"""

from pathlib import Path
from typing import Any, get_args

from lmtrain import schema
from lmtrain.cli.settings import OPTIONS

PAGE = Path(__file__).parents[1] / "docs" / "settings.md"
TASKS = get_args(schema.DataConfig.model_fields["task"].annotation)
INTRODUCTION = """\
# Settings

All settings of `lmtrain train`, generated from [lmtrain/schema.py](../lmtrain/schema.py) by
`python scripts/write_settings.py`. Set any of them on the command line or in a TOML file:

    lmtrain train novel.txt --set model.dropout=0.3 --set train.patience=3
    lmtrain train novel.txt --config mine.toml

```toml
[model]
dropout = 0.3

[train]
patience = 3
```

Precedence: defaults < `--config` < `--set` < named options. The value `none` removes a limit, as in
`--set train.max_seconds=none`. Names such as `peephole-lstm` are not case-sensitive and may have
`_` for `-`. A setting that has no effect with the task, cell, softmax, schedule or average in use
is refused, and the message names the values that it needs. `lmtrain info RUN` prints the settings
of a run.

The column "Applies to" is empty for settings of every task.
"""
TABLE = "| Setting | Values | Default | Applies to | Description |\n|---|---|---|---|---|"


def values(field: dict[str, Any]) -> str:
    """The values that a setting takes, from its JSON schema."""
    if "anyOf" in field:
        return " or ".join(values(each) for each in field["anyOf"])
    if "enum" in field:
        return ", ".join(f"`{each}`" for each in field["enum"])
    kind = {"boolean": "`true`, `false`", "null": "`none`", "string": "text", "array": "list"}
    if field["type"] in kind:
        return kind[field["type"]]
    name = "integer" if field["type"] == "integer" else "number"
    signs = {
        "minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<",
    }  # fmt: skip
    # Limits that only keep numbers within 64 bits are left out.
    bounds = [
        f"{sign} {field[key]:,.12g}"
        for key, sign in signs.items()
        if key in field and field[key] < 10**12
    ]
    return " ".join([name, ", ".join(bounds)]).strip()


def default(path: str) -> str:
    """The default of a setting, as it is written in `--set`."""
    value = schema.default(path)
    if value == ():
        return "empty"
    if isinstance(value, tuple):
        return ", ".join(f"`{each}`" for each in value)
    return f"`{'none' if value is None else str(value).lower()}`"


def applies_to(field: Any) -> str:
    """The tasks and the values of other settings that a setting has an effect with."""
    parts = []
    for needed in (each for each in field.metadata if isinstance(each, schema.For)):
        shown = ", ".join(str(value).lower() for value in needed.values)
        parts.append(shown if needed.path == "data.task" else f"`{needed.path}={shown}`")
    return "; ".join(parts)


def page() -> str:
    """The reference, as Markdown."""
    sentences, lines = schema.settings(), [INTRODUCTION]
    options = {path: name.replace("_", "-") for name, path in OPTIONS.items()}
    definitions = schema.Config.model_json_schema()["$defs"]
    for section, part in schema.Config.model_fields.items():
        model = part.annotation
        lines += [f"## {section}", "", f"{part.description}", "", TABLE]
        for name, field in model.model_fields.items():
            path = f"{section}.{name}"
            option = f", `--{options[path]}`" if path in options else ""
            cells = (
                f"`{path}`{option}",
                values(definitions[model.__name__]["properties"][name]),
                default(path),
                applies_to(field),
                sentences[path],
            )
            lines.append("| " + " | ".join(each.replace("|", "\\|") for each in cells) + " |")
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), "utf-8")
