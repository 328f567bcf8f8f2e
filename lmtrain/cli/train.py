"""`lmtrain train`: trains a model."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lmtrain import screen, torchrun
from lmtrain.cli.loading import load_settings
from lmtrain.cli.output import JsonOption, exit_quietly_on_broken_pipe, print_json
from lmtrain.cli.settings import ConfigOption, SetOption, chosen_settings, setting
from lmtrain.errors import ConfigError

if TYPE_CHECKING:
    from lmtrain.training.run import Summary


def command(
    corpus: Annotated[
        list[str] | None,
        typer.Argument(
            help="Data files, globs, .gz files, - for standard input, or names of corpora; "
            "with --resume, the run.",
            show_default=False,
        ),
    ] = None,
    config: ConfigOption = None,
    out: Annotated[
        Path | None, typer.Option(help="Run folder; without it, a new folder in runs/.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Resume a run where its last checkpoint was saved.")
    ] = False,
    task: Annotated[str | None, setting("task")] = None,
    valid: Annotated[list[str] | None, setting("valid")] = None,
    target: Annotated[list[str] | None, setting("target")] = None,
    level: Annotated[str | None, setting("level")] = None,
    vocab_size: Annotated[int | None, setting("vocab_size")] = None,
    cell: Annotated[str | None, setting("cell")] = None,
    hidden_size: Annotated[int | None, setting("hidden_size")] = None,
    num_layers: Annotated[int | None, setting("num_layers")] = None,
    lr: Annotated[float | None, setting("lr")] = None,
    batch_size: Annotated[int | None, setting("batch_size")] = None,
    seq_len: Annotated[int | None, setting("seq_len", "--bptt")] = None,
    epochs: Annotated[int | None, setting("epochs")] = None,
    max_seconds: Annotated[float | None, setting("max_seconds")] = None,
    seed: Annotated[int | None, setting("seed")] = None,
    device: Annotated[str | None, setting("device")] = None,
    devices: Annotated[
        int,
        typer.Option(
            min=1, help="Number of processes that share each batch, one for each GPU with CUDA."
        ),
    ] = 1,
    set_: SetOption = None,
    json: JsonOption = False,
) -> None:
    """Train a model; without arguments, on the Python manuals.

    The default training takes three minutes.

    Precedence of settings: defaults < --config < --set < named options.

    \b
    lmtrain train
    lmtrain train novel.txt --level char --hidden-size 512
    lmtrain train --config shakespeare-char-3min --epochs 5 --out runs/short
    lmtrain train reviews.tsv --task classify
    lmtrain train train.conll --task tag --valid dev.conll
    lmtrain train train.de --target train.en --task translate
    lmtrain train chorales.npz --task frames
    lmtrain train --resume runs/short
    lmtrain train --devices 2
    """
    overrides = chosen_settings(locals(), set_ or [])
    chosen = None
    if resume:
        out = _run_to_resume(corpus or [], out, config)
    else:
        chosen = load_settings(corpus, config, overrides)
    # torch is imported only here, so that wrong settings are reported at once.
    from lmtrain.training import launcher
    from lmtrain.training.run import new_run_path, run_training

    if devices > 1 and not torchrun.is_worker():
        out_option = ["--out", str(new_run_path(chosen))] if chosen and not out else []
        exit_quietly_on_broken_pipe()
        launcher.launch(_with_option(sys.argv[1:], out_option), devices)
        return
    if devices > 1:
        launcher.require_size(devices)
    summary = run_training(chosen, out, resume=resume, overrides=overrides if resume else None)
    exit_quietly_on_broken_pipe()
    if not torchrun.is_rank_zero():
        return
    if json:
        _print_json(summary)
    else:
        _print_text(summary)


def _with_option(arguments: list[str], option: list[str]) -> list[str]:
    """The arguments of lmtrain with an option of its command."""
    # Directly after the command, since arguments after -- are not options. The options before the
    # command have one value each.
    command = 0
    while arguments[command].startswith("-"):
        command += 1 if "=" in arguments[command] else 2
    return [*arguments[: command + 1], *option, *arguments[command + 1 :]]


def _run_to_resume(runs: list[str], out: Path | None, config: str | None) -> Path:
    if config:
        raise ConfigError(
            "--config cannot be combined with --resume: a run keeps its settings",
            "change some of them by named options or --set",
        )
    if len(runs) + (out is not None) != 1:
        raise ConfigError("--resume takes one run", "usage: lmtrain train --resume RUN")
    return out or Path(runs[0])


def _print_json(summary: "Summary") -> None:
    unit, metrics = summary.task.unit, summary.task.metrics
    best = summary.best or {}
    baseline = summary.baseline.figures if summary.baseline else {}
    print_json(
        "lmtrain.train/1",
        {
            "run": str(summary.run),
            "steps": summary.steps,
            unit: summary.progress.count,
            "seconds": summary.seconds,
            f"{unit}_per_second": summary.count_per_second,
            "metric": metrics.headline,
            "value": best.get(metrics.headline),
            "best_step": summary.progress.best_step,
            "valid": best,
            "baseline": baseline,
            "parameters": summary.task.model.num_parameters,
            **summary.task.data.sizes(),
        },
    )


def _print_text(summary: "Summary") -> None:
    task, progress = summary.task, summary.progress
    rows = [
        (
            "trained",
            f"{summary.steps:,} steps, {progress.count:,} {task.unit} in "
            f"{summary.seconds:,.0f} s; training steps alone: "
            f"{summary.count_per_second:,.0f} {task.unit}/s",
        )
    ]
    if summary.best is not None and summary.baseline is not None:
        rows += [
            ("validation", f"{task.metrics.line(summary.best)} at step {progress.best_step:,}"),
            ("baseline", f"{task.metrics.line(summary.baseline.figures)}, {task.baseline_name}"),
        ]
    if _is_worse_than_baseline(summary):
        longer = "a larger --max-seconds" if summary.is_out_of_time else "more --epochs"
        screen.note(f"warning: worse than the baseline: train longer, such as with {longer}")
    rows += [
        ("run", str(summary.run)),
        ("next", f"lmtrain {task.command} {summary.run}"),
        ("", f"lmtrain evaluate {summary.run}"),
        ("", f"tensorboard --logdir {summary.run}/events"),
    ]
    width = max(len(name) for name, _ in rows)
    for name, text in rows:
        print(f"{name:<{width}}  {text}")


def _is_worse_than_baseline(summary: "Summary") -> bool:
    if summary.best is None or summary.baseline is None:
        return False
    metrics = summary.task.metrics
    return metrics.cost(summary.best) > metrics.cost(summary.baseline.figures)
