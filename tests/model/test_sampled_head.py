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
def test_a_sample_of_all_words_gives_the_loss_of_the_full_softmax(is_tied):
    sampled = language_modelling(
        V, embedding_size=8, hidden_size=8, num_layers=1, tied_embeddings=is_tied
    )
    sampled.model.double()
    full, tied = sampled.model.head, sampled.model.encoder.embedding.weight if is_tied else None
    other = SampledSoftmax(8, V, V - 1, ModelGenerator(1), tied)
    other.weight, other.bias = full.weight, full.bias
    other.expected = torch.ones(V, dtype=torch.float64)
    hidden, _ = sampled.model.hidden(tokens(1))
    weights = list(sampled.model.parameters())
    actual, expected = (
        [objective, *torch.autograd.grad(objective, weights, retain_graph=True)]
        for objective in (
            other.estimated(hidden, tokens(2), torch.arange(V), 1.0),
            full.loss(hidden, tokens(2), 1.0),
        )
    )

    for tensor, reference in zip(actual, expected, strict=True):
        assert_same(tensor, reference)


@pytest.mark.parametrize(("vocab_size", "num_samples"), [(60, 1), (60, 17), (60, 59), (10000, 999)])
def test_words_are_drawn_as_often_as_expected(vocab_size, num_samples):
    softmax, generator = head(vocab_size, num_samples), device.generator(1)
    rounds = 4000
    draws = torch.stack([softmax.draw(generator) for _ in range(rounds)])
    frequencies = draws.flatten().bincount(minlength=vocab_size) / rounds

    assert draws.shape == (rounds, num_samples)
    assert_same(softmax.expected.sum(), torch.tensor(float(num_samples), dtype=torch.float64))
    assert (softmax.expected.diff() <= 0).all()
    # The variance of a count is at most its mean; 6 σ, since up to 10,000 words are compared.
    deviation = (softmax.expected / rounds).sqrt()
    assert ((frequencies - softmax.expected).abs() <= 6 * deviation).all()
    assert (frequencies[softmax.expected == 1] == 1).all()


def test_the_estimated_sum_over_the_other_words_is_unbiased():
    generator, softmax = device.generator(3), head(V, 20).double()
    hidden = torch.randn(1, 4, 8, dtype=torch.float64, generator=generator)
    with torch.no_grad():
        softmax.weight.normal_(generator=generator).div_(3)
        softmax.bias.normal_(generator=generator).div_(3)
    targets = torch.tensor([[0, 3, 30, 59]])
    z = softmax(hidden).detach()
    score = z.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    others = z.exp().sum(-1) - score.exp()

    with torch.no_grad():
        losses = [
            torch.stack(
                [softmax.estimated(hidden[:, [i]], targets[:, [i]], drawn, 1.0) for i in range(4)]
            )
            for drawn in (softmax.draw(generator) for _ in range(3000))
        ]
    estimates = torch.stack([((batch + score).exp() - score.exp()) / others for batch in losses])

    error = estimates.std(0) / 3000**0.5
    assert (error < 0.02).all()
    assert ((estimates.mean(0) - 1).abs() < 5 * error).all()


def test_the_loss_is_exact_in_evaluation():
    language = task(5)
    network = language.model.eval()
    logits, _ = network(tokens(1))
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens(2).flatten())

    assert_same(loss(language, tokens(1), tokens(2)).total.float(), 15 * expected)
    assert_same(-network.log_probs(tokens(1), tokens(2))[0].mean(), expected)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_training_halves_the_exact_loss(precision):
    language = task(20, train__precision=precision)
    optimizer = torch.optim.Adam(language.model.parameters(), lr=0.02)
    language.model.eval()
    before = loss(language, tokens(1), tokens(2)).total
    language.model.train()
    for _ in range(60):
        optimizer.zero_grad()
        loss(language, tokens(1), tokens(2)).objective.backward()
        optimizer.step()
    language.model.eval()

    assert loss(language, tokens(1), tokens(2)).total < 0.5 * before


def test_gradients_are_finite_if_only_the_target_was_drawn():
    softmax, generator = head(3, 1, hidden_size=2), device.generator(1)
    hidden = torch.ones(40, 1, 2, requires_grad=True)
    with torch.no_grad():
        softmax.weight.fill_(1)
        softmax.bias.zero_()
    targets = torch.zeros(40, 1, dtype=torch.long)

    losses = [softmax.estimated(hidden, targets, softmax.draw(generator), 1.0) for _ in range(10)]

    assert any(total == 0 for total in losses)
    weights = [hidden, softmax.weight, softmax.bias]
    for gradient in torch.autograd.grad(sum(losses), weights):
        assert gradient.isfinite().all()


def test_a_sample_as_large_as_the_vocabulary_is_the_full_softmax():
    sampled, full = task(V), language_modelling(V, embedding_size=8, hidden_size=8, num_layers=1)

    actual, expected = (loss(each, tokens(1), tokens(2)).objective for each in (sampled, full))

    assert torch.equal(actual, expected)
