import math

import pytest
import torch

import lmtrain
from corpora import SENTENCES
from lmtrain.cells import Cell, base, register
from lmtrain.data.tokenizer import build_tokenizer
from lmtrain.errors import CheckpointError, ConfigError, TextError
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


def test_a_trained_model_is_loaded_the_same(model):
    again = lmtrain.load(model.path.parents[1])

    assert again.path == model.path
    assert again.sample(num=2) == model.sample(num=2)


def test_a_moved_run_is_complete(model, tmp_path):
    moved = tmp_path / "elsewhere"
    model.path.rename(moved)
    again = lmtrain.load(moved)
    moved.rename(model.path)

    assert again.sample() == model.sample()


def test_samples_read_as_prose_of_known_words(model):
    texts = model.sample(num=20, max_tokens=12)

    assert any(text.startswith("The ") for text in texts)
    assert all("<UNK>" not in text and "<EOS>" not in text for text in texts)
    assert all(" ." not in text for text in texts)


def test_samples_go_on_from_the_prompt(model):
    assert model.sample("The apple", seed=3)[0].startswith("The apple")


def test_the_sentence_that_was_learned_is_likelier(model):
    learned, shuffled = model.score(
        ["The apple and pear salad is fresh.", "pear fresh The salad. and is apple"]
    )

    assert learned.log_prob > shuffled.log_prob + 5
    assert learned.log_prob == pytest.approx(math.fsum(learned.log_probs))
    assert learned.tokens[-1] == "<EOS>"
    assert learned.oov == 0


def test_scores_of_lines_are_the_evaluation_of_the_text_they_make(model, tmp_path):
    path = tmp_path / "one.txt"
    path.write_text("The apple salad is unheard.\n")
    (scored,) = model.score(["The apple salad is unheard."])

    result = model.evaluate([str(path)])

    assert result.total_nats == pytest.approx(-scored.log_prob, rel=1e-5)
    assert result.count == len(scored.tokens)
    assert result.oov == scored.oov == 1


def test_an_empty_sentence_has_the_probability_of_its_end(model):
    (scored,) = model.score([""])

    assert scored.tokens == ["<EOS>"]


def test_own_texts_are_the_validation_and_the_test_text(model):
    own = model.own()

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


def test_a_prompt_that_is_no_text_is_refused(model):
    with pytest.raises(TextError, match="not valid UTF-8"):
        model.sample("\udcff")


def test_nothing_to_load_is_an_error(tmp_path):
    with pytest.raises(CheckpointError, match="no run or checkpoint"):
        lmtrain.load(tmp_path / "nowhere")


def test_a_cell_of_ones_own_trains_at_once(tmp_path, monkeypatch):
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


def test_a_model_trained_with_cuda_is_built_where_there_is_none():
    chosen = lmtrain.load_config(overrides={"train.device": "cuda", "model.hidden_size": 4})

    data = TextData(build_tokenizer(["a b c\n"], "word"))

    assert LanguageModelling.build(chosen, data).head.weight.shape == (5, 4)
