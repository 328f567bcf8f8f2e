"""Pictures for the commands that draw, by matplotlib where it is installed."""

import io
from typing import TYPE_CHECKING

from lmtrain.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def blank(option: str, width: float, height: float) -> "Figure":
    """A figure without anything in it.

    Args:
        option: the option that asked for a picture.
        width: in inches.
        height: in inches.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError(
            f"{option} needs matplotlib, which is not installed", "try: pip install 'lmtrain[plot]'"
        ) from None
    return Figure(figsize=(width, height), layout="constrained")


def encoded(figure: "Figure", kind: str, option: str) -> bytes:
    """The figure as a file of that kind.

    Args:
        figure: what is drawn.
        kind: png, svg or pdf.
        option: the option that asked for it.

    Raises:
        ConfigError: matplotlib does not know the kind.
    """
    picture = io.BytesIO()
    # A date would make two pictures of the same numbers differ.
    metadata = {"Date": None} if kind == "svg" else None
    try:
        figure.savefig(picture, format=kind or "png", metadata=metadata)
    except ValueError as error:
        raise ConfigError(f"{option}: {error}") from None
    return picture.getvalue()
