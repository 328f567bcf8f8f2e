import math

import pytest
import torch

import lmtrain
from corpora import SENTENCES
from lmtrain.cells import Cell, base, register
from lmtrain.data.tokenizer import build_tokenizer
from lmtrain.errors import CheckpointError, ConfigError, TextError
from lmtrain.tasks import language_model
from lmtrain.tasks.language_model import LanguageModelling, TextData


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("api")
    (folder / "text.txt").write_text(SENTENCES)
    config = lmtrain.load_config(
        overrides={
            "data.train": [str(folder / "text.txt")], "model.hidden_size": 24,
            "model.num_layers": 1, "train.batch_size": 8, "train.seq_len": 10,
            "train.max_steps": 150, "optimizer.learning_rate": 0.02, "train.threads": 1,
            "data.test_fraction": 0.1,
        }
    )  # fmt: skip
    return lmtrain.train(config, folder / "run")


def test_a_loaded_model_is_the_trained_one(model):
    loaded = lmtrain.load(model.path.parents[1])

    assert loaded.path == model.path
    assert loaded.sample(num=2) == model.sample(num=2)


def test_a_checkpoint_can_be_moved(model, tmp_path):
    moved = tmp_path / "elsewhere"
    model.path.rename(moved)
    loaded = lmtrain.load(moved)
    moved.rename(model.path)

    assert loaded.sample() == model.sample()


def test_samples_are_detokenized_and_contain_no_special_tokens(model):
    texts = model.sample(num=20, max_tokens=12)

    assert any(text.startswith("The ") for text in texts)
    assert all("<UNK>" not in text and "<EOS>" not in text for text in texts)
    assert all(" ." not in text for text in texts)


def test_samples_start_with_the_prompt(model):
    assert model.sample("The apple", seed=3)[0].startswith("The apple")


def test_a_sentence_of_the_training_text_is_more_likely_than_a_shuffled_one(model):
    learned, shuffled = model.score(
        ["The apple and pear salad is fresh.", "pear fresh The salad. and is apple"]
    )

    assert learned.log_prob > shuffled.log_prob + 5
    assert learned.log_prob == pytest.approx(math.fsum(learned.log_probs))
    assert learned.tokens[-1] == "<EOS>"
    assert learned.oov == 0


def test_the_score_of_a_line_matches_the_evaluation_of_a_text_with_that_line(model, tmp_path):
    path = tmp_path / "one.txt"
    path.write_text("The apple salad is unheard.\n")
    (scored,) = model.score(["The apple salad is unheard."])

    result = model.evaluate([str(path)])

    assert result.total_nats == pytest.approx(-scored.log_prob, rel=1e-5)
    assert result.count == len(scored.tokens)
    assert result.oov == scored.oov == 1


def test_scores_do_not_depend_on_how_many_sentences_are_in_memory(model, monkeypatch):
    sentences = ["The apple salad.", "", "A pear", "The apple and pear salad."]
    together = list(model.score(sentences))
    monkeypatch.setattr(language_model, "_SCORED_TOGETHER", 2)
    remaining = iter(sentences)
    scores = model.score(remaining)
    first = next(scores)

    assert [next(remaining), *remaining] == sentences[2:]
    assert first.text == together[0].text
    for each, expected in zip(model.score(sentences), together, strict=True):
        assert each.tokens == expected.tokens
        assert each.log_probs == pytest.approx(expected.log_probs, rel=1e-5)


def test_a_text_instead_of_a_list_of_texts_is_refused(model):
    with pytest.raises(ConfigError, match="score takes a list of texts, not one text"):
        list(model.score("The apple salad."))


def test_one_file_is_evaluated_like_a_list_of_it(model, tmp_path):
    path = tmp_path / "one.txt"
    path.write_text("The apple salad.\n")

    assert model.evaluate(str(path)).loss == model.evaluate([str(path)]).loss


def test_an_empty_sentence_consists_of_its_end_token(model):
    (scored,) = model.score([""])

    assert scored.tokens == ["<EOS>"]


def test_a_model_has_the_validation_and_test_text_of_its_run(model):
    own = model.own_data()

    assert list(own) == ["valid", "test"]
    assert model.measure(own["valid"]).loss < 2.5


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"num": 0}, "num 0"),
        ({"max_tokens": -3}, "max_tokens -3"),
        ({"temperature": -0.5}, "temperature -0.5"),
        ({"temperature": math.nan}, "temperature nan"),
        ({"top_k": 0}, "top_k 0"),
        ({"top_p": 1.5}, "top_p 1.5"),
        ({"seed": -1}, "seed -1"),
    ],
)
def test_sampling_out_of_range_is_refused(model, arguments, words):
    with pytest.raises(ConfigError, match=words):
        model.sample(**arguments)


def test_a_prompt_that_is_not_unicode_is_refused(model):
    with pytest.raises(TextError, match="not valid UTF-8"):
        model.sample("\udcff")


def test_loading_a_missing_run_is_an_error(tmp_path):
    with pytest.raises(CheckpointError, match="no run or checkpoint"):
        lmtrain.load(tmp_path / "nowhere")


def test_a_registered_cell_can_be_trained(tmp_path, monkeypatch):
    monkeypatch.setattr(base, "_CELLS", dict(base._CELLS))

    @register("own")
    class Own(Cell):
        gates = ("candidate", "forget")
        state_names = ("hidden",)

        def step(self, x, state):
            (h,) = state
            forget = torch.sigmoid(self.affine("forget", x, h))
            return (forget * h + (1 - forget) * torch.tanh(self.affine("candidate", x, h)),)

    (tmp_path / "text.txt").write_text(SENTENCES)
    config = lmtrain.load_config(
        overrides={
            "data.train": [str(tmp_path / "text.txt")], "model.cell": "own",
            "model.hidden_size": 8, "train.batch_size": 4, "train.seq_len": 8,
            "train.max_steps": 10, "train.threads": 1,
        }
    )  # fmt: skip

    assert isinstance(lmtrain.train(config, tmp_path / "run").sample()[0], str)


def test_a_model_trained_with_cuda_is_built_without_cuda():
    chosen = lmtrain.load_config(overrides={"train.device": "cuda", "model.hidden_size": 4})

    data = TextData(build_tokenizer(["a b c\n"], "word"))

    assert LanguageModelling.build(chosen, data).head.weight.shape == (5, 4)
