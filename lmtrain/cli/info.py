"""`lmtrain info`: describes a run or checkpoint."""

from pathlib import Path
from typing import Any

from lmtrain.cli.loading import RunArgument, load
from lmtrain.cli.output import JsonOption, print_json, print_table


def command(
    path: RunArgument,
    json: JsonOption = False,
) -> None:
    """Show settings, size, progress and engines of a checkpoint.

    \b
    lmtrain info runs/python-docs-lstm-1
    """
    model = load(path, "cpu")
    from lmtrain import checkpoint
    from lmtrain.cells import Cell
    from lmtrain.kernels.products import native_dtypes
    from lmtrain.kernels.scan import engine
    from lmtrain.tasks.registry import task_of

    progress, limits = (model.state["parts"].get(name, {}) for name in ("progress", "limits"))
    best = checkpoint.best(model.path.parent.parent)
    layers = [layer for layer in model.model.modules() if isinstance(layer, Cell)]
    settings = model.config.model_dump(mode="json")
    facts: dict[str, Any] = {
        "checkpoint": str(model.path),
        "checkpoint_steps": checkpoint.steps(Path(path)),
        "step": model.step,
        "task": model.config.data.task,
        task_of(model.config).unit: progress.get("count"),
        "seconds": limits.get("seconds"),
        **({f"best_{best.metric}": best.value} if best else {}),
        "parameters": model.model.num_parameters,
        **model.data.sizes(),
        "engines": [engine(layer) for layer in layers],
        "native_products": native_dtypes(),
    }
    if json:
        print_json("lmtrain.info/1", {**facts, "settings": settings})
        return
    print_table([(name.replace("_", " "), _formatted(value)) for name, value in facts.items()])
    print()
    print_table(
        [
            (f"{section}.{name}", _formatted(value))
            for section, part in settings.items()
            for name, value in part.items()
        ]
    )


def _formatted(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list):
        return ", ".join(map(_formatted, value)) or "none"
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return f"{value:,}" if isinstance(value, int) else str(value)
