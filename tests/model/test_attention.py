import math

import pytest
import torch
from numerics import assert_same

from lmtrain import device
from lmtrain.model.attention import Attention

# T, S, B, M, H, O as in the docstring of Attention.
SIZES = [(1, 1, 1, 1, 1, 1), (2, 3, 5, 4, 4, 3), (3, 7, 2, 6, 5, 7)]


def attention(scores, memory_size, hidden_size, output_size, dtype=torch.float64):
    layer = Attention(memory_size, hidden_size, output_size, scores)
    layer.initialize(device.generator(1), 0.9)
    return layer.to(dtype)


def random_inputs(sizes, dtype=torch.float64):
    """Hidden states, memory and lengths; the first row has the full length."""
    steps, source_steps, rows, memory_size, hidden_size, _ = sizes
    generator = device.generator(2)
    hidden = torch.randn(steps, rows, hidden_size, dtype=dtype, generator=generator)
    memory = torch.randn(source_steps, rows, memory_size, dtype=dtype, generator=generator)
    lengths = torch.randint(1, source_steps + 1, (rows,), generator=generator)
    lengths[0] = source_steps
    return hidden, memory, lengths


def naive(layer, hidden, memory, lengths):
    """The equations of the docstring, one row, step and position at a time."""
    outputs = torch.zeros(*hidden.shape[:2], len(layer.weight_output), dtype=hidden.dtype)
    weights = torch.zeros(hidden.shape[1], len(hidden), len(memory), dtype=hidden.dtype)
    for row, length in enumerate(lengths.tolist()):
        for step in range(len(hidden)):
            a, scores = hidden[step, row], []
            for position in range(length):
                key = layer.weight_key @ memory[position, row]
                if layer.scores == "dot":
                    scores.append(math.fsum((a * key).tolist()))
                else:
                    activation = (layer.weight_query @ a + key).tanh()
                    scores.append(math.fsum((layer.weight_score * activation).tolist()))
            total = math.fsum(map(math.exp, scores))
            context = torch.zeros_like(memory[0, row])
            for position, score in enumerate(scores):
                weights[row, step, position] = math.exp(score) / total
                context += weights[row, step, position] * memory[position, row]
            outputs[step, row] = (layer.weight_output @ torch.cat([context, a])).tanh()
    return outputs, weights


@pytest.mark.parametrize("scores", ["dot", "additive"])
@pytest.mark.parametrize("sizes", SIZES)
def test_outputs_and_weights_equal_the_equations(scores, sizes):
    layer, inputs = attention(scores, *sizes[3:]), random_inputs(sizes)

    outputs, weights = layer(*inputs)

    with torch.no_grad():
        expected = naive(layer, *inputs)
    assert_same(outputs, expected[0])
    assert_same(weights, expected[1])


@pytest.mark.parametrize("scores", ["dot", "additive"])
def test_weights_sum_to_one_and_ignore_padding(scores):
    layer, (hidden, memory, lengths) = attention(scores, 6, 5, 7), random_inputs(SIZES[-1])
    outputs, weights = layer(hidden, memory, lengths)
    is_padding = torch.arange(len(memory)).unsqueeze(1) >= lengths
    assert is_padding.any()

    changed, _ = layer(hidden, memory.masked_fill(is_padding.unsqueeze(2), 1e30), lengths)

    assert_same(weights.sum(-1), torch.ones_like(weights[..., 0]))
    assert not weights.transpose(1, 2)[is_padding.T].any()
    assert_same(changed, outputs)


@pytest.mark.parametrize("scores", ["dot", "additive"])
def test_gradients_pass_gradcheck(scores):
    layer, (hidden, memory, lengths) = attention(scores, 4, 4, 3), random_inputs(SIZES[1])
    names = [name for name, _ in layer.named_parameters()]

    def outputs(hidden, memory, *weights):
        named = dict(zip(names, weights, strict=True))
        return torch.func.functional_call(layer, named, (hidden, memory, lengths))

    inputs = [each.detach().requires_grad_() for each in (hidden, memory, *layer.parameters())]
    assert torch.autograd.gradcheck(outputs, inputs)


@pytest.mark.parametrize("scores", ["dot", "additive"])
def test_bf16_inputs_have_fp32_weights(scores):
    hidden, memory, lengths = random_inputs(SIZES[-1])
    layer = attention(scores, 6, 5, 7, torch.float32)

    outputs, weights = layer(hidden.bfloat16(), memory.bfloat16(), lengths)

    exact, _ = layer(hidden.bfloat16().float(), memory.bfloat16().float(), lengths)
    assert (outputs.dtype, weights.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
    # Half a dozen roundings to the eight significant bits of bf16.
    torch.testing.assert_close(outputs.float(), exact, rtol=0, atol=0.05)
