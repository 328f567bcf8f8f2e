"""`lmtrain info`: what a run or checkpoint is."""

from pathlib import Path
from typing import Annotated, Any

import typer

from lmtrain.cli.output import JsonOption, print_json, print_table


def command(
    path: Annotated[
        str, typer.Argument(help="A run, meaning its best checkpoint, or a checkpoint.")
    ],
    json: JsonOption = False,
) -> None:
    """Show a checkpoint's settings, size, progress and engines.

    \b
    lmtrain info runs/python-docs-lstm-1
    """
    from lmtrain import api, checkpoint
    from lmtrain.evaluation import perplexity
    from lmtrain.kernels.scan import engine

    model = api.load(path, device_name="cpu")
    progress = model.state["progress"]
    best = checkpoint.best(model.path.parent.parent)
    settings = model.config.model_dump(mode="json")
    facts: dict[str, Any] = {
        "checkpoint": str(model.path),
        "checkpoints": checkpoint.steps(Path(path)),
        "step": model.step,
        "tokens": progress.get("tokens"),
        "seconds": progress.get("seconds"),
        "best_valid_loss": best and best[1],
        "best_valid_perplexity": best and perplexity(best[1]),
        "parameters": model.model.num_parameters,
        "vocab_size": model.tokenizer.vocab_size,
        "engines": [engine(cell) for cell in model.model.recurrent.cells],  # type: ignore[arg-type]
    }
    if json:
        print_json("lmtrain.info/1", {**facts, "settings": settings})
        return
    print_table([(name.replace("_", " "), _shown(value)) for name, value in facts.items()])
    print()
    print_table(
        [
            (f"{section}.{name}", _shown(value))
            for section, part in settings.items()
            for name, value in part.items()
        ]
    )


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list):
        return ", ".join(map(_shown, value))
    return f"{value:,}" if type(value) is int else str(value)
