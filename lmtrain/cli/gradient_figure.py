"""The figure of `lmtrain gradients`: norms over lags, and their distribution in training."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from lmtrain.cli import pictures

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from lmtrain.tasks.gradient_norms import LagNorms

_SYMBOLS = {"hidden": "a", "cell_state": "c"}
# Medians below this fraction of lag 0 are not shown.
_LOWEST_SHOWN = 1e-8


def drawn(
    networks: Mapping[str, Sequence["LagNorms"]],
    trainings: Mapping[str, tuple[Sequence[float], float | None]],
) -> "Figure":
    """A figure with a panel for each layer and part of the state, and one for training.

    Args:
        networks: norms over lags, by the name of the network.
        trainings: gradient norms during training and their limit, by the name of the network.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    every = [each for norms in networks.values() for each in norms]
    layers = max(each.layer for each in every)
    parts = list(dict.fromkeys(each.part for each in every))
    rows = len(parts) + bool(trainings)
    # The panels of a single layer form one row.
    shape = (1, rows) if layers == 1 else (rows, layers)
    figure = pictures.new_figure("--out", 5 * shape[1], 4 * shape[0])
    panels = figure.subplots(*shape, squeeze=False).reshape(rows, layers)
    colors = {name: f"C{index}" for index, name in enumerate(networks)}
    for index, part in enumerate(parts):
        for layer in range(1, layers + 1):
            _draw_norms(panels[index, layer - 1], networks, colors, layer, part)
    of_norms = list(panels[: len(parts)].flat)
    bottom, top = zip(*(axes.get_ylim() for axes in of_norms), strict=True)
    for axes in of_norms:
        axes.set_ylim(max(min(bottom), _LOWEST_SHOWN), max(top))
    if trainings:
        _draw_trainings(panels[-1, 0], trainings, colors)
        for axes in panels[-1, 1:]:
            axes.set_axis_off()
    panels[0, 0].legend()
    return figure


def _draw_norms(
    axes: "Axes",
    networks: Mapping[str, Sequence["LagNorms"]],
    colors: Mapping[str, str],
    layer: int,
    part: str,
) -> None:
    for name, norms in networks.items():
        for each in (each for each in norms if (each.layer, each.part) == (layer, part)):
            relative = each.relative
            lags = range(len(relative.median))
            axes.plot(lags, relative.median, color=colors[name], label=name)
            axes.fill_between(
                lags, relative.lower, relative.upper, color=colors[name], alpha=0.15, linewidth=0
            )
    axes.set_yscale("log")
    axes.axhline(0.5, color="gray", linewidth=0.8, linestyle=":")
    axes.grid(visible=True, alpha=0.3)
    symbol = _SYMBOLS.get(part, part)
    axes.set(
        title=f"layer {layer}, {part.replace('_', ' ')}",
        xlabel="lag k, steps back",
        ylabel=f"‖∂L⟨t⟩/∂{symbol}⟨t−k⟩‖ relative to lag 0",
    )


def _draw_trainings(
    axes: "Axes",
    trainings: Mapping[str, tuple[Sequence[float], float | None]],
    colors: Mapping[str, str],
) -> None:
    import numpy as np

    everything = [norm for norms, _ in trainings.values() for norm in norms if norm > 0]
    bins = np.geomspace(min(everything, default=1) / 1.1, max(everything, default=1), 40)
    for name, (norms, limit) in trainings.items():
        axes.hist(norms, bins.tolist(), histtype="step", color=colors[name], label=name)
        if limit is not None:
            axes.axvline(limit, color=colors[name], linestyle="--", linewidth=1)
    axes.set_xscale("log")
    axes.grid(visible=True, alpha=0.3)
    axes.set(
        title="training, with the limit (dashed)",
        xlabel="gradient norm before clipping",
        ylabel="lines of metrics",
    )
