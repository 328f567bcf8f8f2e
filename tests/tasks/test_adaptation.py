import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from networks import language_model, random_ids, tokens
from numerics import assert_same

from lmtrain.errors import ConfigError
from lmtrain.model.language_model import LanguageModel
from lmtrain.tasks import tuning
from lmtrain.tasks.adaptation import Adaptation, Cache, Dynamic, gradient_scales
from lmtrain.tasks.perplexity import evaluate
from lmtrain.tasks.tuning import tune_cache, tune_dynamic


@pytest.fixture
def model() -> LanguageModel:
    network = language_model(9, embedding_size=5, hidden_size=7, num_layers=2, init_scale=0.8)
    return network.double().eval()


TOKENIZER = SimpleNamespace(start_id=1, unk_id=None)


def nats(model, ids, cache=None, dynamic=None, batch_size=1, scales=()):
    adapting = Adaptation(model, cache, dynamic, scales)
    result = evaluate(
        model, tokens(ids), TOKENIZER, batch_size=batch_size,
        predict=adapting.log_probs, piece=dynamic.seq_len if dynamic else 1,
    )  # fmt: skip
    adapting.close()
    return result.total_nats


def plain_nats(model, ids, batch_size=1):
    return evaluate(model, tokens(ids), TOKENIZER, batch_size=batch_size).total_nats


@torch.no_grad()
def naive_cache_nats(model, ids, cache):
    """One token after the other, by the definition."""
    seen, state, before, total = [], None, 1, 0.0
    for word in ids.tolist():
        hidden, state = model.hidden(torch.tensor([[before]]), state)
        p = float(model.head(hidden)[0, 0].softmax(0)[word])
        a = hidden[0, 0]
        near = seen[-cache.size :]
        if near:
            scores = [math.exp(cache.sharpness * float(a @ then)) for then, _ in near]
            there = [s for s, (_, came) in zip(scores, near, strict=True) if came == word]
            p = (1 - cache.weight) * p + cache.weight * sum(there) / sum(scores)
        total -= math.log(p)
        seen.append((a, word))
        before = word
    return total


@pytest.mark.parametrize("size", [1, 4, 100])
def test_the_cache_is_that_of_its_definition(model, size):
    cache = Cache(size, 0.7, 0.3)

    assert nats(model, random_ids(40), cache) == pytest.approx(
        naive_cache_nats(model, random_ids(40), cache), rel=1e-10
    )


@pytest.mark.parametrize("window", [1, 7, 40])
def test_the_cache_does_not_depend_on_the_chunk_length(model, monkeypatch, window):
    expected = nats(model, random_ids(40), Cache(9, 0.7, 0.3))
    monkeypatch.setattr("lmtrain.tasks.perplexity._SEQ_LEN", window)

    assert nats(model, random_ids(40), Cache(9, 0.7, 0.3)) == pytest.approx(expected, rel=1e-10)


def test_streams_have_caches_of_their_own(model):
    cache = Cache(9, 0.7, 0.3)
    both = nats(model, np.concatenate([random_ids(20), random_ids(20)]), cache, batch_size=2)
    alone = nats(model, np.concatenate([random_ids(20), random_ids(20)]), None, batch_size=2)

    assert both != pytest.approx(alone)
    # The second stream starts without a token before it, the first with one.
    first = nats(model, random_ids(20), cache)
    second = both - first
    assert second == pytest.approx(first, rel=0.1)


def test_a_cache_without_weight_changes_nothing(model):
    assert nats(model, random_ids(40), Cache(9, 0.7, 0.0)) == pytest.approx(
        plain_nats(model, random_ids(40))
    )


def naive_dynamic_nats(model, ids, dynamic, scales):
    mean = torch.cat([r.flatten() for r in scales]).mean()
    trained = [weight.detach().clone() for weight in model.parameters()]
    inputs, total, state = [1, *ids.tolist()], 0.0, None
    for first in range(0, len(ids), dynamic.seq_len):
        piece = ids[first : first + dynamic.seq_len].tolist()
        x = torch.tensor(inputs[first : first + len(piece)]).unsqueeze(1)
        logits, state = model(x, state)
        state = state.detach()
        loss = torch.nn.functional.cross_entropy(logits[:, 0], torch.tensor(piece))
        total += float(loss.detach()) * len(piece)
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        with torch.no_grad():
            for w, w0, g, r in zip(model.parameters(), trained, gradients, scales, strict=True):
                back = (dynamic.decay * r / mean).clamp(max=1) * (w0 - w)
                w += back - dynamic.rate * g / (r + mean)
    with torch.no_grad():
        for w, w0 in zip(model.parameters(), trained, strict=True):
            w.copy_(w0)
    return total


@pytest.mark.slow
@pytest.mark.parametrize(
    ("length", "seq_len", "decay"),
    [(40, 1, 0.0), (40, 5, 0.0), (40, 5, 0.4), (40, 33, 0.1), (700, 50, 0.1), (700, 300, 0.0)],
)
def test_dynamic_evaluation_is_that_of_its_definition(model, length, seq_len, decay):
    dynamic, ids = Dynamic(0.003, decay, seq_len), random_ids(length)
    scales = gradient_scales(model, random_ids(300))

    found = nats(model, ids, None, dynamic, scales=scales)

    assert found == pytest.approx(naive_dynamic_nats(model, ids, dynamic, scales), rel=1e-9)
    assert found != pytest.approx(plain_nats(model, ids))


def test_nothing_is_learned_from_what_fills_the_shorter_streams_up(model):
    dynamic, scales = Dynamic(0.01, 0.0, 4), gradient_scales(model, random_ids(300))
    adapting = Adaptation(model, None, dynamic, scales)
    inputs, targets = torch.tensor([[1, 2], [3, 4]]), torch.tensor([[3, 4], [5, -1]])
    logits, _ = model(inputs)
    loss = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), ignore_index=-1
    )
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    mean = torch.cat([r.flatten() for r in scales]).mean()
    expected = [
        w.detach() - 0.01 * g / (r + mean)
        for w, g, r in zip(model.parameters(), gradients, scales, strict=True)
    ]

    adapting.log_probs(inputs, targets)

    for weight, wanted in zip(model.parameters(), expected, strict=True):
        assert_same(weight, wanted)


def test_a_model_with_an_adaptive_softmax_learns_on(model):
    # Tokens of the head alone: no tail has anything to learn.
    network = language_model(
        300, embedding_size=5, hidden_size=16, num_layers=1, softmax="adaptive"
    ).eval()
    ids = np.tile(random_ids(7), 20)
    scales = gradient_scales(network, torch.arange(300).numpy())

    learned = nats(network, ids, None, Dynamic(0.001, 0.0, 5), scales=scales)

    assert learned < plain_nats(network, ids)


def test_the_trained_weights_come_back(model):
    before = [weight.detach().clone() for weight in model.parameters()]

    nats(model, random_ids(40), Cache(9, 0.7, 0.3), Dynamic(0.01, 0.1), scales=[
        torch.ones_like(weight) for weight in before
    ])  # fmt: skip

    assert all(map(torch.equal, before, model.parameters()))


def test_gradient_scales_are_roots_of_mean_squares(model, monkeypatch):
    monkeypatch.setattr("lmtrain.tasks.adaptation._WINDOWS", 1)
    monkeypatch.setattr("lmtrain.tasks.adaptation._STREAMS", 1)
    ids = random_ids(51)

    scales = gradient_scales(model, ids)

    logits, _ = model(torch.from_numpy(ids[:-1].astype(np.int64)).unsqueeze(1))
    loss = torch.nn.functional.cross_entropy(
        logits[:, 0], torch.from_numpy(ids[1:].astype(np.int64))
    )
    for scale, gradient in zip(
        scales, torch.autograd.grad(loss, list(model.parameters())), strict=True
    ):
        assert_same(scale, gradient.abs())


def test_of_a_long_text_caches_are_tuned_on_the_start(model, monkeypatch):
    ids = random_ids(60)
    expected = next(tune_cache(model, ids[:20], 1))
    monkeypatch.setattr(tuning, "_MAX_BYTES", 4 * 20 * model.encoder.recurrent.output_size)

    assert next(tune_cache(model, ids, 1)) == expected
    assert next(tune_cache(model, ids[:30], 1)) == expected


@pytest.mark.slow
def test_on_a_text_that_repeats_both_help(model):
    ids = np.tile(random_ids(7), 40)

    static = plain_nats(model, ids) / len(ids)
    caches = list(tune_cache(model, ids, 1))
    scales = gradient_scales(model, random_ids(300))
    learning = list(tune_dynamic(model, tokens(ids), TOKENIZER, scales, 5))

    best = min(caches, key=lambda trial: trial.loss)
    assert best.loss < 0.85 * static
    assert best.loss == pytest.approx(nats(model, ids, best.hyperparameters) / len(ids))
    best = min(learning, key=lambda trial: trial.loss)
    assert best.loss < 0.7 * static
    assert best.loss == pytest.approx(
        nats(model, ids, None, best.hyperparameters, 1, scales) / len(ids)
    )


@pytest.mark.parametrize("numbers", [(0, 1, 0.1), (5, 0, 0.1), (5, math.nan, 0.1), (5, 1, 1.0)])
def test_impossible_caches_are_refused(numbers):
    with pytest.raises(ConfigError, match="a cache of"):
        Cache(*numbers)


@pytest.mark.parametrize(
    "numbers",
    [(0, 1, 5), (1, -1, 5), (1, 0, 0), (math.inf, 0, 5), (1, math.nan, 5), (1, 0, 10**19)],
)
def test_impossible_dynamic_evaluation_is_refused(numbers):
    with pytest.raises(ConfigError, match="dynamic evaluation with"):
        Dynamic(*numbers)
