"""The rules of the house, held by reading its code and its papers."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import lmtrain

ROOT = Path(lmtrain.__file__).parents[1]
PACKAGE = ROOT / "lmtrain"
MODULES = sorted(
    path for path in PACKAGE.rglob("*.py") if path.name not in ("__init__.py", "__main__.py")
)
ROW = re.compile(r"^\| (\d) \| `([\w/]+\.py)` \|", re.MULTILINE)
MAP = [
    (int(layer), place)
    for layer, place in ROW.findall((ROOT / "docs" / "architecture.md").read_text("utf-8"))
]
NOT_OUR_WORDS = {
    "ntoken", "ninp", "nhid", "nlayers", "emsize", "n_embd", "bsz", "block_size", "seq_length",
    "ppl", "bpc", "tok_s", "iter_num", "ckpt", "out_dir", "hid", "hx", "clip_grad",
}  # fmt: skip


def place(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def test_the_map_lists_exactly_the_modules_there_are():
    assert sorted(name for _, name in MAP) == sorted(place(path) for path in MODULES)


def imported(path: Path) -> set[str]:
    """What a module imports of lmtrain anywhere in it, for use at run time."""
    names = set()
    tree = ast.parse(path.read_text("utf-8"))
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {name for name in names if name.startswith("lmtrain.")}


def targets(name: str) -> list[str]:
    """The map's rows that an imported name stands for."""
    relative = name.removeprefix("lmtrain.").replace(".", "/")
    rows = [row for _, row in MAP]
    if f"{relative}.py" in rows:
        return [f"{relative}.py"]
    return (
        [row for row in rows if row.startswith(f"{relative}/")] if name == "lmtrain.cells" else []
    )


def floor(place: str) -> str:
    """The folder of the package that a module is in, however deep; none for those beside them."""
    return place.rpartition("/")[0].partition("/")[0]


@pytest.mark.parametrize("path", MODULES, ids=place)
def test_imports_point_down_the_map(path):
    rows = [name for _, name in MAP]
    layers = {name: layer for layer, name in MAP}
    own = place(path)
    for name in imported(path):
        for target in targets(name):
            assert layers[target] < layers[own] or (
                floor(target) == floor(own)
                and layers[own] != 6
                and rows.index(target) < rows.index(own)
            ), f"{own} imports {target}"


@pytest.mark.parametrize("path", [p for p in MODULES if dict(map(reversed, MAP))[place(p)] < 3],
                         ids=place)  # fmt: skip
def test_below_layer_three_there_is_no_torch(path):
    tree = ast.parse(path.read_text("utf-8"))
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        assert not any(name.split(".")[0] in ("torch", "safetensors") for name in names)


def test_help_and_wrong_settings_import_no_torch():
    code = (
        "import sys, lmtrain.cli.main as m\n"
        "sys.argv[1:] = ['train', '--set', 'train.seqlen=3']\n"
        "try: m.main()\n"
        "except SystemExit as end: assert end.code == 2\n"
        "assert not {'torch', 'tensorboard', 'safetensors'} & set(sys.modules)\n"
    )

    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, capture_output=True)


def calls(path: Path):
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Call):
            yield node


WRITING = {
    "write_text",
    "write_bytes",
    "unlink",
    "rename",
    "replace",
    "mkdir",
    "touch",
    "rmdir",
    "rmtree",
}


@pytest.mark.parametrize("path", [p for p in MODULES if p.name != "disk.py"], ids=place)
def test_only_disk_py_changes_files(path):
    for call in calls(path):
        name = ast.unparse(call.func).rpartition(".")[2]
        if ast.unparse(call.func).startswith("disk."):
            continue
        is_text = name == "replace" and (len(call.args) == 2 or isinstance(call.func, ast.Name))
        assert name not in WRITING or is_text, ast.unparse(call)
        if name == "open":
            modes = [*call.args[-1:], *(k.value for k in call.keywords if k.arg == "mode")]
            assert not any(
                isinstance(mode, ast.Constant) and set(str(mode.value)) & set("wax+")
                for mode in modes
            ), ast.unparse(call)


@pytest.mark.parametrize("path", MODULES, ids=place)
def test_nothing_is_unpickled_or_evaluated(path):
    source = path.read_text("utf-8")
    tree = ast.parse(source)
    used = {ast.unparse(call.func) for call in calls(path)}
    modules = {
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for alias in node.names
    }

    assert not used & {"eval", "exec", "torch.load", "yaml.load", "import_module", "__import__"}
    assert not modules & {"pickle", "shelve", "marshal", "dill"}


@pytest.mark.parametrize("path", MODULES, ids=place)
def test_one_word_for_one_thing(path):
    names = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Name):
            names.add(node.id)
        elif isinstance(node, ast.arg):
            names.add(node.arg)
        elif isinstance(node, ast.Attribute):
            names.add(node.attr)

    assert not names & NOT_OUR_WORDS


@pytest.mark.parametrize("path", MODULES, ids=place)
def test_one_screen(path):
    source = path.read_text("utf-8")
    assert source.count("\n") <= 400
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            first = node.body[1] if ast.get_docstring(node) and len(node.body) > 1 else node.body[0]
            assert (node.end_lineno or 0) - first.lineno < 60, f"{node.name} is too long"


@pytest.mark.parametrize("path", sorted(ROOT.glob("*.md")) + sorted((ROOT / "docs").glob("*.md")),
                         ids=lambda path: path.name)  # fmt: skip
def test_links_resolve(path):
    for target in re.findall(r"\]\(([^)#]+)\)", path.read_text("utf-8")):
        if "://" not in target:
            assert (path.parent / target).exists(), target


def test_public_names_are_documented():
    for name in lmtrain.__all__:
        assert getattr(lmtrain, name).__doc__


def test_the_package_names_its_rooms():
    for room in ("text/", "cells/", "kernels/", "model/", "training/", "api", "cli/"):
        assert f"\n{room}" in (lmtrain.__doc__ or "")
