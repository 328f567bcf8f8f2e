import sysconfig

import pytest

from lmtrain import files
from lmtrain.data import python_docs
from lmtrain.data.corpus import open_text

PROSE = "This sentence is about {0} alone. It has a second one, of course!"


@pytest.fixture
def library(tmp_path, monkeypatch):
    """A standard library of a few files, by their names."""
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})

    def filled(**contents: str) -> list[str]:
        for name, content in contents.items():
            path = tmp_path / f"{name.replace('__in__', '/')}.py"
            path.parent.mkdir(exist_ok=True)
            path.write_text(content, "utf-8")
        return "".join(python_docs.sentences()).splitlines()

    return filled


def documented(topic: str) -> str:
    return f'"""{PROSE.format(topic)}"""\n'


def test_docstrings_of_modules_classes_and_functions_are_read(library):
    body = "class C:\n    {}\n    async def f(self):\n        {}\n\ndef g():\n    {}\n"
    code = documented("modules") + body.format(*map(documented, ("classes", "methods", "names")))

    lines = library(a=code)

    assert sorted(lines) == sorted(
        line
        for topic in ("modules", "classes", "methods", "names")
        for line in (f"This sentence is about {topic} alone.", "It has a second one, of course!")
    )


def test_the_language_reference_is_read(library):
    topics = {"assert": PROSE.format("assert"), "number": 3}

    assert library(pydoc_data__in__topics=f"topics = {topics!r}") == [
        "This sentence is about assert alone.",
        "It has a second one, of course!",
    ]


def test_nothing_is_executed(library):
    assert len(library(a=documented("danger") + "raise SystemExit('executed')\n")) == 2


def test_a_file_that_is_no_python_is_left_out(library):
    lines = library(
        a="this is {{ a template }}", b=documented("b"), c="\0", d="'\\d'\n", e="(" * 500
    )

    assert lines[0] == "This sentence is about b alone."
    assert len(lines) == 2


def test_tests_and_installed_packages_are_left_out(library):
    outside = {f"{name}__in__a": documented("x") for name in ("test", "tests", "idlelib")}

    assert library(**outside, **{"site-packages__in__b": documented("y")}) == []


def test_a_paragraph_comes_once(library):
    assert len(library(a=documented("a"), b=documented("a"))) == 2


@pytest.mark.parametrize(
    "listing",
    ["---- ---- ---- ----", "a = b + c * d", "Only three words", ">>> print this in a shell"],
)
def test_what_is_no_prose_is_left_out(library, listing):
    lines = library(a=f'"""{listing}\n\n{PROSE.format("prose")}"""')

    assert lines[0] == "This sentence is about prose alone."
    assert len(lines) == 2


def test_lines_of_a_paragraph_are_joined(library):
    assert library(a='"""One sentence that\n   runs   on lines."""') == [
        "One sentence that runs on lines."
    ]


def test_a_docstring_that_is_no_unicode_does_no_harm(library):
    lines = library(a='"""A sentence with \\ud800 in the middle."""', b=documented("b"))

    assert "This sentence is about b alone." in lines


@pytest.mark.slow
def test_the_manuals_of_this_python_are_much_english_in_a_fixed_order():
    text = open_text(["python-docs"])
    content = "".join(text.chunks())

    assert len(content.split()) > 200_000
    assert content.count("\n") > 10_000
    assert content.endswith("\n")
    assert "\0" not in content
    assert text.fingerprint == files.sha256([content.encode()])
