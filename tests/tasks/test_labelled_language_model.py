"""What is special to texts that follow a label."""

import pytest
from example_tasks import settings, write

import lmtrain
from lmtrain.data.tokenizer import build_tokenizer
from lmtrain.errors import CheckpointError, ConfigError, TextError
from lmtrain.tasks.labelled_language_model import LabelledLanguageModelling
from lmtrain.training.run import run_training


def test_a_message_lists_some_of_many_labels(tmp_path):
    (tmp_path / "train.tsv").write_text("".join(f"label {n}\tw{n % 3}\n" for n in range(3000)))
    places = [str(tmp_path / "train.tsv")]
    chosen = settings(
        "labelled", {"data.train": places, "data.valid": places}, train__max_steps=1,
        train__batch_size=3000,
    )  # fmt: skip
    run_training(chosen, tmp_path / "run", is_quiet=True)
    model = lmtrain.load(tmp_path / "run")

    for sampled in (lambda: model.stream(), lambda: model.sample("none")):
        with pytest.raises(ConfigError) as caught:
            sampled()
        assert "labels: label 0, label 1, label 10, " in str(caught.value)
        assert str(caught.value).endswith("and 2,990 more")


def test_texts_fewer_than_the_least_count_of_a_character_are_refused(tmp_path):
    chosen = settings(
        "labelled", write("labelled", tmp_path), data__level="char", data__min_count=13
    )

    with pytest.raises(TextError, match=r"has 12 texts: .* data\.min_count = 13\n"):
        LabelledLanguageModelling.read(chosen)


def test_a_checkpoint_whose_texts_cannot_end_is_refused():
    contents = {
        "tokenizer.json": build_tokenizer(["ab"], "char").to_json(),
        "labels.json": '{"labels": ["a", "b"]}',
    }

    class Files:
        def text(self, name):
            return contents[name]

    with pytest.raises(CheckpointError, match=r"^tokenizer\.json is damaged: it has no newline$"):
        LabelledLanguageModelling.restore(Files(), settings("labelled", {}))


def test_characters_of_other_texts_are_unknown_and_named(tmp_path, capsys):
    places = write("labelled", tmp_path)
    valid, label = tmp_path / "valid.tsv", (tmp_path / "train.tsv").read_text().split("\t")[0]
    valid.write_text(f"{label}\tžluť\n{label}\tž\n")

    data = LabelledLanguageModelling.read(settings("labelled", places, data__level="char"))

    name = places["data.valid"][0]
    assert data.splits["train"].unknown_characters == {}
    assert data.splits["valid"].unknown_characters["ž"] == 2
    assert capsys.readouterr().err.startswith(f"warning: {name}: ")
    task = LabelledLanguageModelling
    config = settings("labelled", places, data__level="char")
    measured = task.evaluate_examples(task.build(config, data), data, data.splits["valid"], 8)
    assert measured.oov == sum(data.splits["valid"].unknown_characters.values())
    assert measured.characters == measured.count == len("žluť\nž\n")


def test_unknown_words_have_the_characters_of_the_text(tmp_path):
    (tmp_path / "train.tsv").write_text("a\tone two\nb\ttwo\n" * 5)
    (tmp_path / "valid.tsv").write_text("a\tone  unheard\nb\ttwo\n")
    places = {f"data.{name}": [str(tmp_path / f"{name}.tsv")] for name in ("train", "valid")}
    config, task = settings("labelled", places), LabelledLanguageModelling

    data = task.read(config)
    measured = task.evaluate_examples(task.build(config, data), data, data.splits["valid"], 8)

    assert measured.oov == 1
    assert measured.characters == len("one  unheard\ntwo\n")


def test_measuring_gradients_means_nothing_for_texts_with_labels():
    with pytest.raises(ConfigError, match=r"log_gradients = 5 means nothing with data\.labelled"):
        settings("labelled", {}, train__log_gradients=5)
