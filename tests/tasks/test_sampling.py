from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from networks import language_model

from lmtrain.errors import DivergedError
from lmtrain.model.language_model import LanguageModel
from lmtrain.tasks.sampling import Sampling, draw, draw_known, generate


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return language_model(12, embedding_size=5, hidden_size=7, num_layers=1, init_scale=1.5).eval()


def sequences(model, prompt=(), **changes) -> list[list[int]]:
    ids = {"start_id": 1, "eos_id": 1, "unk_id": 0}
    ids = {name: changes.pop(name, default) for name, default in ids.items()}
    sampling = Sampling(**{"num": 3, "max_tokens": 30, **changes})
    drawn = list(generate(model, SimpleNamespace(**ids), list(prompt), sampling))
    return [[each for each in row if each is not None] for row in zip(*drawn, strict=True)]


@given(
    st.lists(st.floats(0, 1), min_size=1, max_size=40).filter(lambda p: sum(p) > 0.01),
    st.integers(0, 2**32),
)
def test_draws_are_those_of_numpys_choice(weights, seed):
    p = np.array(weights) / np.sum(weights)
    ours, theirs = np.random.default_rng(seed), np.random.default_rng(seed)

    for _ in range(20):
        assert draw(p, ours) == theirs.choice(len(p), p=p)


def test_unknown_is_drawn_again():
    p = np.array([0.9, 0.05, 0.05])
    ours, theirs = np.random.default_rng(1), np.random.default_rng(1)
    expected = []
    while len(expected) < 50:
        if (index := theirs.choice(3, p=p)) != 0:
            expected.append(index)

    assert [draw_known(p, ours, 0) for _ in range(50)] == expected


def test_a_model_sure_of_unknown_still_writes():
    p = np.array([1 - 1e-15, 1e-15, 0.0])

    assert draw_known(p, np.random.default_rng(1), 0) == 1


def test_nothing_but_unknown_is_an_error():
    with pytest.raises(DivergedError, match="nothing but <UNK>"):
        draw_known(np.array([1.0, 0.0]), np.random.default_rng(1), 0)


@pytest.mark.parametrize(
    "cut", [{"top_k": 1}, {"top_p": 0.01}, {"temperature": 1e-4}], ids=lambda cut: next(iter(cut))
)
def test_where_unknown_is_likeliest_the_likeliest_known_word_is_drawn(model, cut):
    with torch.no_grad():
        logits, _ = model(torch.tensor([[1]]))
    unknown = int(logits.argmax())
    likeliest = int(logits[0, 0].argsort(descending=True)[1])

    drawn = sequences(model, start_id=1, eos_id=None, unk_id=unknown, max_tokens=1, **cut)

    assert drawn == [[likeliest]] * 3


def test_probabilities_that_are_not_finite_are_an_error():
    with pytest.raises(DivergedError, match="not finite"):
        draw_known(np.array([np.nan, 1.0]), np.random.default_rng(1), 0)


LOGITS = np.log(np.array([0.5, 0.3, 0.15, 0.05]))


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "expected"),
    [
        (1.0, None, None, [0.5, 0.3, 0.15, 0.05]),
        (0.5, None, None, np.array([0.25, 0.09, 0.0225, 0.0025]) / 0.365),
        (1.0, 2, None, [0.625, 0.375, 0, 0]),
        (1.0, 9, None, [0.5, 0.3, 0.15, 0.05]),
        (1.0, None, 0.75, [0.625, 0.375, 0, 0]),
        (1.0, None, 0.1, [1, 0, 0, 0]),
        (1.0, None, 1.0, [0.5, 0.3, 0.15, 0.05]),
    ],
)
def test_the_distribution_is_cut_as_asked(temperature, top_k, top_p, expected):
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    np.testing.assert_allclose(sampling.distribution(LOGITS), expected)


def test_a_tiny_temperature_takes_the_likeliest():
    np.testing.assert_allclose(Sampling(temperature=1e-300).distribution(LOGITS), [1, 0, 0, 0])


def test_the_seed_gives_the_text(model):
    assert sequences(model, seed=4) == sequences(model, seed=4)
    assert sequences(model, seed=4) != sequences(model, seed=5)


def test_a_sequence_does_not_depend_on_how_many_are_drawn(model):
    assert sequences(model, num=3)[:1] == sequences(model, num=1)


def test_sequences_end_at_eos_and_never_hold_unknown(model):
    drawn = sequences(model, num=40)

    assert all(0 not in each for each in drawn)
    assert all(each.index(1) == len(each) - 1 for each in drawn if 1 in each)
    assert any(1 in each for each in drawn)


def test_no_more_tokens_than_asked(model):
    assert [len(each) for each in sequences(model, eos_id=None, max_tokens=7)] == [7, 7, 7]


def test_what_is_drawn_follows_the_model_token_by_token(model):
    (drawn,) = sequences(model, prompt=[3, 4], num=1, eos_id=None, max_tokens=8, seed=2)
    chance, fed = np.random.default_rng([2, 0]), [1, 3, 4]
    for index in drawn:
        logits, _ = model(torch.tensor(fed).unsqueeze(1))
        p = Sampling().distribution(logits[-1, 0].double().detach().numpy())
        assert index == draw_known(p, chance, 0)
        fed.append(index)


def test_frequencies_are_the_models(model):
    logits, _ = model(torch.tensor([[1]]))
    p = torch.softmax(logits[0, 0].double(), 0).detach().numpy().copy()
    p[0] = 0
    p /= p.sum()

    drawn = [each[0] for each in sequences(model, num=4000, max_tokens=1, eos_id=None)]

    counts = np.bincount(drawn, minlength=12)
    # Six standard deviations of a binomial count.
    assert (np.abs(counts - 4000 * p) <= 6 * np.sqrt(4000 * p * (1 - p)) + 1e-9).all()
