import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from networks import language_model, random_ids, tokens

from lmtrain.model.language_model import LanguageModel
from lmtrain.tasks import perplexity
from lmtrain.tasks.base import Shard
from lmtrain.tasks.perplexity import Perplexity, evaluate, sentence_log_probs, unigram


@pytest.fixture
def model() -> LanguageModel:
    network = language_model(9, embedding_size=5, hidden_size=7, num_layers=2, init_scale=0.8)
    return network.double().eval()


def naive_nats(model: LanguageModel, ids: list[int], start: int) -> list[float]:
    """One token after the other, by the definition of P."""
    nats, state, before = [], None, start
    for index in ids:
        logits, state = model(torch.tensor([[before]]), state)
        nats.append(-float(torch.log_softmax(logits[0, 0], 0)[index].detach()))
        before = index
    return nats


def of(model, ids, characters=100, start_id=1, **changes) -> Perplexity:
    tokenizer = SimpleNamespace(start_id=start_id, unk_id=0)
    return evaluate(model, tokens(ids, characters), tokenizer, **changes)


@pytest.mark.parametrize("length", [1, 2, 7, 30])
def test_every_token_is_predicted_once(model, length):
    ids = random_ids(length)

    result = of(model, ids)

    assert result.count == length
    assert result.total_nats == pytest.approx(sum(naive_nats(model, ids.tolist(), 1)), rel=1e-12)


@pytest.mark.parametrize("chunk", [1, 3, 29, 30, 31])
def test_the_figure_does_not_depend_on_the_chunk_length(model, monkeypatch, chunk):
    expected = of(model, random_ids(30)).total_nats
    monkeypatch.setattr(perplexity, "_SEQ_LEN", chunk)

    assert of(model, random_ids(30)).total_nats == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("batch_size", [2, 4, 7, 30, 100])
def test_streams_count_every_token_once_each_from_a_fresh_state(model, batch_size):
    ids = random_ids(30)
    length = math.ceil(30 / min(batch_size, 30))
    expected = 0.0
    for first in range(0, 30, length):
        start = 1 if first == 0 else int(ids[first - 1])
        expected += sum(naive_nats(model, ids[first : first + length].tolist(), start))

    result = of(model, ids, batch_size=batch_size)

    assert result.count == 30
    assert result.total_nats == pytest.approx(expected, rel=1e-12)


def test_unknown_words_are_counted_and_can_be_left_out(model):
    ids = random_ids(60)
    nats = np.array(naive_nats(model, ids.tolist(), 1))

    result = of(model, ids)

    assert result.oov == (ids == 0).sum() > 0
    assert result.values()["oov_rate"] == result.oov / 60
    expected = math.exp(nats[ids != 0].mean())
    assert result.perplexity_without_oov == pytest.approx(expected, rel=1e-10)


def test_bits_a_character_leave_out_unknown_characters_where_tokens_are_characters(model):
    ids = random_ids(60)
    nats = np.array(naive_nats(model, ids.tolist(), 1))

    by_characters, by_words = of(model, ids, characters=60), of(model, ids, characters=250)

    expected = nats[ids != 0].mean() / math.log(2)
    assert by_characters.values()["bits_per_char_without_oov"] == pytest.approx(expected)
    assert "bits_per_char_without_oov" not in by_words.values()


def test_figures_follow_from_sums_and_counts(model):
    result = of(model, random_ids(60), characters=250)

    assert result.loss == result.total_nats / 60
    assert result.perplexity == pytest.approx(math.exp(result.loss))
    assert result.values()["bits_per_token"] == pytest.approx(result.loss / math.log(2))
    assert result.bits_per_char == pytest.approx(result.total_nats / math.log(2) / 250)


def test_a_text_without_a_start_begins_from_nothing(model):
    with torch.no_grad():
        model.encoder.embedding.weight[4] = 0

    assert of(model, random_ids(5), start_id=None).total_nats == pytest.approx(
        of(model, random_ids(5), start_id=4).total_nats, rel=1e-12
    )


def test_a_model_in_training_stays_in_training(model):
    model.train()
    of(model, random_ids(5))

    assert model.training


def test_sentences_are_scored_by_the_chain_rule_each_alone(model):
    sentences = [[3, 4, 1], [], [5, 1], [2] * 9 + [1]]

    scores = sentence_log_probs(model, sentences, 1)

    for sentence, log_probs in zip(sentences, scores, strict=True):
        expected = [-nats for nats in naive_nats(model, sentence, 1)]
        assert log_probs == pytest.approx(expected, rel=1e-10)


def test_sentences_that_are_sorted_by_length_keep_their_order(model, monkeypatch):
    monkeypatch.setattr(perplexity, "_SENTENCES_AT_ONCE", 7)
    monkeypatch.setattr(perplexity, "_MAX_TOKENS", 12)
    sentences = [[index % 9] * (index % 5) + [1] for index in range(100)]

    scores = sentence_log_probs(model, sentences, 1)

    assert len(scores) == 100
    for sentence, log_probs in zip(sentences, scores, strict=True):
        expected = [-nats for nats in naive_nats(model, sentence, 1)]
        assert log_probs == pytest.approx(expected, rel=1e-10)


def test_the_unigram_baseline_is_the_cross_entropy_of_smoothed_frequencies():
    train, valid = tokens([0, 0, 0, 1]), tokens([0, 1, 2])
    tokenizer = SimpleNamespace(vocab_size=3, unk_id=0)

    found = unigram(train, valid, tokenizer)

    expected = -(math.log(4 / 7) + math.log(2 / 7) + math.log(1 / 7)) / 3
    assert found.loss == pytest.approx(expected)
    assert (found.oov, found.oov_nats) == (1, pytest.approx(-math.log(4 / 7)))


@pytest.mark.parametrize("size", [2, 3, 5])
def test_the_shards_of_processes_add_up_to_the_whole(model, size):
    whole = of(model, random_ids(31), batch_size=5)

    parts = [
        of(model, random_ids(31), batch_size=5, shard=Shard(rank, size)) for rank in range(size)
    ]

    summed = parts[0].summed([part.sums for part in parts])
    assert summed.sums == pytest.approx(whole.sums, rel=1e-12)


def test_a_better_model_costs_less_even_beyond_a_float():
    better, worse = (Perplexity(nats, 1, 1, 0, 0).figures for nats in (800.0, 900.0))

    assert better["perplexity"] is None
    assert Perplexity.cost(better) < Perplexity.cost(worse)


def test_perplexity_beyond_a_float_is_infinite():
    assert perplexity.perplexity(800.0) == math.inf


def test_a_huge_perplexity_is_printed_with_an_exponent():
    found = Perplexity(count=1, total_nats=100.0, oov=0, oov_nats=0.0, characters=1)

    assert dict(found.table())["perplexity"] == "2.69e+43"
