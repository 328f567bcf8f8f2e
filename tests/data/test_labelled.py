import gzip
import json
import os

import pytest

from lmtrain.data.labelled import Example, fingerprint, read, read_texts
from lmtrain.errors import TextError

EXAMPLES = [Example("good", "I liked it"), Example("bad", "not at all"), Example("good", "é 你好")]


def written(path, text):
    path.write_text(text, encoding="utf-8", newline="")
    return str(path)


def test_lines_have_a_label_a_tab_and_a_text(tmp_path):
    text = "good\tI liked it\r\n\nbad\t not at all \ngood\té 你好\n\n"

    assert list(read([written(tmp_path / "a.tsv", text)])) == EXAMPLES


def test_a_text_may_hold_tabs(tmp_path):
    place = written(tmp_path / "a.tsv", "good\ta\tb\n")

    assert list(read([place])) == [Example("good", "a\tb")]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_json_lines(tmp_path, name):
    lines = "".join(json.dumps({"label": e.label, "text": e.text}) + "\n" for e in EXAMPLES)
    path = tmp_path / name
    path.write_bytes(gzip.compress(lines.encode()) if name.endswith("gz") else lines.encode())

    assert list(read([str(path)])) == EXAMPLES


def test_labels_in_json_may_be_numbers(tmp_path):
    place = written(tmp_path / "a.jsonl", '{"label": 1, "text": "one"}\n')

    assert list(read([place])) == [Example("1", "one")]


def test_a_folder_has_a_file_of_lines_for_each_label(tmp_path):
    written(tmp_path / "bad.txt", "not at all\n\n")
    written(tmp_path / "good.txt", "I liked it\né 你好\n")

    assert sorted(read([str(tmp_path)]), key=EXAMPLES.index) == EXAMPLES


@pytest.mark.parametrize("suffix", ["", ".txt"])
def test_the_labels_of_compressed_files_are_those_of_the_files(tmp_path, suffix):
    (tmp_path / f"good{suffix}.gz").write_bytes(gzip.compress(b"I liked it\n"))

    assert list(read([str(tmp_path)])) == [Example("good", "I liked it")]


def test_several_places_follow_each_other(tmp_path):
    places = [written(tmp_path / name, f"{name}\ttext\n") for name in ("a", "b")]

    assert [example.label for example in read(places)] == ["a", "b"]


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("a.tsv", "good\tfine\nno label here\n", "a.tsv, line 2: no tab between label and text"),
        ("a.tsv", "\tfine\n", "a.tsv, line 1: the label is empty"),
        ("a.tsv", "good\tfine\n\ngood\t \n", "a.tsv, line 3: the text is empty"),
        ("a.tsv", "\n \n", "a.tsv has no examples"),
        ("a.jsonl", '{"label": "x", "text": " "}\n', "a.jsonl, line 1: the text is empty"),
        ("a.jsonl", "{\n", "a.jsonl, line 1: not JSON"),
        ("a.jsonl", "[1]\n", "a.jsonl, line 1: label is missing or not text"),
        ("a.jsonl", '{"label": "x"}\n', "a.jsonl, line 1: text is missing or not text"),
        (
            "a.jsonl",
            '{"label": "x", "text": "\\ud800"}\n',
            "a.jsonl, line 1: the text is not valid Unicode",
        ),
        (
            "a.jsonl",
            '{"label": true, "text": "x"}\n',
            "a.jsonl, line 1: label is missing or not text",
        ),
    ],
)
def test_what_is_wrong_is_said_with_its_line(tmp_path, monkeypatch, name, text, told):
    monkeypatch.chdir(tmp_path)
    written(tmp_path / name, text)

    with pytest.raises(TextError) as caught:
        list(read([name]))

    first, *others = str(caught.value).splitlines()
    assert first == told
    assert len(others) <= 1
    form = "one object per line" if name == "a.jsonl" else "one example per line"
    assert all(line.startswith(f"  try: {form}") for line in others)


def test_an_empty_folder_has_no_examples(tmp_path):
    with pytest.raises(TextError, match="has no examples"):
        list(read([str(tmp_path)]))


def test_the_fingerprint_follows_labels_texts_and_order():
    changed = [*EXAMPLES[:2], Example("good", "other")]

    prints = {fingerprint(each) for each in (EXAMPLES, EXAMPLES[::-1], EXAMPLES[:2], changed)}

    assert len(prints) == 4
    assert fingerprint(EXAMPLES) == fingerprint(list(EXAMPLES))


def test_texts_without_labels_are_read_line_by_line(tmp_path):
    lines = written(tmp_path / "a.txt", "one \n\ntwo\tthree\n")
    objects = written(tmp_path / "a.jsonl", '{"text": "one"}\n\n{"text": "two"}\n')

    assert list(read_texts(lines)) == ["one", "", "two\tthree"]
    assert list(read_texts(objects)) == ["one", "two"]


def test_labels_and_texts_are_one_line_in_every_form(tmp_path):
    (tmp_path / "folder").mkdir()
    objects = written(tmp_path / "a.jsonl", '{"label": "very\\ngood", "text": "a\\nb\\u2028c"}\n')
    lines = written(tmp_path / "a.tsv", "very\fgood \t a\fb\u2028c\n")
    texts = written(tmp_path / "folder" / "very\ngood .txt", " a\fb\u2028c\n")

    for place in (objects, lines, str(tmp_path / "folder")):
        assert list(read([place])) == [Example("very good", "a b c")]
    for place in (objects, texts):
        assert list(read_texts(place)) == ["a b c"]


@pytest.mark.parametrize(
    ("name", "told"),
    [
        (os.fsdecode(b"\xff.txt"), r"'\\udcff\.txt' is not valid Unicode$"),
        (" .txt", r"' \.txt' has no label$"),
    ],
)
def test_a_file_name_that_is_no_label_is_refused(tmp_path, name, told):
    (tmp_path / name).write_text("fine\n")

    with pytest.raises(TextError, match=f"the file name {told}"):
        list(read([str(tmp_path)]))


def test_a_folder_has_no_label_for_hidden_files_and_any_for_others(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in (".gitkeep", ".bad.txt.swp"):
        (tmp_path / name).write_bytes(b"\0")
    written(tmp_path / "-", "a dash\n")

    assert list(read(["."])) == [Example("-", "a dash")]


def test_a_missing_file_is_not_taken_for_a_corpus():
    for name in ("nothing.tsv", "ptb", "python-docs"):
        with pytest.raises(TextError, match=f"^no text file {name}$"):
            list(read([name]))


def test_a_name_too_long_for_a_file_is_refused():
    with pytest.raises(TextError, match="File name too long"):
        list(read(["x" * 300]))
