"""Figures by matplotlib, where it is installed."""

import io
from pathlib import Path
from typing import TYPE_CHECKING

from lmtrain import files
from lmtrain.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def new_figure(option: str, width: float, height: float) -> "Figure":
    """An empty figure.

    Args:
        option: the option that asked for a figure, for messages.
        width: inches.
        height: inches.

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


def require_no_folder(option: str, path: Path) -> None:
    """Checks, before the work, that a picture is not to be written to a folder.

    Raises:
        ConfigError: the path is a folder.
    """
    if files.is_folder(path):
        raise ConfigError(f"{option} {path} is a folder", "give the name of a file")


def to_bytes(figure: "Figure", file_format: str, option: str) -> bytes:
    """The content of a file with the figure.

    Args:
        figure: the figure.
        file_format: png, svg or pdf.
        option: the option that asked for it, for messages.

    Raises:
        ConfigError: matplotlib does not know the format.
    """
    content = io.BytesIO()
    # With a date, two figures of the same numbers would differ.
    metadata = {"Date": None} if file_format == "svg" else None
    try:
        figure.savefig(content, format=file_format or "png", metadata=metadata)
    except ValueError as error:
        raise ConfigError(f"{option}: {error}") from None
    return content.getvalue()
