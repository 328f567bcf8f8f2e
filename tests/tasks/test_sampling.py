import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from networks import language_model

from lmtrain.data.tokenizer import UNK, Tokenizer, build_tokenizer
from lmtrain.errors import ConfigError, DivergedError
from lmtrain.model.language_model import LanguageModel
from lmtrain.tasks import sampling as module
from lmtrain.tasks.sampling import Sampling, Until, draw, generate, stream


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
    ours, theirs = ([np.random.default_rng([seed, row]) for row in range(3)] for _ in range(2))

    for _ in range(10):
        expected = [generator.choice(len(p), p=p) for generator in theirs]
        assert draw(torch.from_numpy(p).repeat(3, 1), ours) == expected


def row_of(values) -> torch.Tensor:
    """A batch of one row."""
    return torch.tensor([values], dtype=torch.float64)


def test_unknown_is_drawn_again():
    p = row_of([0.9, 0.05, 0.05])
    ours, theirs = np.random.default_rng(1), np.random.default_rng(1)
    expected = []
    while len(expected) < 50:
        if (index := theirs.choice(3, p=p[0])) != 0:
            expected.append(index)

    assert [draw(p, [ours], 0)[0] for _ in range(50)] == expected


def test_a_model_sure_of_unknown_still_writes():
    p = row_of([1 - 1e-15, 1e-15, 0.0])

    assert draw(p, [np.random.default_rng(1)], 0) == [1]


def test_nothing_but_unknown_is_an_error():
    with pytest.raises(DivergedError, match="nothing but <UNK>"):
        draw(row_of([1.0, 0.0]), [np.random.default_rng(1)], 0)


@pytest.mark.parametrize(
    "cut",
    [{"top_k": 1}, {"top_p": 0.01}, {"temperature": 1e-4}, {"temperature": 0}],
    ids=str,
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
        draw(row_of([np.nan, 1.0]), [np.random.default_rng(1)], 0)


LOGITS = row_of([0.5, 0.3, 0.15, 0.05]).log()


def sorted_distribution(sampling, logits):
    """The same by sorting the whole vocabulary."""
    weights = torch.softmax((logits - logits.max()) / sampling.temperature, 0).numpy()
    order = np.argsort(-weights, kind="stable")
    if sampling.top_k is not None:
        weights[order[sampling.top_k :]] = 0
    if sampling.top_p is not None:
        reached = np.cumsum(weights[order]) / weights.sum()
        weights[order[1 + int(np.searchsorted(reached, sampling.top_p)) :]] = 0
    return weights / weights.sum()


@pytest.mark.parametrize("decimals", [0, 1, 9], ids=["ties", "few ties", "no ties"])
@pytest.mark.parametrize("scale", [0.1, 2.0])
@pytest.mark.parametrize("size", [1, 5, 64, 65, 3000])
def test_the_distribution_is_that_of_a_stable_sort(size, scale, decimals):
    drawn = np.random.default_rng(size).normal(scale=scale, size=(2, size)).round(decimals)
    logits = torch.from_numpy(drawn)

    for top_k, top_p in itertools.product((None, 1, 7, 64, 5000), (None, 0.05, 0.5, 0.99, 1.0)):
        sampling = Sampling(temperature=0.7, top_k=top_k, top_p=top_p)
        expected = [sorted_distribution(sampling, row) for row in logits]
        np.testing.assert_array_equal(sampling.distribution(logits) > 0, np.array(expected) > 0)
        np.testing.assert_allclose(sampling.distribution(logits), expected, rtol=1e-14)


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
        (0, None, None, [1, 0, 0, 0]),
        (0, 3, 0.75, [1, 0, 0, 0]),
    ],
)
def test_the_distribution_is_cut_as_asked(temperature, top_k, top_p, expected):
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    np.testing.assert_allclose(sampling.distribution(LOGITS)[0], expected)


@pytest.mark.parametrize("temperature", [1e-300, 1e-320])
def test_a_tiny_temperature_takes_the_likeliest(temperature, recwarn):
    chosen = Sampling(temperature=temperature)

    np.testing.assert_allclose(chosen.distribution(LOGITS)[0], [1, 0, 0, 0])
    assert not recwarn.list


def test_greedy_takes_the_first_of_equally_likely_tokens():
    probabilities = Sampling(temperature=0).distribution(row_of([1.0, 2, 2]))

    np.testing.assert_array_equal(probabilities[0], [0, 1, 0])


def test_greedy_texts_do_not_depend_on_the_seed(model):
    assert sequences(model, temperature=0, seed=4) == sequences(model, temperature=0, seed=5)


def test_greedy_of_a_model_that_diverged_is_an_error():
    with pytest.raises(DivergedError, match="not finite"):
        draw(
            Sampling(temperature=0).distribution(row_of([1.0, np.nan])), [np.random.default_rng(1)]
        )


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
        p = Sampling().distribution(logits[-1].double().detach())
        assert [index] == draw(p, [chance], 0)
        fed.append(index)


def test_more_texts_than_are_drawn_at_once():
    model = language_model(150, embedding_size=16, hidden_size=16, softmax="adaptive").eval()

    assert sequences(model, num=70)[::23] == [
        sequences(model, num=index + 1)[-1] for index in range(0, 70, 23)
    ]


def test_frequencies_are_the_models(model):
    logits, _ = model(torch.tensor([[1]]))
    p = torch.softmax(logits[0, 0].double(), 0).detach().numpy().copy()
    p[0] = 0
    p /= p.sum()

    drawn = [each[0] for each in sequences(model, num=4000, max_tokens=1, eos_id=None)]

    counts = np.bincount(drawn, minlength=12)
    # Six standard deviations of a binomial count.
    assert (np.abs(counts - 4000 * p) <= 6 * np.sqrt(4000 * p * (1 - p)) + 1e-9).all()


def until_naive(text: str, strings: list[str]) -> str:
    """The text up to the first of the strings, looked for after every character."""
    for end in range(len(text) + 1):
        if found := [each for each in strings if text[:end].endswith(each)]:
            return text[: end - max(map(len, found))]
    return text


@given(
    st.lists(st.text("ab", max_size=4), max_size=12),
    st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
)
def test_text_ends_before_the_first_stop_string_wherever_its_pieces_end(pieces, strings):
    until = Until(strings)

    written = "".join(map(until.add, pieces)) + until.end()

    text = "".join(pieces)
    assert written == until_naive(text, strings)
    assert until.is_reached == any(each in text for each in strings)


@given(
    st.lists(st.text("ab", max_size=4), max_size=12),
    st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
)
def test_only_the_beginning_of_a_stop_string_is_held_back(pieces, strings):
    until, written, text = Until(strings), "", ""
    for piece in pieces:
        written += until.add(piece)
        text += piece
        if until.is_reached:
            return
        held = text.removeprefix(written)
        assert not held or any(each.startswith(held) for each in strings)


@pytest.mark.parametrize("wrong", ["END", [""], [3], ["a", ""]])
def test_stop_strings_that_cannot_be_are_refused(wrong):
    with pytest.raises(ConfigError, match="stop"):
        Sampling(stop=wrong)


LETTERS = Tokenizer([UNK, "\n", *"abcdefghij"], "char")


def streamed(model, prompt="", tokenizer=LETTERS, **settings) -> tuple[list[str], list[str]]:
    """The texts, and the pieces of the first."""
    chosen = Sampling(**{"num": 1, "max_tokens": 40, **settings})
    texts, pieces = [""] * chosen.num, []
    for row, piece in stream(model, tokenizer, prompt, chosen):
        texts[row] += piece
        pieces += [piece] if not row else []
    return texts, pieces


def test_each_text_ends_before_its_own_first_stop_string(model):
    whole, _ = streamed(model, num=5)
    stop = [whole[0][7:10], whole[1][20:22]]

    stopped, pieces = streamed(model, num=5, stop=stop)

    assert stopped == [until_naive(text, stop) for text in whole]
    assert stopped[0] != whole[0]
    assert stopped[0] == "".join(pieces)


def test_drawing_ends_when_all_texts_have_stopped(model):
    (whole,), _ = streamed(model)

    (stopped,), pieces = streamed(model, stop=[whole[:3]], max_tokens=1_000_000)

    assert stopped == ""
    assert len(pieces) < 10


def test_a_stop_string_in_the_prompt_ends_nothing(model):
    (whole,), _ = streamed(model, "abab")

    assert streamed(model, "abab", stop=["abab" + whole[4:6]])[0] == [whole]
    assert whole.startswith("abab")


PROSE = build_tokenizer(["( a b . ' s\n"], level="word", splitter="words")


@pytest.mark.parametrize(
    ("prompt", "word", "expected"),
    [
        ("a  zyx", "b", "a  zyx b"),
        ("A,B ", "b", "A,B b"),
        ("zyx.", "a", "zyx. a"),
        ("zyx (", "a", "zyx (a"),
        ("say [", "a", "say [a"),
        ("zyx", ".", "zyx."),
        ("one\n", "a", "one\na"),
        ('he said "', "a", 'he said "a'),
        ('"he" said', "a", '"he" said a'),
        ("", "a", "a"),
    ],
)
def test_a_text_goes_on_from_its_prompt_as_it_was_typed(prompt, word, expected):
    following = PROSE.detokenizer(prompt).add(PROSE.vocabulary.index(word))

    assert prompt + following == expected


def test_the_words_that_a_model_does_not_know_are_told_once_each():
    assert PROSE.unknown("zyx a zyx, b <UNK>\n") == ["zyx", ","]
    assert LETTERS.unknown("zaz") == ["z"]
    assert build_tokenizer([], "byte").unknown("zzz") == []
    assert build_tokenizer(["Ab c\n"], "word", lowercase=True).unknown("AB D") == ["d"]
    assert Tokenizer(["<UNK>", "a"], "char").unknown("abba") == ["b"]


def test_a_long_prompt_is_computed_in_windows(model, monkeypatch):
    prompt = [2 + index * index % 10 for index in range(23)]
    whole = sequences(model, prompt)
    monkeypatch.setattr(module, "_PROMPT_STEPS", 5)

    assert sequences(model, prompt) == whole
