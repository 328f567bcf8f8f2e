"""What is special to tagging."""

import json

import pytest
import torch
from example_tasks import settings, task, write
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

import lmtrain
from lmtrain.data.conll import Sentence
from lmtrain.errors import ConfigError, TextError
from lmtrain.tasks.tag import Tagging
from lmtrain.training.run import run_training

cell = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=5)


class Files:
    """The files of a checkpoint."""

    def __init__(self, data):
        self.text = data.files().__getitem__


@hypothesis_settings(deadline=None)
@given(st.lists(cell, min_size=1, max_size=9), st.booleans())
def test_every_training_token_is_known(tokens, lowercase):
    chosen = settings("tag", {}, data__lowercase=lowercase)
    tokens = [*tokens, "New York", "ΟΔΟΣ", "x" * 1000]
    tags = ["O", *"B" * (len(tokens) - 1)]

    data = Tagging.build_vocabularies([Sentence(tuple(tokens), tuple(tags))], chosen)

    is_space = [not token.split() for token in tokens]
    unknown = data.ids(tokens) == data.tokenizer.unk_id
    assert unknown.tolist() == [
        space or token.lower() == "<unk>" for space, token in zip(is_space, tokens, strict=True)
    ]
    restored = Tagging.restore(Files(data), chosen)
    assert restored.ids(tokens).tolist() == data.ids(tokens).tolist()
    assert restored.tags == data.tags == ["B", "O"]


def test_characters_that_grow_in_normalization_are_cut_after_it():
    chosen = settings("tag", {}, model__characters=True, data__nfc=True)
    sentence = Sentence(("\u095c" * 11, "a"), ("O", "B"))

    data = Tagging.build_vocabularies([sentence], chosen)

    assert data.ids(sentence.tokens).shape == (2, 21)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tagger that has learned which word has which tag."""
    folder = tmp_path_factory.mktemp("tag")
    lines = "new O\nNew B-LOC\nYork I-LOC\nfrom O\nEU B-ORG\n"
    (folder / "train.conll").write_text(f"{lines}\n" * 30)
    chosen = settings(
        "tag", {"data.train": [str(folder / "train.conll")]}, train__max_steps=40,
        train__eval_every=40, model__hidden_size=12,
    )  # fmt: skip
    summary = run_training(chosen, folder / "run", is_quiet=True)
    assert summary.best["span_f1"] == 1
    return lmtrain.load(folder / "run")


def test_sentences_are_texts_or_lists_of_tokens_and_may_be_empty(model):
    text, tokens, empty, blank = model.predict(["from New York", ["from", "New", "York"], [], " "])

    assert text == tokens
    assert text.tags == ["O", "B-LOC", "I-LOC"]
    assert text.line() == "from\tO\nNew\tB-LOC\nYork\tI-LOC\n"
    assert all(0.3 < probability <= 1 for probability in text.probabilities)
    assert text.fields()["spans"] == [{"kind": "LOC", "first": 1, "end": 3, "text": "New York"}]
    assert (empty.line(), blank.tags) == ("", [])


def test_a_token_with_white_space_in_it_stays_one(model):
    (found,) = model.predict([["from", "New York", "EU"]])

    assert found.tokens == ["from", "New York", "EU"]
    assert len(found.tags) == 3


@pytest.mark.parametrize("sentences", ["a b", [1], [["a", 1]], [{"a"}], [b"a"]])
def test_what_is_no_list_of_sentences_is_refused(model, sentences):
    with pytest.raises(ConfigError, match=r"^predict takes"):
        list(model.predict(sentences))


def test_a_tag_that_training_does_not_have_is_refused(model, tmp_path):
    (tmp_path / "new.conll").write_text("a\tB-NEW\n")

    with pytest.raises(TextError, match=r"new\.conll: the label 'B-NEW' is not in the training"):
        model.read([str(tmp_path / "new.conll")])


def test_tags_are_stored_in_the_order_of_their_ids(model):
    assert json.loads((model.path / "labels.json").read_text())["labels"] == [
        "B-LOC", "B-ORG", "I-LOC", "O",
    ]  # fmt: skip


def test_the_baseline_takes_the_most_frequent_tag_of_each_token(tmp_path):
    train, valid = "a\tB-X\nb\tO\na\tB-X\na\tO\nb\tO\nb\tO\n", "a\tB-X\nb\tI-X\nc\tO\n"
    places = {}
    for split, text in (("train", train + "c\tI-X\n"), ("valid", valid)):
        (tmp_path / split).write_text(text)
        places[f"data.{split}"] = [str(tmp_path / split)]

    found = task(settings("tag", places)).baseline("valid")

    # Predicted are B-X, O and I-X: two spans. Right are B-X, I-X and O: one, which is longer.
    assert (found.count, found.correct) == (3, 1)
    assert (found.predicted, found.true, found.matched) == (2, 1, 0)


def test_a_preview_shows_what_is_wrong(tmp_path):
    found = task(settings("tag", write("tag", tmp_path)))
    with torch.no_grad():
        found.model.head.weight.zero_()
        found.model.head.bias.copy_(torch.tensor([1.0, 0, 0, 0]))
    assert found.data.tags[0] == "B-X"

    first, *_ = found.preview(0).splitlines()

    assert first == ("w0/B-X (correct: O) w1/B-X w2/B-X (correct: I-X) w3/B-X (correct: B-Y)")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"data__level": "char"}, "data.level = char means nothing with data.task = tag"),
        ({"data__splitter": "whitespace"}, "data.splitter = whitespace means nothing"),
        ({"model__pooling": "max"}, "model.pooling = max means nothing with data.task = tag"),
        ({"data__target": ["x"]}, "data.target = x means nothing with data.task = tag"),
    ],
)
def test_what_means_nothing_for_tags_is_refused(changes, told):
    with pytest.raises(ConfigError, match=told):
        settings("tag", {}, **changes)
