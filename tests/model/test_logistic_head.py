import torch
from numerics import assert_same
from torch.nn.functional import binary_cross_entropy, linear

from lmtrain import device
from lmtrain.model.logistic_head import Logistic, log_probs

# Steps, rows, outputs, numbers of a hidden state.
T, B, F, H = 4, 3, 5, 7


def head() -> Logistic:
    found = Logistic(H, F)
    found.initialize(device.generator(1), 0.8)
    return found.double()


def drawn():
    """Hidden states, and targets of which the last row's end is padding."""
    generator = device.generator(2)
    hidden = torch.randn(T, B, H, dtype=torch.float64, generator=generator)
    targets = torch.randint(0, 2, (T, B, F), generator=generator).to(torch.int8)
    targets[2:, -1] = -1
    return hidden, targets


def expected(layer, hidden, targets):
    """Nats of each step, torch's own on steps that are no padding."""
    found = torch.zeros(T, B, dtype=torch.float64)
    likelihoods = linear(hidden, layer.weight, layer.bias).sigmoid()
    for place in (targets[..., 0] >= 0).nonzero().tolist():
        step, row = place
        truth = targets[step, row].double()
        found[step, row] = binary_cross_entropy(likelihoods[step, row], truth, reduction="sum")
    return found


def test_nats_are_torchs_binary_cross_entropy_without_the_padding():
    layer, (hidden, targets) = head(), drawn()
    truth = expected(layer, hidden, targets)

    assert_same(layer.log_probs(hidden, targets), -truth)
    assert_same(layer.nats(hidden, targets, 0.25), 0.25 * truth.sum())


def test_gradients_are_those_of_finite_differences_and_of_torch():
    layer, (hidden, targets) = head(), drawn()
    inputs = [hidden.requires_grad_(), layer.weight, layer.bias]

    def nats(hidden, weight, bias):
        named = {"weight": weight, "bias": bias}
        logits = torch.func.functional_call(layer, named, (hidden,))
        return -log_probs(logits, targets).sum()

    assert torch.autograd.gradcheck(nats, inputs)
    ours = torch.autograd.grad(layer.nats(hidden, targets, 1.0), inputs)
    theirs = torch.autograd.grad(expected(layer, hidden, targets).sum(), inputs)
    for our, their in zip(ours, theirs, strict=True):
        assert_same(our, their)
    assert not ours[0][2:, -1].any()


def test_certain_logits_have_finite_nats_and_gradients():
    logits = torch.tensor([[[1e4, -1e4]]], requires_grad=True)

    found = log_probs(logits, torch.tensor([[[0, 1]]]))
    found.sum().backward()

    assert found.item() == -2e4
    assert logits.grad.tolist() == [[[-1, 1]]]


def test_first_weights_are_uniform_in_their_range_and_biases_zero():
    layer = Logistic(100, 50)
    layer.initialize(device.generator(1), None)

    assert layer.weight.abs().max() <= 0.1
    assert layer.weight.abs().max() > 0.099
    assert not layer.bias.any()
