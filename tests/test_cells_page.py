"""docs/cells.md and its diagrams: what it names exists, and no cell or diagram is missing."""

import ast
import re
import runpy
from xml.etree import ElementTree

import pytest
from test_architecture import PACKAGE, ROOT

TEXT = (ROOT / "docs" / "cells.md").read_text("utf-8")
CODE = re.findall(r"\[`([\w.:]+)`\]\(\.\./lmtrain/([\w/]+\.(?:py|h))\)", TEXT)
PICTURES = ROOT / "docs" / "networks"
DRAWN = runpy.run_path(str(ROOT / "scripts" / "draw_networks.py"))["drawn"]()


def is_defined(name: str, file: str) -> bool:
    """Whether a file has a class, a function or `Class.method`, in C++ `Structure::function`."""
    source = (PACKAGE / file).read_text("utf-8")
    if file.endswith(".h"):
        structure, _, function = name.partition("::")
        pattern = rf"^template.* struct {structure} {{|^struct {structure} {{"
        return any(
            re.search(rf"\b{function}\(.*[{{;]$", body.partition("\n};")[0], re.MULTILINE)
            for body in re.split(pattern, source, flags=re.MULTILINE)[1:]
        )
    body: list[ast.stmt] = ast.parse(source).body
    for part in name.split("."):
        found = [
            each
            for each in body
            if isinstance(each, ast.ClassDef | ast.FunctionDef) and each.name == part
        ]
        if not found:
            return False
        body = found[0].body
    return True


@pytest.mark.parametrize(("name", "file"), sorted(set(CODE)))
def test_the_code_that_is_named_is_in_the_file(name, file):
    assert is_defined(name, file)


@pytest.mark.parametrize(
    ("name", "file"),
    [("GRU.forward_second", "cells/gru.py"), ("Gru::finish", "kernels/native/gru.h"),
     ("Rnn::forward", "kernels/native/gru.h"), ("GRU", "cells/rnn.py")],
)  # fmt: skip
def test_code_that_is_not_there_is_found_out(name, file):
    assert not is_defined(name, file)


def test_every_link_to_code_names_it():
    assert len(CODE) == len(re.findall(r"\]\(\.\./lmtrain/", TEXT))


def test_every_cell_and_every_kernel_is_there():
    linked = {file for _, file in CODE}
    cells = {
        path.stem
        for path in (PACKAGE / "cells").glob("*.py")
        if "@register(" in path.read_text("utf-8")
    }
    folders = (("cells", "py"), ("kernels/native", "h"), ("kernels/triton", "py"))
    expected = {
        f"{folder}/{cell}.{suffix}"
        for cell in cells
        for folder, suffix in folders
        if (PACKAGE / folder / f"{cell}.{suffix}").exists()
    }

    assert expected <= linked
    assert len(expected) >= 13


def test_every_picture_is_shown_and_has_a_description():
    shown = dict(re.findall(r"!\[(.*)\]\(networks/(\w+)\.svg\)", TEXT))

    assert sorted(shown.values()) == sorted(DRAWN)
    assert all(shown)


def test_the_pictures_are_those_that_the_script_draws():
    assert {path.name for path in PICTURES.iterdir()} == {f"{name}.svg" for name in DRAWN}
    for name, svg in DRAWN.items():
        assert (PICTURES / f"{name}.svg").read_bytes() == svg.encode()


@pytest.mark.parametrize("name", sorted(DRAWN))
def test_a_picture_is_well_formed_and_all_of_it_is_in_sight(name):
    root = ElementTree.fromstring((PICTURES / f"{name}.svg").read_bytes())
    left, top, width, height = map(float, root.attrib["viewBox"].split())
    space = "{http://www.w3.org/2000/svg}"

    assert root.tag == f"{space}svg"
    assert root.findtext(f"{space}title")
    for line in root.iter(f"{space}polyline"):
        for point in line.attrib["points"].split():
            x, y = map(float, point.split(","))
            assert left < x < left + width
            assert top < y < top + height
