import torch
from numerics import assert_same
from torch.nn.functional import binary_cross_entropy, linear

from lmtrain import device
from lmtrain.model.logistic_head import Logistic, log_probs

# Steps, rows, outputs, hidden size.
T, B, F, H = 4, 3, 5, 7


def head() -> Logistic:
    layer = Logistic(H, F)
    layer.initialize(device.generator(1), 0.8)
    return layer.double()


def random_inputs():
    """Hidden states and targets; the last row ends with padding."""
    generator = device.generator(2)
    hidden = torch.randn(T, B, H, dtype=torch.float64, generator=generator)
    targets = torch.randint(0, 2, (T, B, F), generator=generator).to(torch.int8)
    targets[2:, -1] = -1
    return hidden, targets


def expected_losses(layer, hidden, targets):
    """torch's binary cross-entropy of each step, 0 for padding."""
    losses = torch.zeros(T, B, dtype=torch.float64)
    probabilities = linear(hidden, layer.weight, layer.bias).sigmoid()
    for step, row in (targets[..., 0] >= 0).nonzero().tolist():
        labels = targets[step, row].double()
        losses[step, row] = binary_cross_entropy(probabilities[step, row], labels, reduction="sum")
    return losses


def test_the_loss_is_the_binary_cross_entropy_without_padding():
    layer, (hidden, targets) = head(), random_inputs()
    expected = expected_losses(layer, hidden, targets)

    assert_same(layer.log_probs(hidden, targets), -expected)
    assert_same(layer.loss(hidden, targets, 0.25), 0.25 * expected.sum())


def test_gradients_pass_gradcheck_and_equal_torch():
    layer, (hidden, targets) = head(), random_inputs()
    inputs = [hidden.requires_grad_(), layer.weight, layer.bias]

    def total_nats(hidden, weight, bias):
        named = {"weight": weight, "bias": bias}
        logits = torch.func.functional_call(layer, named, (hidden,))
        return -log_probs(logits, targets).sum()

    assert torch.autograd.gradcheck(total_nats, inputs)
    actual = torch.autograd.grad(layer.loss(hidden, targets, 1.0), inputs)
    expected = torch.autograd.grad(expected_losses(layer, hidden, targets).sum(), inputs)
    for gradient, reference in zip(actual, expected, strict=True):
        assert_same(gradient, reference)
    assert not actual[0][2:, -1].any()


def test_large_logits_have_finite_log_probabilities_and_gradients():
    logits = torch.tensor([[[1e4, -1e4]]], requires_grad=True)

    actual = log_probs(logits, torch.tensor([[[0, 1]]]))
    actual.sum().backward()

    assert actual.item() == -2e4
    assert logits.grad.tolist() == [[[-1, 1]]]


def test_initial_weights_are_uniform_within_the_bound_and_biases_are_zero():
    layer = Logistic(100, 50)
    layer.initialize(device.generator(1), None)

    assert layer.weight.abs().max() <= 0.1
    assert layer.weight.abs().max() > 0.099
    assert not layer.bias.any()
