import pytest
import torch
from numerics import assert_same

from lmtrain import device
from lmtrain.errors import ConfigError
from lmtrain.kernels import cross_entropy
from lmtrain.kernels.native import library


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


def gradients(loss, given):
    hidden, weight, bias, _ = given
    return torch.autograd.grad(loss, [hidden, weight, bias])


def wanting(given):
    return [tensor.requires_grad_() for tensor in given[:3]] + [given[3]]


def test_the_loss_is_the_sum_of_minus_log_p():
    given = wanting(example(11))

    loss = cross_entropy.cross_entropy(*given, 0.25)

    expected = -naive(*given).sum() * 0.25
    assert_same(loss, expected)
    for ours, truth in zip(gradients(loss, given), gradients(expected, given), strict=True):
        assert_same(ours, truth)


def test_a_loss_inside_an_expression_has_its_factor():
    given = wanting(example(11))

    found = gradients(3 * cross_entropy.cross_entropy(*given, 1.0), given)

    for ours, truth in zip(found, gradients(-3 * naive(*given).sum(), given), strict=True):
        assert_same(ours, truth)


@pytest.mark.parametrize("kind", [torch.float64, torch.float32])
@pytest.mark.parametrize("vocab_size", [1, 2, 16, 33, 1000])
@pytest.mark.parametrize("most_bytes", [1, 4000, 1 << 25])
def test_pieces_padding_and_types_change_nothing(kind, vocab_size, most_bytes, monkeypatch):
    monkeypatch.setattr(cross_entropy, "_MOST_BYTES", most_bytes)
    monkeypatch.setattr(cross_entropy, "_SLICE_BYTES", 800)
    given = wanting(example(vocab_size))
    given[3][1, 2] = given[3][4, 0] = -1
    known = given[3] >= 0
    expected = -naive(*given[:3], given[3].clamp(min=0))[known].sum()
    typed = wanting([tensor.detach().to(kind) for tensor in given[:3]] + [given[3]])

    loss = cross_entropy.cross_entropy(*typed, 1.0)

    assert_same(loss, expected.to(kind))
    for ours, truth in zip(gradients(loss, typed), gradients(expected, given), strict=True):
        assert_same(ours, truth.to(kind))


@pytest.mark.skipif(not library.has_bf16(), reason="no bf16 products on this processor")
def test_bf16_is_near(monkeypatch):
    monkeypatch.setattr(cross_entropy, "_MOST_BYTES", 4000)
    given = wanting(example(500))
    hidden, weight, bias = (tensor.detach().float() for tensor in given[:3])
    typed = wanting([hidden.bfloat16(), weight, bias, given[3]])
    expected = -naive(*given).sum()

    loss = cross_entropy.cross_entropy(*typed, 1.0)

    assert abs(float(loss.detach() / expected.detach()) - 1) < 1e-3
    for ours, truth in zip(gradients(loss, typed), gradients(expected, given), strict=True):
        assert (ours.double() - truth).norm() < 1e-2 * truth.norm()


def test_log_likelihood_is_the_same_in_pieces(monkeypatch):
    given = example(11)
    monkeypatch.setattr(cross_entropy, "_MOST_BYTES", 44)

    assert_same(cross_entropy.log_likelihood(*given), naive(*given))


@pytest.mark.parametrize("kind", [torch.float64, torch.float32])
def test_large_logits_stay_finite(kind):
    hidden, weight, bias, targets = example(3)
    given = [hidden.to(kind) * 1e6, weight.to(kind), bias.to(kind), targets]

    assert cross_entropy.cross_entropy(*wanting(given), 1.0).isfinite()


def test_a_target_that_is_no_token_is_refused():
    hidden, weight, bias, targets = example(3)

    with pytest.raises(ConfigError, match="a target of 3: there are 3 tokens"):
        cross_entropy.cross_entropy(hidden.float(), weight.float(), bias.float(), targets + 1, 1.0)
