"""What is special to translation."""

import itertools
import sys

import pytest
from example_tasks import settings, task, write

import lmtrain
from lmtrain.data.tokenizer import build_tokenizer
from lmtrain.errors import CheckpointError, ConfigError, TextError
from lmtrain.tasks import beam
from lmtrain.tasks.translate import Translation
from lmtrain.training.run import run_training

NUMBERS = {"eins": "one", "zwei": "two", "drei": "three", "vier": "four", "fünf": "five"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A translator that has learned to translate numbers, and to write more of them."""
    folder, pairs = tmp_path_factory.mktemp("translate"), list(itertools.product(NUMBERS, repeat=2))
    (folder / "all.de").write_text("".join(f"{a} * {b}\n" for a, b in pairs))
    (folder / "all.en").write_text("".join(f"{translated(a, b)}\n" for a, b in pairs))
    source, target = ([str(folder / name)] for name in ("all.de", "all.en"))
    places = {
        "data.train": source, "data.target": target,
        "data.valid": source, "data.valid_target": target,
    }  # fmt: skip
    chosen = settings(
        "translate-dot", places, train__max_steps=150, train__eval_every=150,
        model__hidden_size=16, optimizer__learning_rate=0.03,
    )  # fmt: skip
    assert run_training(chosen, folder / "run", is_quiet=True).best["bleu"] == pytest.approx(100)
    return lmtrain.load(folder / "run")


def translated(first: str, second: str) -> str:
    return " ".join([NUMBERS[first], NUMBERS[second], "and", NUMBERS[second], NUMBERS[first]])


def test_sentences_are_translated_in_their_order(model):
    found = list(model.predict(["eins * vier", "fünf * drei"]))

    expected = [translated("eins", "vier"), translated("fünf", "drei")]
    assert [each.translations for each in found] == [[each] for each in expected]
    assert [each.line() for each in found] == expected
    assert found[0].source == "eins * vier"
    assert -0.5 < found[0].scores[0] < 0


def test_the_n_best_are_given_best_first(model):
    (found,) = model.predict(["eins * vier"], beam=4, nbest=3)

    assert len(set(found.translations)) == 3
    assert found.scores == sorted(found.scores, reverse=True)
    assert found.fields() == {
        "source": "eins * vier",
        "translation": translated("eins", "vier"),
        "translations": found.translations,
        "scores": found.scores,
    }
    first, *_ = found.line().splitlines()
    assert first == f"{found.scores[0]:.4f}\t{translated('eins', 'vier')}"


@pytest.mark.parametrize("options", [{"nbest": 6}, {"nbest": 0}, {"beam": 0}])
def test_a_beam_out_of_its_range_is_refused(model, options):
    with pytest.raises(ConfigError, match=r"must be from 1 to beam \d$"):
        list(model.predict(["eins"], **options))


@pytest.mark.parametrize(
    ("sentences", "told"),
    [("eins", "a list of texts, not one text"), ([b"eins"], "takes texts, not bytes")],
)
def test_what_is_no_list_of_texts_is_refused(model, sentences, told):
    with pytest.raises(ConfigError, match=told):
        list(model.predict(sentences))


def test_a_wide_beam_takes_fewer_sentences_at_once(model, monkeypatch):
    rows, searched = [], beam.search
    monkeypatch.setattr(
        beam, "search",
        lambda *args, **named: rows.append(args[1].shape[1] * named["beam"])
        or searched(*args, **named),
    )  # fmt: skip
    sentences = ["eins * vier", "fünf * drei", "zwei * zwei"] * 40

    narrow, wide = (list(model.predict(sentences, beam=width)) for width in (1, 8))

    assert len(narrow) == len(wide) == 120
    assert max(rows) <= 64 * 5


def test_a_checkpoint_whose_translations_cannot_end_is_refused():
    contents = {
        "tokenizer.json": build_tokenizer(["a b\n"], "word").to_json(),
        "target.json": build_tokenizer(["ab\n"], "char").to_json(),
    }

    class Files:
        def text(self, name):
            return contents[name]

    with pytest.raises(CheckpointError, match=r"^target\.json is damaged: its tokens are no"):
        Translation.restore(Files(), settings("translate-dot", {}))


def test_an_empty_sentence_is_translated_too(model):
    (found,) = model.predict([""])

    assert isinstance(found.translations[0], str)


def test_evaluation_searches_with_a_beam(model):
    # Of a batch of 1 and of all.
    data = model.own_data()["valid"]

    one, all_at_once = model.measure(data, batch_size=1), model.measure(data)

    assert one.sums == pytest.approx(all_at_once.sums, rel=1e-5)
    translations = [each.translations[0] for each in model.predict(p.source for p in data.pairs)]
    assert one.statistics[-2] == sum(len(each.split()) for each in translations)


def test_a_tiny_vocabulary_is_translated_with_a_narrower_beam(tmp_path):
    (tmp_path / "train.tsv").write_text("a\tA\n" * 9)
    chosen = settings("translate-dot", {"data.train": [str(tmp_path / "train.tsv")]})
    run_training(chosen, tmp_path / "run", is_quiet=True)

    assert len(list(lmtrain.load(tmp_path / "run").predict(["a"]))) == 1


def test_references_are_words_as_the_tokenizer_finds_them(tmp_path):
    (tmp_path / "train.tsv").write_text("Don't, stop\tIsn't it?\n" * 2)
    chosen = settings("translate-dot", {"data.train": [str(tmp_path / "train.tsv")]})

    (pair,) = Translation.read(chosen).splits["valid"].pairs

    assert pair.target == "Isn 't it ?"


def test_the_baseline_leaves_the_source_as_it_is(tmp_path):
    places = {}
    for split, text in (("train", "a b\ta b\n"), ("valid", "a b c d e\ta b c d e\nx\ty\n")):
        (tmp_path / split).write_text(text)
        places[f"data.{split}"] = [str(tmp_path / split)]

    found = task(settings("translate-none", places)).baseline("valid")

    assert [found.statistics[index] for index in (0, 4, 8, 9)] == [5, 6, 6, 6]
    assert found.count == 8


def test_lines_that_do_not_pair_are_refused(tmp_path):
    for name, text in (("a.de", "eins\nzwei\n"), ("a.en", "one\n")):
        (tmp_path / name).write_text(text)
    places = {f"data.{key}": [str(tmp_path / f"a.{end}")]
              for key, end in (("train", "de"), ("target", "en"))}  # fmt: skip

    with pytest.raises(TextError, match=r"a\.de has 2 lines, .*a\.en has 1\n"):
        Translation.read(settings("translate-dot", places))


def test_without_sacrebleu_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sacrebleu.metrics.bleu", None)

    with pytest.raises(
        ConfigError,
        match=r"sacrebleu, which is not installed\n  try: pip install 'lmtrain\[translate\]'",
    ):
        Translation.read(settings("translate-dot", write("translate-dot", tmp_path)))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"data__level": "char"}, "data.level = char means nothing with data.task = translate"),
        ({"model__pooling": "max"}, "model.pooling = max means nothing with data.task"),
        ({"model__softmax": "adaptive"}, "model.softmax = adaptive means nothing with"),
        (
            {
                "model__tied_embeddings": True,
                "model__attention": None,
                "model__embedding_size": 4,
                "model__num_layers": 2,
            },
            "without attention needs embedding_size 4 to equal hidden_size 6",
        ),
    ],
)
def test_settings_that_do_not_fit_are_refused(tmp_path, changes, told):
    places = write("translate-dot", tmp_path)

    with pytest.raises(ConfigError, match=told):
        task(settings("translate-dot", places, **changes))
