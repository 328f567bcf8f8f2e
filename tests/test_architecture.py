"""What docs/architecture.md and CONTRIBUTING.md say of the code, checked by reading it."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import lmtrain

ROOT = Path(lmtrain.__file__).parents[1]
PACKAGE = ROOT / "lmtrain"
MODULES = sorted(
    path for path in PACKAGE.rglob("*.py") if path.name not in ("__init__.py", "__main__.py")
)
ROW = re.compile(r"^\| (\d+) \| `([\w/]+\.py)` \|", re.MULTILINE)
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


def folder(place: str) -> str:
    """The folder of the package that a module is in, however deep; none for those beside them."""
    return place.rpartition("/")[0].partition("/")[0]


def test_imports_point_down_the_map():
    rows = [name for _, name in MAP]
    layers = {name: layer for layer, name in MAP}
    wrong = []
    for path in MODULES:
        own = place(path)
        for name in imported(path):
            for target in targets(name):
                is_beside = folder(target) == folder(own) and rows.index(target) < rows.index(own)
                if not (layers[target] < layers[own] or is_beside):
                    wrong.append(f"{own} imports {target}")

    assert not wrong


def test_below_layer_three_there_is_no_torch():
    layers = {name: layer for layer, name in MAP}
    for path in (path for path in MODULES if layers[place(path)] < 3):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            used = {name.split(".")[0] for name in names}
            assert not used & {"torch", "safetensors"}, place(path)


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


def test_only_disk_py_changes_files():
    others = [path for path in MODULES if path.name != "disk.py"]
    for call in (call for path in others for call in calls(path)):
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


def test_one_word_for_one_thing():
    for path in MODULES:
        names = set()
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Name):
                names.add(node.id)
            elif isinstance(node, ast.arg):
                names.add(node.arg)
            elif isinstance(node, ast.Attribute):
                names.add(node.attr)

        assert not names & NOT_OUR_WORDS, place(path)


def headings(path: Path) -> set[str]:
    """What links to the headings of a page call them."""
    found = re.findall(r"^#+ (.*)", path.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", each).lower().replace(" ", "-") for each in found}


def test_links_resolve():
    for path in (*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")):
        for target, heading in re.findall(r"\]\(([^)#]*)#?([^)]*)\)", path.read_text("utf-8")):
            if "://" not in target:
                linked = path.parent / target if target else path
                assert linked.exists(), f"{path.name}: {target}"
                assert not heading or heading in headings(linked), f"{path.name}: {heading}"


def test_public_names_are_documented():
    for name in lmtrain.__all__:
        assert getattr(lmtrain, name).__doc__


def test_the_package_lists_its_parts():
    for part in ("data/", "cells/", "kernels/", "model/", "training/", "api", "cli/"):
        assert f"\n{part}" in (lmtrain.__doc__ or "")


def test_only_tasks_and_commands_of_language_models_know_one():
    known = {"tasks.base", "tasks.registry"}
    for path in MODULES:
        if place(path).split("/")[0] in ("tasks", "model"):
            continue
        used = {name.removeprefix("lmtrain.") for name in imported(path)}
        tasks = {name for name in used if re.match(r"(tasks|model)\.\w+$", name)}
        if place(path) not in ("cli/evaluate.py", "cli/gradients.py", "cli/tune.py"):
            wrong = {name for name in tasks if name.startswith("tasks.")} - known
            assert not wrong | (tasks & {"model.language_model"}), place(path)


def constructors():
    """Every constructor of the package with the names of its arguments."""
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if not isinstance(node, ast.ClassDef):
                continue
            if any("dataclass" in ast.unparse(each) for each in node.decorator_list):
                fields = [each for each in node.body if isinstance(each, ast.AnnAssign)]
                variables = [each for each in fields if "ClassVar" in ast.unparse(each.annotation)]
                yield f"{place(path)}: {node.name}", len(fields) - len(variables)
            for each in node.body:
                if isinstance(each, ast.FunctionDef) and each.name == "__init__":
                    arguments = each.args.args[1:] + each.args.kwonlyargs
                    yield f"{place(path)}: {node.name}", len(arguments)


def test_no_constructor_takes_more_than_eight_arguments():
    assert not {name: count for name, count in constructors() if count > 8}
