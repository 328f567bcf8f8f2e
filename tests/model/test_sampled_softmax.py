import pytest
import torch
from lmtrain.model.sampled_softmax import SampledSoftmax
from numerics import assert_same

from lmtrain import device
from lmtrain.model.language_model import LanguageModel

V = 60


def model(num_samples: int, **changes) -> LanguageModel:
    arguments = {"embedding_size": 8, "hidden_size": 8, "num_layers": 1, **changes}
    return LanguageModel(V, softmax="sampled", num_samples=num_samples, **arguments)


def tokens(seed: int) -> torch.Tensor:
    return torch.randint(0, V, (5, 3), generator=device.generator(seed))


@pytest.mark.parametrize("is_tied", [False, True])
def test_a_sample_of_all_words_is_the_full_softmax(is_tied):
    sampled = model(V - 1, tied_embeddings=is_tied).double()
    sampled.sampled_softmax = SampledSoftmax(V, V)
    full = LanguageModel(
        V, embedding_size=8, hidden_size=8, num_layers=1, tied_embeddings=is_tied
    ).double()
    full.load_state_dict(sampled.state_dict())
    found, expected = (
        [loss, *torch.autograd.grad(loss, list(network.parameters()))]
        for network in (sampled, full)
        for loss in [network.loss(tokens(1), tokens(2)).objective]
    )

    for one, other in zip(found, expected, strict=True):
        assert_same(one, other)


@pytest.mark.parametrize(("vocab_size", "num_samples"), [(60, 1), (60, 17), (60, 59), (10000, 999)])
def test_words_are_drawn_as_often_as_is_corrected_for(vocab_size, num_samples):
    head, chance = SampledSoftmax(vocab_size, num_samples), device.generator(1)
    rounds = 4000
    draws = torch.stack([head.draw(chance) for _ in range(rounds)])
    found = draws.flatten().bincount(minlength=vocab_size) / rounds

    assert draws.shape == (rounds, num_samples)
    assert_same(head.expected.sum(), torch.tensor(float(num_samples), dtype=torch.float64))
    assert (head.expected.diff() <= 0).all()
    # The count of a word has a variance of at most its mean; 5 σ, and 60 words or 10,000.
    assert ((found - head.expected).abs() <= 6 * (head.expected / rounds).sqrt()).all()
    assert (found[head.expected == 1] == 1).all()


def test_the_estimated_sum_over_the_other_words_is_right_on_average():
    chance = device.generator(3)
    head = SampledSoftmax(V, 20)
    hidden = torch.randn(1, 4, 8, dtype=torch.float64, generator=chance)
    weight = torch.randn(V, 8, dtype=torch.float64, generator=chance) / 3
    bias = torch.randn(V, dtype=torch.float64, generator=chance) / 3
    targets = torch.tensor([[0, 3, 30, 59]])
    z = hidden @ weight.T + bias
    score = z.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    others = z.exp().sum(-1) - score.exp()

    estimates = torch.stack([
        ((head.nats(hidden, weight, bias, targets, chance) + score).exp() - score.exp()) / others
        for _ in range(3000)
    ])  # fmt: skip

    error = estimates.std(0) / 3000**0.5
    assert (error < 0.02).all()
    assert ((estimates.mean(0) - 1).abs() < 5 * error).all()


def test_outside_training_every_word_counts():
    network = model(5).eval()
    logits, _ = network(tokens(1))
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens(2).flatten())

    assert_same(network.loss(tokens(1), tokens(2)).nats, 5 * expected)
    assert_same(-network.log_probs(tokens(1), tokens(2))[0].mean(), expected)


def test_it_learns_in_either_precision():
    for is_mixed in (False, True):
        network = model(20, is_mixed=is_mixed)
        rule = torch.optim.Adam(network.parameters(), lr=0.02)
        before = network.eval().loss(tokens(1), tokens(2)).nats
        for _ in range(60):
            rule.zero_grad()
            network.train().loss(tokens(1), tokens(2)).objective.backward()
            rule.step()

        assert network.eval().loss(tokens(1), tokens(2)).nats < 0.5 * before


def test_a_target_that_alone_was_drawn_has_finite_gradients():
    head = SampledSoftmax(3, 1)
    hidden = torch.ones(40, 1, 2, requires_grad=True)
    weight, bias = torch.ones(3, 2, requires_grad=True), torch.zeros(3, requires_grad=True)
    targets = torch.zeros(40, 1, dtype=torch.long)
    chance = device.generator(1)

    found = [head.nats(hidden, weight, bias, targets, chance) for _ in range(10)]

    assert any((nats == 0).all() for nats in found)
    for gradient in torch.autograd.grad(sum(nats.sum() for nats in found), [hidden, weight, bias]):
        assert gradient.isfinite().all()


def test_few_words_need_no_sample():
    assert model(V).sampled_softmax is None
    assert model(V - 1).sampled_softmax is not None
