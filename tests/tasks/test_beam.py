"""Beam search against every output that there is, on tiny translators of random weights."""

import itertools
import math

import pytest
import torch
from numerics import TOLERANCE

from lmtrain import config, device
from lmtrain.data.tokenizer import EOS, UNK, Tokenizer
from lmtrain.tasks import beam
from lmtrain.tasks.inputs import TextInputs
from lmtrain.tasks.translate import ParallelData, Translation

WORDS = TextInputs(Tokenizer([UNK, EOS, "a", "b"]))
UNKNOWN, END, *OTHERS = range(4)
LENGTHS = torch.tensor([3, 1, 2])
CLOSE = TOLERANCE[torch.float64]


def translator(attention, seed=3):
    """A translator whose distributions are far from uniform."""
    chosen = config.load(
        overrides={
            "data.task": "translate", "model.attention": attention,
            "model.hidden_size": 4, "model.num_layers": 1, "model.init_scale": 1.5,
            "train.precision": "fp32", "train.seed": seed,
        }
    )  # fmt: skip
    return Translation.build(chosen, ParallelData(WORDS, WORDS)).double().eval()


@pytest.fixture(params=["none", "dot", "additive"])
def model(request):
    return translator(request.param)


@pytest.fixture
def short(monkeypatch):
    """Outputs of at most 5, 3 and 4 tokens, the end included."""
    monkeypatch.setattr(beam, "_MAX_LENGTH_RATIO", 1)
    monkeypatch.setattr(beam, "_EXTRA_LENGTH", 2)


def sources():
    tokens = torch.randint(0, 4, (3, 3), generator=device.generator(2))
    is_beyond = torch.arange(3).unsqueeze(1) >= LENGTHS
    return tokens.masked_fill(is_beyond, -1)


def search(model, *, width, unknown_id=UNKNOWN, rows=slice(None)):
    tokens, lengths = sources()[:, rows], LENGTHS[rows]
    tokens = tokens[: lengths.max()]
    return beam.search(model, tokens, lengths, beam=width, end_id=END, unknown_id=unknown_id)


@torch.no_grad()
def log_probs(model, row, outputs):
    """Of each next token after outputs (T,), alone and without padding: (T + 1, V)."""
    length = LENGTHS[row : row + 1]
    targets = torch.tensor([*outputs, END]).unsqueeze(1)
    hidden = model.hidden(sources()[: int(length), row : row + 1], length, targets, END)
    return model.head(hidden)[:, 0].log_softmax(-1)


def score(model, row, words):
    """The mean of log P of the words and of the end."""
    tokens = [*words, END]
    found = log_probs(model, row, words)
    return float(found[range(len(tokens)), tokens].mean())


def test_a_beam_as_wide_as_all_prefixes_finds_all_outputs_in_their_order(model, short):
    found = search(model, width=64)

    for row, most in enumerate((5, 3, 4)):
        outputs = [
            list(words) for size in range(most) for words in itertools.product(OTHERS, repeat=size)
        ]
        expected = sorted(outputs, key=lambda words: -score(model, row, words))
        assert [each.ids for each in found[row]] == expected
        for each in found[row]:
            assert each.score == pytest.approx(score(model, row, each.ids), abs=CLOSE)


@pytest.mark.parametrize("width", [2, 3, 5])
def test_scores_of_a_narrow_beam_are_those_of_its_outputs(model, width):
    best = search(model, width=width)

    for row, found in enumerate(best):
        assert 1 <= len(found) <= width
        scores = [each.score for each in found]
        assert scores == sorted(scores, reverse=True)
        assert len({tuple(each.ids) for each in found}) == len(found)
        for each in found:
            if len(each.ids) < 2 * LENGTHS[row] + 10:
                assert each.score == pytest.approx(score(model, row, each.ids), abs=CLOSE)


def naive(model, row, width, most):
    """A search of one source with lists: the outputs that end among the best ones of each step."""
    live, ended = [([], 0.0)], []
    for _ in range(most):
        candidates = []
        for words, total in live:
            for token, more in enumerate(log_probs(model, row, words)[-1].tolist()):
                if token != UNKNOWN:
                    candidates.append((total + more, token, words))
        candidates.sort(key=lambda each: -each[0])
        for total, token, words in candidates[:width]:
            if token == END and len(ended) < width:
                ended.append((total / (len(words) + 1), words))
        going_on = [each for each in candidates if each[1] != END]
        live = [([*words, token], total) for total, token, words in going_on[:width]]
        if len(ended) == width:
            break
    best, total = live[0]
    return sorted(ended, reverse=True) or [(total / most, best)]


# Translators that find other outputs if one that ends takes the place of one that goes on.
@pytest.mark.parametrize(
    ("width", "seed", "bias"), [(2, 23, 0), (2, 24, 0), (3, 1, 0), (2, 8, 1), (2, 9, 1), (4, 3, 1)]
)
def test_a_narrow_beam_follows_the_best_outputs_that_have_not_ended(width, seed, bias):
    model = translator("dot", seed)
    with torch.no_grad():
        model.head.bias[END] += bias

    found = search(model, width=width)

    for row, length in enumerate(LENGTHS.tolist()):
        expected = naive(model, row, width, 2 * length + 10)
        assert [each.ids for each in found[row]] == [words for _, words in expected]


def greedy(model, row, most):
    words = []
    while len(words) < most:
        following = log_probs(model, row, words)[-1]
        following[UNKNOWN] = -torch.inf
        token = int(following.argmax())
        if token == END:
            break
        words.append(token)
    return words


def test_a_beam_of_one_is_greedy(model):
    found = search(model, width=1)

    for row, ((best,), length) in enumerate(zip(found, LENGTHS.tolist(), strict=True)):
        assert best.ids == greedy(model, row, 2 * length + 10)


@pytest.mark.parametrize("width", [1, 4])
def test_a_source_is_translated_the_same_beside_others_and_alone(model, width):
    together = search(model, width=width)

    for row in range(3):
        (alone,) = search(model, width=width, rows=slice(row, row + 1))
        assert [each.ids for each in alone] == [each.ids for each in together[row]]
        assert [each.score for each in alone] == pytest.approx(
            [each.score for each in together[row]], abs=CLOSE
        )


@pytest.mark.parametrize("width", [1, 3])
def test_the_unknown_token_is_never_chosen(model, width):
    with torch.no_grad():
        model.head.bias[UNKNOWN] = 50

    with_it, without = search(model, width=1, unknown_id=None), search(model, width=width)

    assert all(UNKNOWN in found[0].ids for found in with_it)
    assert not any(UNKNOWN in each.ids for found in without for each in found)


def constant(model, likelihoods):
    """Makes the next token independent of everything before it."""
    with torch.no_grad():
        model.head.weight.zero_()
        model.head.bias.copy_(torch.tensor(likelihoods).log())


def test_a_longer_output_of_likelier_tokens_is_better(model, short):
    constant(model, [0.01, 0.2, 0.69, 0.1])

    first, *others = search(model, width=64)[0]

    # The shortest is the likeliest, but each of the others' tokens is likelier.
    a, _ = OTHERS
    assert first.ids == [a] * 4
    assert [] in [each.ids for each in others]


def test_an_output_that_does_not_end_is_cut(model):
    constant(model, [0.01, 1e-300, 0.69, 0.3])

    found = search(model, width=2)

    a, _ = OTHERS
    for length, (best, *others) in zip(LENGTHS.tolist(), found, strict=True):
        assert best.ids == [a] * (2 * length + 10)
        assert best.score == pytest.approx(math.log(0.69), rel=1e-6)
        assert not others


def test_an_output_may_be_empty(model):
    constant(model, [0.01, 0.97, 0.01, 0.01])

    assert [found[0].ids for found in search(model, width=3)] == [[], [], []]
