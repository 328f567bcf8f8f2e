import math

import pytest
import torch
from numerics import assert_same

from lmtrain import device
from lmtrain.model.attention import Attention

# T, S, B, M, H, O: of a decoder, and of the encoder that it attends to.
SIZES = [(1, 1, 1, 1, 1, 1), (2, 3, 5, 4, 4, 3), (3, 7, 2, 6, 5, 7)]


def attention(scores, memory_size, hidden_size, output_size, dtype=torch.float64):
    found = Attention(memory_size, hidden_size, output_size, scores)
    found.initialize(device.generator(1), 0.9)
    return found.to(dtype)


def drawn(sizes, dtype=torch.float64):
    """Hidden states, memory and lengths."""
    steps, longest, rows, memory_size, hidden_size, _ = sizes
    generator = device.generator(2)
    hidden = torch.randn(steps, rows, hidden_size, dtype=dtype, generator=generator)
    memory = torch.randn(longest, rows, memory_size, dtype=dtype, generator=generator)
    lengths = torch.randint(1, longest + 1, (rows,), generator=generator)
    lengths[0] = longest
    return hidden, memory, lengths


def naive(layer, hidden, memory, lengths):
    """The equations of the docstring, a number at a time."""
    outputs = torch.zeros(*hidden.shape[:2], len(layer.weight_output), dtype=hidden.dtype)
    weights = torch.zeros(hidden.shape[1], len(hidden), len(memory), dtype=hidden.dtype)
    for row, length in enumerate(lengths.tolist()):
        for step in range(len(hidden)):
            a, scores = hidden[step, row], []
            for place in range(length):
                key = layer.weight_key @ memory[place, row]
                if layer.scores == "dot":
                    scores.append(math.fsum((a * key).tolist()))
                else:
                    both = (layer.weight_query @ a + key).tanh()
                    scores.append(math.fsum((layer.weight_score * both).tolist()))
            total = math.fsum(map(math.exp, scores))
            context = torch.zeros_like(memory[0, row])
            for place, score in enumerate(scores):
                weights[row, step, place] = math.exp(score) / total
                context += weights[row, step, place] * memory[place, row]
            outputs[step, row] = (layer.weight_output @ torch.cat([context, a])).tanh()
    return outputs, weights


@pytest.mark.parametrize("scores", ["dot", "additive"])
@pytest.mark.parametrize("sizes", SIZES)
def test_it_agrees_with_its_equations(scores, sizes):
    layer, inputs = attention(scores, *sizes[3:]), drawn(sizes)

    outputs, weights = layer(*inputs)

    with torch.no_grad():
        expected = naive(layer, *inputs)
    assert_same(outputs, expected[0])
    assert_same(weights, expected[1])


@pytest.mark.parametrize("scores", ["dot", "additive"])
def test_weights_are_a_distribution_over_the_source_alone(scores):
    layer, (hidden, memory, lengths) = attention(scores, 6, 5, 7), drawn(SIZES[-1])
    outputs, weights = layer(hidden, memory, lengths)
    is_beyond = torch.arange(len(memory)).unsqueeze(1) >= lengths
    assert is_beyond.any()

    changed, _ = layer(hidden, memory.masked_fill(is_beyond.unsqueeze(2), 1e30), lengths)

    assert_same(weights.sum(-1), torch.ones_like(weights[..., 0]))
    assert not weights.transpose(1, 2)[is_beyond.T].any()
    assert_same(changed, outputs)


@pytest.mark.parametrize("scores", ["dot", "additive"])
def test_gradients_are_those_of_finite_differences(scores):
    layer, (hidden, memory, lengths) = attention(scores, 4, 4, 3), drawn(SIZES[1])
    names = [name for name, _ in layer.named_parameters()]

    def outputs(hidden, memory, *weights):
        named = dict(zip(names, weights, strict=True))
        return torch.func.functional_call(layer, named, (hidden, memory, lengths))

    inputs = [each.detach().requires_grad_() for each in (hidden, memory, *layer.parameters())]
    assert torch.autograd.gradcheck(outputs, inputs)


@pytest.mark.parametrize("scores", ["dot", "additive"])
def test_in_bf16_the_weights_are_summed_in_fp32(scores):
    hidden, memory, lengths = drawn(SIZES[-1])
    layer = attention(scores, 6, 5, 7, torch.float32)

    outputs, weights = layer(hidden.bfloat16(), memory.bfloat16(), lengths)

    exact, _ = layer(hidden.bfloat16().float(), memory.bfloat16().float(), lengths)
    assert (outputs.dtype, weights.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
    # Eight bits of a number survive each of half a dozen roundings.
    torch.testing.assert_close(outputs.float(), exact, rtol=0, atol=0.05)
