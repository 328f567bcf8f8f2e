"""`lmtrain find-lr`: the learning-rate range test."""

from pathlib import Path
from typing import Annotated

import typer

from lmtrain import files
from lmtrain.cli import pictures
from lmtrain.cli.loading import load_settings
from lmtrain.cli.output import JsonOption, print_json, print_table
from lmtrain.cli.settings import ConfigOption, SetOption, chosen_settings, setting
from lmtrain.errors import ConfigError


def command(
    corpus: Annotated[
        list[str] | None,
        typer.Argument(
            help="Data files, globs, - or corpora; without any, those of the settings.",
            show_default=False,
        ),
    ] = None,
    config: ConfigOption = None,
    task: Annotated[str | None, setting("task")] = None,
    first: Annotated[
        float, typer.Option(help="Learning rate of the first update, above 0.")
    ] = 1e-5,
    last: Annotated[
        float, typer.Option(help="Learning rate of the last update, above --first.")
    ] = 10.0,
    steps: Annotated[int, typer.Option(min=3, help="Maximum number of updates.")] = 300,
    plot: Annotated[
        Path | None, typer.Option(help="File for a plot of the curve: .png, .svg or .pdf.")
    ] = None,
    set_: SetOption = None,
    json: JsonOption = False,
) -> None:
    """Find a learning rate by training with a rising one.

    Start below the one where the loss falls fastest.

    \b
    lmtrain find-lr novel.txt --set model.hidden_size=512
    lmtrain find-lr reviews.tsv --task classify
    lmtrain find-lr --config ptb-small --plot curve.png
    """
    if not 0 < first < last < float("inf"):
        raise ConfigError(f"--first {first:g} must be above 0 and below --last {last:g}")
    overrides = chosen_settings({"task": task}, set_ or [])
    chosen = load_settings(corpus, config, overrides)
    if plot:
        # A plot that cannot be drawn is reported before training, not after it.
        pictures.require_no_folder("--plot", plot)
        _drawn([first, last], [0.0, 0.0], plot.suffix[1:])
    from lmtrain.training.run import find_learning_rate

    curve = find_learning_rate(chosen, first=first, last=last, steps=steps)
    if plot:
        files.write(plot, _drawn(curve.learning_rates, curve.losses, plot.suffix[1:]))
    if json:
        print_json(
            "lmtrain.find-lr/1",
            {
                "lowest": curve.lowest,
                "steepest": curve.steepest,
                "learning_rates": curve.learning_rates,
                "losses": curve.losses,
            },
        )
        return
    every = max(1, len(curve.losses) // 15)
    rows = [
        (f"{r:.2g}", f"{loss:.4f}")
        for r, loss in zip(curve.learning_rates, curve.losses, strict=True)
    ]
    print_table([("learning rate", "loss"), *rows[every - 1 :: every]])
    print(f"The loss falls fastest at {curve.steepest:.2g} and is lowest at {curve.lowest:.2g}.")


def _drawn(learning_rates: list[float], losses: list[float], kind: str) -> bytes:
    """A plot of the curve in a file format of matplotlib.

    Raises:
        ConfigError: the format is unknown, or matplotlib is not installed.
    """
    figure = pictures.new_figure("--plot", 6, 4)
    axes = figure.add_subplot(
        xscale="log", xlabel="learning rate", ylabel="loss, nats a prediction", title="Range test"
    )
    axes.plot(learning_rates, losses)
    axes.grid(visible=True, alpha=0.3)
    return pictures.to_bytes(figure, kind, "--plot")
