import torch
from numerics import assert_same

from lmtrain import device
from lmtrain.kernels import cross_entropy


def example(vocab_size: int) -> tuple[torch.Tensor, ...]:
    chance = device.generator(1)
    hidden = torch.randn(5, 3, 4, dtype=torch.float64, generator=chance)
    weight = torch.randn(vocab_size, 4, dtype=torch.float64, generator=chance)
    bias = torch.randn(vocab_size, dtype=torch.float64, generator=chance)
    return hidden, weight, bias, torch.randint(0, vocab_size, (5, 3), generator=chance)


def naive(hidden, weight, bias, targets):
    probabilities = (hidden @ weight.T + bias).exp()
    probabilities = probabilities / probabilities.sum(-1, keepdim=True)
    return probabilities.gather(-1, targets.unsqueeze(-1)).squeeze(-1).log()


def test_the_loss_is_the_mean_of_minus_log_p():
    given = example(11)

    assert_same(cross_entropy.mean_cross_entropy(*given), -naive(*given).mean())


def test_log_likelihood_is_the_same_in_pieces(monkeypatch):
    given = example(11)
    monkeypatch.setattr(cross_entropy, "_MOST_LOGITS", 44)

    assert_same(cross_entropy.log_likelihood(*given), naive(*given))


def test_large_logits_stay_finite():
    hidden, weight, bias, targets = example(3)

    assert cross_entropy.mean_cross_entropy(hidden * 1e6, weight, bias, targets).isfinite()
