"""`lmtrain gradients`: how gradients vanish or explode through time."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lmtrain import config as configuration
from lmtrain import files, screen
from lmtrain.cli import gradient_figure, pictures
from lmtrain.cli.loading import DeviceOption, load_user_cell, load_with
from lmtrain.cli.output import JsonOption, print_json, print_table, shown
from lmtrain.cli.settings import SetOption, chosen_settings
from lmtrain.errors import ConfigError, TextError

if TYPE_CHECKING:
    from lmtrain.tasks.base import Trained
    from lmtrain.tasks.gradient_norms import LagNorms, Quartiles

_SHOWN_LAGS = [base * 10**power for power in range(6) for base in (1, 2, 5)]
_FORMATS = ("png", "svg")


@dataclass(frozen=True)
class Training:
    """The gradient norms of a training, as its metrics have them.

    Args:
        clip: the norm, l2 or l1.
        max_grad_norm: the limit of the norm; None for none.
        steps: updates done, at each line.
        grad_norms: the mean norm before clipping over the updates of each line.
        clipped_fractions: the fraction of them whose gradient was clipped.
    """

    clip: str
    max_grad_norm: float | None
    steps: list[int]
    grad_norms: list[float]
    clipped_fractions: list[float]


@dataclass(frozen=True)
class Network:
    """Measurements of a network.

    Args:
        name: the run or the cell.
        cell: the name of its cell.
        text: the name of the text.
        norms: gradient norms of single predictions over lags.
        training: gradient norms during training; None for a new network or a run without metrics.
    """

    name: str
    cell: str
    text: str
    norms: "list[LagNorms]"
    training: Training | None = None


def command(
    paths: Annotated[
        list[str] | None,
        typer.Argument(
            help="One or more runs or checkpoints, then text: files, globs, - (standard input) or "
            "corpora; without text, the runs' own validation text. With --cell, text only; "
            "without any, the Python manuals.",
            metavar="[RUN]... [FILE]...",
            show_default=False,
        ),
    ] = None,
    cell: Annotated[
        str | None,
        typer.Option(
            help="Measure new networks instead of runs, one for each of these cells.",
            metavar="NAME,NAME...",
            show_default=False,
        ),
    ] = None,
    lags: Annotated[int, typer.Option(min=1, help="Maximum number of time steps back.")] = 100,
    out: Annotated[
        Path | None,
        typer.Option(help="Draw a figure and write NAME.png and NAME.svg.", metavar="NAME"),
    ] = None,
    set_: SetOption = None,
    device: DeviceOption = "auto",
    json: JsonOption = False,
) -> None:
    """Show how gradients vanish or explode through time.

    \b
    lmtrain gradients runs/novel
    lmtrain gradients runs/novel-rnn runs/novel-lstm other.txt --out figure
    lmtrain gradients --cell rnn,gru,lstm novel.txt --set model.hidden_size=100
    """
    if out:
        # A missing matplotlib is reported before the work, not after it.
        pictures.new_figure("--out", 1, 1)
        pictures.require_no_folder("--out", out)
    paths = paths or []
    if cell is None:
        networks = _measure_runs(paths, set_ or [], lags, device)
    else:
        networks = _measure_cells(cell.split(","), paths, set_ or [], lags, device)
    if out:
        _draw(networks, out)
    if json:
        _print_json(networks, lags)
    else:
        _print_text(networks, lags)


def _measure_runs(
    paths: list[str], assignments: list[str], lags: int, device: str
) -> list[Network]:
    if not paths:
        raise ConfigError(
            "no run is given",
            "usage: lmtrain gradients RUN, or: lmtrain gradients --cell rnn,lstm FILE",
        )
    if assignments:
        raise ConfigError("--set works with --cell only: a run has its own settings")
    runs = [path for index, path in enumerate(paths) if not index or files.is_folder(path)]
    texts = [path for path in paths if path not in runs]
    networks = []
    for run in dict.fromkeys(runs):
        model = load_with("gradient_norms", run, device, feature="gradients")
        text = model.read(texts) if texts else _validation_text(run, model)
        norms = model.gradient_norms(text, lags)
        networks.append(
            Network(run, model.config.model.cell, text.name, norms, _training_of(model))
        )
    return networks


def _validation_text(run: str, model: "Trained") -> Any:
    texts = model.own_data(("valid",))
    if "valid" not in texts:
        raise TextError(
            f"{run} was trained without validation text", f"try: lmtrain gradients {run} FILE"
        )
    return texts["valid"]


def _training_of(model: "Trained") -> Training | None:
    """Gradient norms during the training of a model; None without its metrics."""
    from lmtrain.training.logger import read_train_metrics

    lines = [
        (step, norm, clipped)
        for step, figures in read_train_metrics(model.path.parent.parent)
        if isinstance(norm := figures.get("grad_norm"), float)
        and isinstance(clipped := figures.get("clipped_fraction"), float)
    ]
    if not lines:
        return None
    rule = model.config.optimizer
    steps, norms, clipped_fractions = map(list, zip(*lines, strict=True))
    return Training(
        rule.clip,
        rule.max_grad_norm,
        steps,
        norms,
        clipped_fractions,
    )


def _measure_cells(
    cells: list[str], texts: list[str], assignments: list[str], lags: int, device: str
) -> list[Network]:
    overrides = chosen_settings({}, assignments) | ({"data.train": texts} if texts else {})
    recipe = None if texts else configuration.DEFAULT_RECIPE
    loaded = [configuration.load(recipe, overrides | {"model.cell": cell}) for cell in cells]
    chosen = {config.model.cell: config for config in loaded}
    for cell, config in chosen.items():
        if config.data.task != "language-model":
            raise ConfigError(f"gradients does not work with data.task = {config.data.task}")
        if config.data.labelled:
            raise ConfigError("gradients does not work with data.labelled = true")
        load_user_cell({"model.cell": cell})
    # torch is imported only here, so that wrong settings are reported at once.
    from lmtrain.cells import cell_class
    from lmtrain.device import choose
    from lmtrain.tasks.gradient_norms import gradient_norms
    from lmtrain.tasks.registry import task_of

    for cell in chosen:
        cell_class(cell)
    chosen_device = choose(device)
    first = next(iter(chosen.values()))
    task = task_of(first)
    data: Any = task.read(first)
    text, networks = data.texts["train"], []
    for cell, config in chosen.items():
        model: Any = task.build(config, data).to(chosen_device)
        if found := task.initialize(config, model, data):
            screen.note(found)
        networks.append(Network(cell, cell, text.name, gradient_norms(model, text.ids, lags)))
    return networks


def _draw(networks: Sequence[Network], out: Path) -> None:
    figure = gradient_figure.drawn(
        {each.name: each.norms for each in networks},
        {
            each.name: (each.training.grad_norms, each.training.max_grad_norm)
            for each in networks
            if each.training
        },
    )
    stem = out.with_suffix("") if out.suffix[1:] in _FORMATS else out
    for suffix in _FORMATS:
        path = stem.with_name(f"{stem.name}.{suffix}")
        files.write(path, pictures.to_bytes(figure, suffix, "--out"))


def _print_json(networks: Sequence[Network], lags: int) -> None:
    print_json(
        "lmtrain.gradients/1",
        {"lags": list(range(lags + 1)), "networks": [_entry(each) for each in networks]},
    )


def _entry(network: Network) -> dict[str, Any]:
    return {
        "name": network.name,
        "cell": network.cell,
        "text": network.text,
        "positions": len(network.norms[0].norms),
        "states": [
            {
                "layer": each.layer,
                "part": each.part,
                "half_lag": each.half_lag,
                "norm": _lists(each.absolute),
                "relative": _lists(each.relative),
            }
            for each in network.norms
        ],
        "training": network.training and vars(network.training),
    }


def _lists(quartiles: "Quartiles") -> dict[str, list[float]]:
    return {
        "lower_quartile": quartiles.lower.tolist(),
        "median": quartiles.median.tolist(),
        "upper_quartile": quartiles.upper.tolist(),
    }


def _print_text(networks: Sequence[Network], lags: int) -> None:
    sources: dict[str, list[str]] = {}
    for network in networks:
        source = f"{len(network.norms[0].norms)} positions of {network.text}"
        sources.setdefault(source, []).append(network.name)
    print("Median norm of the gradient of −log P of one token, relative to lag 0:")
    for source, names in sources.items():
        print(shown(f"{source}: {', '.join(names)}"))
    print()
    shown_lags = [lag for lag in _SHOWN_LAGS if lag <= lags]
    rows = [["", *(f"lag {lag}" for lag in shown_lags), "half is gone"]]
    for network in networks:
        for each in network.norms:
            median, half = each.relative.median, each.half_lag
            when = _steps("not within", lags) if half is None else _steps("after", half)
            name = f"{network.name}, layer {each.layer}, {each.part.replace('_', ' ')}"
            rows.append([name, *(f"{median[lag]:.2g}" for lag in shown_lags), when])
    print_table(rows)
    if trained := {each.name: each.training for each in networks if each.training}:
        print("\nGradient norm in training, before clipping, from metrics.jsonl:\n")
        print_table([_HEAD, *(_row(name, training) for name, training in trained.items())])


def _steps(when: str, count: int) -> str:
    return f"{when} {count} step{'' if count == 1 else 's'}"


_HEAD = ["", "lowest", "quartile", "median", "quartile", "highest", "limit", "clipped", "updates"]


def _row(name: str, training: Training) -> list[str]:
    import numpy as np

    quartiles = np.quantile(training.grad_norms, (0, 0.25, 0.5, 0.75, 1))
    limit = "none" if training.max_grad_norm is None else f"{training.max_grad_norm:g}"
    updates = np.diff(training.steps, prepend=0)
    clipped = float(np.average(training.clipped_fractions, weights=updates))
    return [
        name,
        *(f"{each:.3g}" for each in quartiles),
        limit,
        f"{100 * clipped:.1f} %",
        f"{training.steps[-1]:,}",
    ]
