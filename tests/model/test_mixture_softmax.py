import pytest
import torch
from numerics import assert_same

from lmtrain import device
from lmtrain.model.language_model import LanguageModel
from lmtrain.model.mixture_softmax import MixtureSoftmax


def model(**changes) -> LanguageModel:
    arguments = {
        "embedding_size": 8, "hidden_size": 12, "num_layers": 2, "num_mixtures": 3, **changes,
    }  # fmt: skip
    return LanguageModel(30, softmax="mixture", **arguments)


def tokens(seed: int) -> torch.Tensor:
    return torch.randint(0, 30, (5, 3), generator=device.generator(seed))


def test_it_is_the_mixture_of_its_definition():
    head = MixtureSoftmax(4, 6, 3).double()
    chance = device.generator(1)
    head.initialize(chance, 0.5)
    hidden = torch.randn(2, 5, 4, dtype=torch.float64, generator=chance)
    weight = torch.randn(9, 6, dtype=torch.float64, generator=chance)
    bias = torch.randn(9, dtype=torch.float64, generator=chance)
    prior = (hidden @ head.weight_prior.T).softmax(-1)
    expected = torch.zeros(2, 5, 9, dtype=torch.float64)
    for k in range(3):
        rows = slice(6 * k, 6 * k + 6)
        h = torch.tanh(hidden @ head.weight_latent[rows].T + head.bias_latent[rows])
        expected += prior[..., k : k + 1] * (h @ weight.T + bias).softmax(-1)

    assert_same(head(hidden, weight, bias).exp(), expected)
    targets = torch.randint(0, 9, (2, 5), generator=chance)
    of_targets = expected.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    assert_same(head.log_likelihood(hidden, targets, weight, bias).exp(), of_targets)


def test_pieces_of_rows_change_nothing(monkeypatch):
    gradients = []
    for most in (64 << 20, 2 * 4 * 30 * 3):
        monkeypatch.setattr("lmtrain.model.mixture_softmax._MOST_BYTES", most)
        network = model().double()
        loss = network.loss(tokens(1), tokens(2)).objective
        gradients.append([loss, *torch.autograd.grad(loss, list(network.parameters()))])

    for whole, pieces in zip(*gradients, strict=True):
        assert_same(pieces, whole)


@pytest.mark.parametrize("is_tied", [False, True])
def test_the_loss_is_that_of_the_probabilities(is_tied):
    network = model(tied_embeddings=is_tied)
    log_probs, _ = network(tokens(1))
    expected = torch.nn.functional.nll_loss(log_probs.flatten(0, 1), tokens(2).flatten())

    assert_same(network.loss(tokens(1), tokens(2)).nats, 5 * expected)
    assert_same(log_probs.exp().sum(-1), torch.ones(5, 3))


def test_it_learns_in_either_precision():
    for is_mixed in (False, True):
        network = model(is_mixed=is_mixed)
        rule = torch.optim.Adam(network.parameters(), lr=0.02)
        losses = []
        for _ in range(40):
            rule.zero_grad()
            loss = network.loss(tokens(1), tokens(2)).objective
            loss.backward()
            rule.step()
            losses.append(float(loss.detach()))

        assert losses[-1] < 0.5 * losses[0]
