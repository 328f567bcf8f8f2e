import pytest
import torch
from networks import language_modelling, loss
from numerics import assert_same

from lmtrain import device
from lmtrain.model.generator import ModelGenerator
from lmtrain.model.sampled_head import SampledSoftmax
from lmtrain.tasks.language_model import LanguageModelling

V = 60


def task(num_samples: int, **changes) -> LanguageModelling:
    arguments = {"embedding_size": 8, "hidden_size": 8, "num_layers": 1, **changes}
    return language_modelling(V, softmax="sampled", samples=num_samples, **arguments)


def head(num_classes: int, num_samples: int, hidden_size: int = 8) -> SampledSoftmax:
    return SampledSoftmax(hidden_size, num_classes, num_samples, ModelGenerator(1))


def tokens(seed: int) -> torch.Tensor:
    return torch.randint(0, V, (5, 3), generator=device.generator(seed))


@pytest.mark.parametrize("is_tied", [False, True])
def test_a_sample_of_all_words_is_the_full_softmax(is_tied):
    sampled = language_modelling(
        V, embedding_size=8, hidden_size=8, num_layers=1, tied_embeddings=is_tied
    )
    sampled.model.double()
    full, tied = sampled.model.head, sampled.model.encoder.embedding.weight if is_tied else None
    other = SampledSoftmax(8, V, V - 1, ModelGenerator(1), tied)
    other.weight, other.bias = full.weight, full.bias
    every = torch.arange(V)
    other.expected = torch.ones(V, dtype=torch.float64)
    hidden, _ = sampled.model.hidden(tokens(1))
    weights = list(sampled.model.parameters())
    found, expected = (
        [objective, *torch.autograd.grad(objective, weights, retain_graph=True)]
        for objective in (
            other.estimated(hidden, tokens(2), every).sum(),
            full.nats(hidden, tokens(2), 1.0),
        )
    )

    for one, other in zip(found, expected, strict=True):
        assert_same(one, other)


@pytest.mark.parametrize(("vocab_size", "num_samples"), [(60, 1), (60, 17), (60, 59), (10000, 999)])
def test_words_are_drawn_as_often_as_is_corrected_for(vocab_size, num_samples):
    softmax, generator = head(vocab_size, num_samples), device.generator(1)
    rounds = 4000
    draws = torch.stack([softmax.draw(generator) for _ in range(rounds)])
    found = draws.flatten().bincount(minlength=vocab_size) / rounds

    assert draws.shape == (rounds, num_samples)
    assert_same(softmax.expected.sum(), torch.tensor(float(num_samples), dtype=torch.float64))
    assert (softmax.expected.diff() <= 0).all()
    # The count of a word has a variance of at most its mean; 5 σ, and 60 words or 10,000.
    assert ((found - softmax.expected).abs() <= 6 * (softmax.expected / rounds).sqrt()).all()
    assert (found[softmax.expected == 1] == 1).all()


def test_the_estimated_sum_over_the_other_words_is_right_on_average():
    generator, softmax = device.generator(3), head(V, 20).double()
    hidden = torch.randn(1, 4, 8, dtype=torch.float64, generator=generator)
    with torch.no_grad():
        softmax.weight.normal_(generator=generator).div_(3)
        softmax.bias.normal_(generator=generator).div_(3)
    targets = torch.tensor([[0, 3, 30, 59]])
    z = softmax(hidden).detach()
    score = z.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    others = z.exp().sum(-1) - score.exp()

    nats = [
        softmax.estimated(hidden, targets, softmax.draw(generator)).detach() for _ in range(3000)
    ]
    estimates = torch.stack([((each + score).exp() - score.exp()) / others for each in nats])

    error = estimates.std(0) / 3000**0.5
    assert (error < 0.02).all()
    assert ((estimates.mean(0) - 1).abs() < 5 * error).all()


def test_outside_training_every_word_counts():
    language = task(5)
    network = language.model.eval()
    logits, _ = network(tokens(1))
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens(2).flatten())

    assert_same(loss(language, tokens(1), tokens(2)).total.float(), 15 * expected)
    assert_same(-network.log_probs(tokens(1), tokens(2))[0].mean(), expected)


def test_it_learns_in_either_precision():
    for precision in ("fp32", "bf16"):
        language = task(20, train__precision=precision)
        rule = torch.optim.Adam(language.model.parameters(), lr=0.02)
        language.model.eval()
        before = loss(language, tokens(1), tokens(2)).total
        language.model.train()
        for _ in range(60):
            rule.zero_grad()
            loss(language, tokens(1), tokens(2)).objective.backward()
            rule.step()
        language.model.eval()

        assert loss(language, tokens(1), tokens(2)).total < 0.5 * before


def test_a_target_that_alone_was_drawn_has_finite_gradients():
    softmax, generator = head(3, 1, hidden_size=2), device.generator(1)
    hidden = torch.ones(40, 1, 2, requires_grad=True)
    with torch.no_grad():
        softmax.weight.fill_(1)
        softmax.bias.zero_()
    targets = torch.zeros(40, 1, dtype=torch.long)

    found = [softmax.estimated(hidden, targets, softmax.draw(generator)) for _ in range(10)]

    assert any((nats == 0).all() for nats in found)
    weights = [hidden, softmax.weight, softmax.bias]
    for gradient in torch.autograd.grad(sum(nats.sum() for nats in found), weights):
        assert gradient.isfinite().all()


def test_few_words_need_no_sample():
    sampled, full = task(V), language_modelling(V, embedding_size=8, hidden_size=8, num_layers=1)

    found, expected = (loss(each, tokens(1), tokens(2)).objective for each in (sampled, full))

    assert torch.equal(found, expected)
