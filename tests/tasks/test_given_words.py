"""Vocabularies and word vectors that the user gives, in every task that has words."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from example_tasks import settings, write
from run_folders import load_settings

import lmtrain
from corpora import TINY
from lmtrain.errors import CheckpointError, ConfigError, TextError
from lmtrain.model.word_characters import WordCharacters
from lmtrain.tasks.adaptation import Dynamic
from lmtrain.tasks.base import load_embeddings
from lmtrain.tasks.registry import task_of
from lmtrain.training.run import run_training

WORDS = ["w3", "w0", "w7", "cat", "the"]
# The translation's vocabulary is that of its data.
WITH_VOCABULARY = ["language-model", "labelled", "tag", "tag-characters", "classify-last"]
WITH_EMBEDDINGS = [*WITH_VOCABULARY, "translate-dot", "translate-additive"]


def chosen(name, folder, **changes):
    if name != "language-model":
        return settings(name, write(name, folder), **changes)
    (folder / "text.txt").write_text(TINY)
    return load_settings(
        {
            "data.train": [str(folder / "text.txt")], "model.hidden_size": 6,
            "model.num_layers": 1, "train.batch_size": 4, "train.seq_len": 8, "train.max_steps": 8,
            "train.eval_every": 4, "train.threads": 1, "train.precision": "fp32",
        },
        **changes,
    )  # fmt: skip


@pytest.fixture
def vocabulary(tmp_path) -> Path:
    path = tmp_path / "vocabulary.txt"
    path.write_text("".join(f"{word}\n" for word in WORDS))
    return path


@pytest.fixture
def vectors(tmp_path) -> Path:
    """Of six numbers, that of the word at index n being n, n, n ..."""
    path = tmp_path / "vectors.txt"
    path.write_text("".join(f"{word}{f' {n}' * 6}\n" for n, word in enumerate(["x", *WORDS])))
    return path


def table(model) -> torch.Tensor:
    embedding = model.encoder.embedding
    return (embedding.words if isinstance(embedding, WordCharacters) else embedding).weight


@pytest.mark.parametrize("name", WITH_VOCABULARY)
def test_the_vocabulary_is_that_of_the_file(name, vocabulary, tmp_path):
    trained = lmtrain.train(
        chosen(name, tmp_path, data__vocabulary=str(vocabulary)), tmp_path / "run"
    )

    assert trained.data.tokenizer.vocabulary == ["<UNK>", "<EOS>", *WORDS]


def test_a_run_needs_the_vocabulary_no_more_and_no_other_one_changes_it(vocabulary, tmp_path):
    settled = chosen("language-model", tmp_path, data__vocabulary=str(vocabulary))
    run_training(settled, tmp_path / "run", is_quiet=True)
    shutil.copytree(tmp_path / "run", tmp_path / "other")
    more = {"train.max_steps": 12}

    vocabulary.unlink()
    run_training(out=tmp_path / "run", resume=True, overrides=more, is_quiet=True)
    vocabulary.write_text("dog\n")
    run_training(out=tmp_path / "other", resume=True, overrides=more, is_quiet=True)

    first, second = (lmtrain.load(tmp_path / name) for name in ("run", "other"))
    assert first.tokenizer.vocabulary == second.tokenizer.vocabulary == ["<UNK>", "<EOS>", *WORDS]
    assert torch.equal(table(first.model), table(second.model))


def test_a_run_without_a_checkpoint_notices_another_vocabulary(vocabulary, tmp_path):
    settled = chosen("language-model", tmp_path, data__vocabulary=str(vocabulary))
    run_training(settled, tmp_path / "run", is_quiet=True)
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    vocabulary.write_text("dog\n")

    with pytest.raises(CheckpointError, match="has changed since it started"):
        run_training(out=tmp_path / "run", resume=True, is_quiet=True)


@pytest.mark.parametrize("name", WITH_EMBEDDINGS)
def test_words_begin_with_their_vectors_and_others_as_ever(name, vectors, tmp_path):
    settled = chosen(name, tmp_path, model__embeddings=str(vectors), model__embedding_size=6)
    kind = task_of(settled)
    data = kind.read(settled)
    fresh, model = (kind.build(settled, data) for _ in range(2))

    told = load_embeddings(settled, model, data)

    words = data.tokenizer.vocabulary
    known = [word for word in words if word in WORDS]
    assert told == f"{vectors} has vectors of {len(known)} of the {len(words)} words of the " \
        "vocabulary"  # fmt: skip
    for index, row in enumerate(table(fresh).detach()):
        word = words[index] if index < len(words) else ""
        expected = torch.full((6,), 1.0 + WORDS.index(word)) if word in WORDS else row
        assert torch.equal(table(model)[index].detach(), expected)
    for key, weight in fresh.named_parameters():
        if key not in ("encoder.embedding.weight", "encoder.embedding.words.weight"):
            assert torch.equal(model.get_parameter(key), weight)


RULES = {
    "sgd": {"optimizer__name": "sgd", "optimizer__learning_rate": 0.5},
    "adamw": {"optimizer__weight_decay": 0.5, "optimizer__average": "ema"},
    "adam": {"optimizer__name": "adam", "optimizer__weight_decay": 0.5},
}


@pytest.mark.parametrize(
    ("name", "rule"), [*((name, "adamw") for name in WITH_EMBEDDINGS[:-1]),
                       ("language-model", "sgd"), ("language-model", "adam")]
)  # fmt: skip
def test_frozen_embeddings_stay_and_a_run_resumes_without_their_file(name, rule, vectors, tmp_path):
    given = {"model__embeddings": str(vectors), "model__embedding_size": 6}
    settled = chosen(name, tmp_path, model__freeze_embeddings=True, **given, **RULES[rule])
    kind = task_of(settled)
    data = kind.read(settled)
    model = kind.build(settled, data)
    load_embeddings(settled, model, data)

    run_training(settled, tmp_path / "run", is_quiet=True)
    vectors.unlink()
    more = {"train.max_steps": 12}
    run_training(out=tmp_path / "run", resume=True, overrides=more, is_quiet=True)

    trained = lmtrain.load(tmp_path / "run").model
    assert torch.equal(table(trained), table(model))
    learned = dict(model.named_parameters())
    assert all(
        not torch.equal(weight, learned[key]) or not weight.requires_grad
        for key, weight in trained.named_parameters()
    )


def test_embeddings_that_are_not_frozen_learn(vectors, tmp_path):
    settled = chosen(
        "language-model", tmp_path, model__embeddings=str(vectors), model__tied_embeddings=True
    )
    trained = lmtrain.train(settled, tmp_path / "run")

    row = table(trained.model)[trained.tokenizer.vocabulary.index("cat")].detach().numpy()
    assert 0 < np.abs(row - 4).max() < 0.5


def test_a_model_with_frozen_embeddings_adapts(vectors, tmp_path):
    settled = chosen(
        "language-model", tmp_path, model__embeddings=str(vectors), model__freeze_embeddings=True
    )
    trained = lmtrain.train(settled, tmp_path / "run")
    before = table(trained.model).clone()

    measured = trained.measure(trained.own_data()["valid"], dynamic=Dynamic(0.01, 0.0, 5))

    assert np.isfinite(measured.loss)
    assert torch.equal(table(trained.model), before)


def test_the_targets_embeddings_are_not_frozen(vectors, tmp_path):
    settled = chosen(
        "translate-additive", tmp_path, model__embeddings=str(vectors), model__embedding_size=6,
        model__freeze_embeddings=True,
    )  # fmt: skip
    kind = task_of(settled)
    model = kind.build(settled, kind.read(settled))

    frozen = {name for name, weight in model.named_parameters() if not weight.requires_grad}
    assert frozen == {"encoder.embedding.weight"}


def test_vectors_of_another_size_end_the_start_and_leave_no_run(vectors, tmp_path):
    settled = chosen("language-model", tmp_path, model__embeddings=str(vectors),
                     model__embedding_size=7)  # fmt: skip

    with pytest.raises(ConfigError, match=r"6 numbers, and model\.embedding_size is 7"):
        run_training(settled, tmp_path / "run", is_quiet=True)

    assert not (tmp_path / "run").exists()


def test_sequences_of_vectors_have_no_words(vocabulary, vectors, tmp_path):
    for changes in ({"data__vocabulary": str(vocabulary)}, {"model__embeddings": str(vectors)}):
        with pytest.raises(ConfigError, match="does not apply to vectors, only to text"):
            run_training(chosen("vectors", tmp_path, **changes), tmp_path / "run", is_quiet=True)


def test_a_vocabulary_that_is_gone_leaves_no_run(tmp_path):
    settled = chosen("language-model", tmp_path, data__vocabulary=str(tmp_path / "gone.txt"))

    with pytest.raises(TextError, match=r"no text file .*gone\.txt"):
        run_training(settled, tmp_path / "run", is_quiet=True)

    assert not (tmp_path / "run").exists()
