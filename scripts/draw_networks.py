"""Draws the networks of docs/cells.md as docs/networks/NAME.svg.

    python scripts/draw_networks.py

The pictures are SVG with a white background, so that they are legible on dark pages too.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "docs" / "networks"
COLUMN, ROW = 100, 88
WIDTH, HEIGHT, DOTS_WIDTH = 68, 40, 44
MARGIN = 22
DOTS = "…"
INK, BORDER = "#1f2328", "#d0d7de"
FILLS = {
    "input": ("#f6f8fa", "#57606a"),
    "state": ("#ddf4ff", "#0969da"),
    "second state": ("#fff8c5", "#9a6700"),
    "output": ("#dafbe1", "#1a7f37"),
}
TITLES = {
    "one_to_one": "One to one: one input, one output",
    "one_to_many": "One to many: one input, a sequence as output, each output the next input",
    "many_to_one": "Many to one: a sequence as input, one output after its last step",
    "many_to_many": "Many to many: an output for each input",
    "encoder_decoder": "Encoder and decoder: the last state of the one is the first of the other",
    "deep": "Deep: three layers, each the input of the one above",
    "bidirectional": "Bidirectional: one layer from 1 to T, one from T to 1",
}


@dataclass(frozen=True)
class Box:
    """A labelled box, or the dots that stand for the steps left out, by its middle."""

    x: float
    y: float
    width: float = WIDTH

    @property
    def is_dots(self) -> bool:
        """Whether it stands for steps left out."""
        return self.width == DOTS_WIDTH

    @property
    def left(self) -> float:
        """Where arrows from the left end."""
        return self.x - self.width / 2

    @property
    def right(self) -> float:
        """Where arrows to the right begin."""
        return self.x + self.width / 2

    @property
    def top(self) -> float:
        """Where arrows to above begin."""
        return self.y - HEIGHT / 2

    @property
    def bottom(self) -> float:
        """Where arrows from below end."""
        return self.y + HEIGHT / 2


class Drawing:
    """Boxes, arrows and captions, written as SVG."""

    def __init__(self) -> None:
        self.boxes: list[Box] = []
        self.parts: list[str] = []

    def box(self, x: float, y: float, kind: str, symbol: str, above: str, over: str = "") -> Box:
        """A box labelled with a symbol.

        Args:
            x: its middle.
            y: its middle.
            kind: of FILLS.
            symbol: a letter.
            above: what stands above the letter to its right, `_` before a subscript; dots alone
                stand for boxes left out.
            over: an arrow over the letter, → or ←.
        """
        if above == DOTS:
            box = Box(x, y, DOTS_WIDTH)
            circles = (f'<circle cx="{x + at:g}" cy="{y:g}" r="2.5"/>' for at in (-10, 0, 10))
            self.parts.append(f'<g fill="{INK}">{"".join(circles)}</g>')
        else:
            box = Box(x, y)
            fill, stroke = FILLS[kind]
            self.parts.append(
                f'<rect x="{box.left:g}" y="{box.top:g}" width="{WIDTH}" height="{HEIGHT}" rx="7" '
                f'fill="{fill}" stroke="{stroke}" stroke-width="1.5"/>'
            )
            self._label(x, y, symbol, above, over)
        self.boxes.append(box)
        return box

    def _label(self, x: float, y: float, symbol: str, above: str, over: str) -> None:
        # The letter ends and what stands above it begins at one place, whatever the font.
        place = x + 6 - 3.5 * len(above.replace("_", ""))
        raised = re.sub(
            "_(.)(.+)", r'<tspan dy="3" font-size="9">\1</tspan><tspan dy="-3">\2</tspan>', above
        )
        self.parts.append(
            f'<text x="{place:g}" y="{y + 6:g}" text-anchor="end" font-size="21" '
            f'font-style="italic">{symbol}</text>'
            f'<text x="{place + 1:g}" y="{y - 2:g}" font-size="13">{raised}</text>'
        )
        if over:
            ends = (place - 12, place) if over == "→" else (place, place - 12)
            self.arrow((ends[0], y - 11), (ends[1], y - 11), is_small=True)

    def row(
        self, y: float, kind: str, symbol: str, times: Sequence[str], first: int = 1
    ) -> list[Box]:
        """Boxes beside each other, labelled symbol⟨time⟩, from a column on; dots for DOTS."""
        return [
            self.box(COLUMN * (first + i), y, kind, symbol, time if time == DOTS else f"⟨{time}⟩")
            for i, time in enumerate(times)
        ]

    def arrow(
        self, *points: tuple[float, float], is_dashed: bool = False, is_small: bool = False
    ) -> None:
        """A line through points with a head at its end."""
        path = " ".join(f"{x:g},{y:g}" for x, y in points)
        style = ' stroke-dasharray="5 4"' if is_dashed else ""
        head, width = ("small", "1.1") if is_small else ("head", "1.5")
        self.parts.append(
            f'<polyline points="{path}" fill="none" stroke="{INK}" stroke-width="{width}"{style} '
            f'marker-end="url(#{head})"/>'
        )

    def chain(self, boxes: Sequence[Box]) -> None:
        """An arrow from each box of a row to the next, in either direction."""
        for start, end in pairwise(boxes):
            if start.x < end.x:
                self.arrow((start.right, start.y), (end.left, end.y))
            else:
                self.arrow((start.left, start.y), (end.right, end.y))

    def rise(self, lower: Sequence[Box], upper: Sequence[Box]) -> None:
        """An arrow from each box to the one above it."""
        for start, end in zip(lower, upper, strict=True):
            if not start.is_dots:
                self.arrow((start.x, start.top), (end.x, end.bottom))

    def feed(self, outputs: Sequence[Box], inputs: Sequence[Box]) -> None:
        """A dashed arrow from each output down to the input of the step after."""
        for start, end in zip(outputs, inputs, strict=True):
            gap = start.x + COLUMN / 2
            points = ((start.right, start.y), (gap, start.y), (gap, end.y), (end.left, end.y))
            self.arrow(*points, is_dashed=True)

    def caption(self, boxes: Sequence[Box], y: float, text: str) -> None:
        """Words under the middle of some boxes of a row."""
        x = (boxes[0].x + boxes[-1].x) / 2
        self.parts.append(
            f'<text x="{x:g}" y="{y:g}" text-anchor="middle" font-size="15">{text}</text>'
        )
        self.boxes.append(Box(x, y - HEIGHT / 3))

    def svg(self, title: str) -> str:
        """The whole picture, as large as its boxes."""
        left = min(box.left for box in self.boxes) - MARGIN
        top = min(box.top for box in self.boxes) - MARGIN
        width = max(box.right for box in self.boxes) + MARGIN - left
        height = max(box.bottom for box in self.boxes) + MARGIN - top
        lines = [
            f'<svg xmlns="http://www.w3.org/2000/svg" role="img" width="{width:g}" '
            f'height="{height:g}" viewBox="{left:g} {top:g} {width:g} {height:g}" '
            f'font-family="\'Times New Roman\', Times, serif" fill="{INK}">',
            f"<title>{title}</title>",
            f"<defs>{_head('head', 8)}{_head('small', 5)}</defs>",
            f'<rect x="{left + 0.5:g}" y="{top + 0.5:g}" width="{width - 1:g}" '
            f'height="{height - 1:g}" rx="6" fill="#ffffff" stroke="{BORDER}"/>',
            *self.parts,
            "</svg>",
        ]
        return "\n".join(lines) + "\n"


def _head(name: str, size: int) -> str:
    return (
        f'<marker id="{name}" viewBox="0 0 10 10" refX="10" refY="5" markerWidth="{size}" '
        f'markerHeight="{size}" markerUnits="userSpaceOnUse" orient="auto">'
        f'<path d="M0 1L10 5L0 9z" fill="{INK}"/></marker>'
    )


def one_to_one(drawing: Drawing) -> None:
    """A single step."""
    y = drawing.row(0, "output", "ŷ", ["1"])
    a = drawing.row(ROW, "state", "a", ["0", "1"], first=0)
    x = drawing.row(2 * ROW, "input", "x", ["1"])
    drawing.chain(a)
    drawing.rise(x, a[1:])
    drawing.rise(a[1:], y)


def one_to_many(drawing: Drawing) -> None:
    """Only x⟨1⟩ is given; then each y⟨t⟩ is the next input."""
    y = drawing.row(0, "output", "ŷ", ["1", "2", DOTS, "T_y"])
    a = drawing.row(ROW, "state", "a", ["0", "1", "2", DOTS, "T_y"], first=0)
    x = drawing.row(2 * ROW, "input", "x", ["1"])
    fed = drawing.row(2 * ROW, "input", "y", ["1", DOTS, "T_y−1"], first=2)
    drawing.chain(a)
    drawing.rise(x + fed, a[1:])
    drawing.rise(a[1:], y)
    drawing.feed(y[:-1], fed)


def many_to_one(drawing: Drawing) -> None:
    """One ŷ, from the last state."""
    times = ["1", "2", "3", DOTS, "T_x"]
    y = drawing.box(5 * COLUMN, 0, "output", "ŷ", "")
    a = drawing.row(ROW, "state", "a", ["0", *times], first=0)
    x = drawing.row(2 * ROW, "input", "x", times)
    drawing.chain(a)
    drawing.rise(x, a[1:])
    drawing.rise(a[-1:], [y])


def many_to_many(drawing: Drawing) -> None:
    """One ŷ⟨t⟩ for each x⟨t⟩."""
    times = ["1", "2", "3", DOTS, "T_x"]
    y = drawing.row(0, "output", "ŷ", [*times[:-1], "T_y"])
    a = drawing.row(ROW, "state", "a", ["0", *times], first=0)
    x = drawing.row(2 * ROW, "input", "x", times)
    drawing.chain(a)
    drawing.rise(x, a[1:])
    drawing.rise(a[1:], y)


def encoder_decoder(drawing: Drawing) -> None:
    """The encoder reads all x⟨t⟩ before the decoder writes ŷ⟨1⟩."""
    y = drawing.row(0, "output", "ŷ", ["1", "2", DOTS, "T_y"], first=5)
    a = drawing.row(ROW, "state", "a", ["0", "1", "2", DOTS, "T_x"], first=0)
    s = drawing.row(ROW, "second state", "s", ["1", "2", DOTS, "T_y"], first=5)
    x = drawing.row(2 * ROW, "input", "x", ["1", "2", DOTS, "T_x"])
    fed = drawing.row(2 * ROW, "input", "y", ["1", DOTS, "T_y−1"], first=6)
    drawing.chain(a + s)
    drawing.rise(x, a[1:])
    drawing.rise(s, y)
    drawing.rise(fed, s[1:])
    drawing.feed(y[:-1], fed)
    drawing.caption(x, 2.5 * ROW, "encoder")
    drawing.caption(s, 2.5 * ROW, "decoder")


def deep(drawing: Drawing) -> None:
    """Layer l's a⟨t⟩ is layer l + 1's x⟨t⟩."""
    times = ["1", "2", "3", DOTS, "T"]
    below = drawing.row(3 * ROW, "input", "x", times)
    for layer in (1, 2, 3):
        a = [
            drawing.box(
                COLUMN * i, (3 - layer) * ROW, "state", "a",
                time if time == DOTS else f"[{layer}]⟨{time}⟩",
            )
            for i, time in enumerate(["0", *times])
        ]  # fmt: skip
        drawing.chain(a)
        drawing.rise(below, a[1:])
        below = a[1:]
    drawing.rise(below, drawing.row(-ROW, "output", "ŷ", times))


def bidirectional(drawing: Drawing) -> None:
    """Both directions of a step stand between its input and its output."""
    shift, column = WIDTH / 2 + 4, 1.65 * COLUMN
    near, end = shift / 3, 3 * column + shift + COLUMN
    forward = [drawing.box(-shift - COLUMN, 2 * ROW, "state", "a", "⟨0⟩", "→")]
    backward = [drawing.box(end, ROW, "second state", "a", "⟨T+1⟩", "←")]
    for i, time in enumerate(["1", "2", DOTS, "T"]):
        middle, above = i * column, time if time == DOTS else f"⟨{time}⟩"
        x = drawing.box(middle, 3 * ROW, "input", "x", above)
        right = drawing.box(middle - shift, 2 * ROW, "state", "a", above, "→")
        left = drawing.box(middle + shift, ROW, "second state", "a", above, "←")
        y = drawing.box(middle, 0, "output", "ŷ", above)
        if time != DOTS:
            drawing.arrow((x.x - near, x.top), (right.x, right.bottom))
            drawing.arrow((x.x + near, x.top), (left.x, left.bottom))
            drawing.arrow((right.x, right.top), (y.x - near, y.bottom))
            drawing.arrow((left.x, left.top), (y.x + near, y.bottom))
        forward.append(right)
        backward.insert(1, left)
    drawing.chain(forward)
    drawing.chain(backward)


DRAW: dict[str, Callable[[Drawing], None]] = {
    each.__name__: each
    for each in (
        one_to_one, one_to_many, many_to_one, many_to_many, encoder_decoder, deep, bidirectional,
    )
}  # fmt: skip


def drawn() -> dict[str, str]:
    """The SVG of every picture by its name."""
    pictures = {}
    for name, draw in DRAW.items():
        drawing = Drawing()
        draw(drawing)
        pictures[name] = drawing.svg(TITLES[name])
    return pictures


def main() -> None:
    """Writes the pictures."""
    FOLDER.mkdir(exist_ok=True)
    for name, svg in drawn().items():
        (FOLDER / f"{name}.svg").write_text(svg, encoding="utf-8")
        print(FOLDER / f"{name}.svg")


if __name__ == "__main__":
    main()
