import pytest
import torch
from numerics import assert_same

from lmtrain import device
from lmtrain.errors import ConfigError
from lmtrain.kernels import cross_entropy
from lmtrain.kernels.native import library


def example(vocab_size: int) -> tuple[torch.Tensor, ...]:
    generator = device.generator(1)
    hidden = torch.randn(5, 3, 4, dtype=torch.float64, generator=generator)
    weight = torch.randn(vocab_size, 4, dtype=torch.float64, generator=generator)
    bias = torch.randn(vocab_size, dtype=torch.float64, generator=generator)
    return hidden, weight, bias, torch.randint(0, vocab_size, (5, 3), generator=generator)


def naive_log_likelihood(hidden, weight, bias, targets):
    probabilities = (hidden @ weight.T + bias).exp()
    probabilities = probabilities / probabilities.sum(-1, keepdim=True)
    return probabilities.gather(-1, targets.unsqueeze(-1)).squeeze(-1).log()


def gradients(loss, arguments):
    hidden, weight, bias, _ = arguments
    return torch.autograd.grad(loss, [hidden, weight, bias])


def requiring_grad(arguments):
    return [tensor.requires_grad_() for tensor in arguments[:3]] + [arguments[3]]


def assert_gradients(actual, expected):
    for gradient, reference in zip(actual, expected, strict=True):
        assert_same(gradient, reference.to(gradient.dtype))


def test_the_loss_is_the_sum_of_minus_log_p():
    arguments = requiring_grad(example(11))

    loss = cross_entropy.cross_entropy(*arguments, 0.25)

    expected = -naive_log_likelihood(*arguments).sum() * 0.25
    assert_same(loss, expected)
    assert_gradients(gradients(loss, arguments), gradients(expected, arguments))


def test_gradients_are_multiplied_by_the_upstream_gradient():
    arguments = requiring_grad(example(11))

    actual = gradients(3 * cross_entropy.cross_entropy(*arguments, 1.0), arguments)

    assert_gradients(actual, gradients(-3 * naive_log_likelihood(*arguments).sum(), arguments))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("vocab_size", [1, 2, 16, 33, 1000])
@pytest.mark.parametrize("max_bytes", [1, 4000, 1 << 25])
def test_chunked_losses_with_padding_equal_the_whole_loss(
    dtype, vocab_size, max_bytes, monkeypatch
):
    monkeypatch.setattr(cross_entropy, "_MAX_CHUNK_BYTES", max_bytes)
    monkeypatch.setattr(cross_entropy, "_MAX_SLICE_BYTES", 800)
    arguments = requiring_grad(example(vocab_size))
    arguments[3][1, 2] = arguments[3][4, 0] = -1
    has_target = arguments[3] >= 0
    expected = -naive_log_likelihood(*arguments[:3], arguments[3].clamp(min=0))[has_target].sum()
    converted = requiring_grad(
        [tensor.detach().to(dtype) for tensor in arguments[:3]] + [arguments[3]]
    )

    loss = cross_entropy.cross_entropy(*converted, 1.0)

    assert_same(loss, expected.to(dtype))
    assert_gradients(gradients(loss, converted), gradients(expected, arguments))


@pytest.mark.skipif(not library.has_bf16(), reason="no bf16 products on this processor")
def test_bf16_is_near_float64(monkeypatch):
    monkeypatch.setattr(cross_entropy, "_MAX_CHUNK_BYTES", 4000)
    arguments = requiring_grad(example(500))
    hidden, weight, bias = (tensor.detach().float() for tensor in arguments[:3])
    converted = requiring_grad([hidden.bfloat16(), weight, bias, arguments[3]])
    expected = -naive_log_likelihood(*arguments).sum()

    loss = cross_entropy.cross_entropy(*converted, 1.0)

    assert abs(float(loss.detach() / expected.detach()) - 1) < 1e-3
    pairs = zip(gradients(loss, converted), gradients(expected, arguments), strict=True)
    for actual, reference in pairs:
        assert (actual.double() - reference).norm() < 1e-2 * reference.norm()


def test_chunked_log_likelihoods_equal_the_definition(monkeypatch):
    arguments = example(11)
    monkeypatch.setattr(cross_entropy, "_MAX_CHUNK_BYTES", 44)

    assert_same(cross_entropy.log_likelihood(*arguments), naive_log_likelihood(*arguments))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_large_logits_have_a_finite_loss(dtype):
    hidden, weight, bias, targets = example(3)
    arguments = [hidden.to(dtype) * 1e6, weight.to(dtype), bias.to(dtype), targets]

    assert cross_entropy.cross_entropy(*requiring_grad(arguments), 1.0).isfinite()


def test_a_target_outside_the_vocabulary_is_refused():
    hidden, weight, bias, targets = example(3)

    with pytest.raises(ConfigError, match="target 3: the vocabulary has 3 tokens"):
        cross_entropy.cross_entropy(hidden.float(), weight.float(), bias.float(), targets + 1, 1.0)


def sampled_example(num_words: int) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Operands with gradients, in float64, and which words are targets."""
    generator = device.generator(2)
    shapes = [(7, 4), (num_words, 4), (num_words,), (7, 4), (7,)]
    operands = [
        torch.randn(*shape, dtype=torch.float64, generator=generator, requires_grad=True)
        for shape in shapes
    ]
    return operands, torch.rand(7, num_words, generator=generator) < 0.2


def naive_sampled_loss(operands, is_target):
    hidden, weight, bias, target_weight, target_bias = operands
    score = (hidden * target_weight).sum(1) + target_bias
    others = (hidden @ weight.T + bias).exp().masked_fill(is_target, 0).sum(1)
    return ((score.exp() + others).log() - score).sum()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num_words", [1, 15, 16, 333])
def test_the_sampled_loss_equals_its_definition(num_words, dtype):
    if dtype == torch.bfloat16 and not library.has_bf16():
        pytest.skip("no bf16 products on this processor")
    operands, is_target = sampled_example(num_words)
    # Biases stay fp32 if operands of products are bf16.
    dtypes = {1: torch.float32 if dtype == torch.bfloat16 else dtype, 2: dtype}
    converted = [
        operand.detach().to(dtypes[operand.dim()]).requires_grad_() for operand in operands
    ]
    expected = naive_sampled_loss(operands, is_target)

    loss = cross_entropy.sampled_cross_entropy(*converted, is_target, 0.25)

    pairs = [(loss, 0.25 * expected)]
    pairs += zip(
        torch.autograd.grad(loss, converted),
        torch.autograd.grad(0.25 * expected, operands),
        strict=True,
    )
    for actual, reference in pairs:
        if dtype == torch.bfloat16:
            assert (actual.double() - reference).norm() < 2e-2 * reference.norm()
        else:
            assert_same(actual, reference.to(actual.dtype))
