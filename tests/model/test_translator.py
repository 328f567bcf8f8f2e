import pytest
import torch
from numerics import assert_same

from lmtrain import config, device
from lmtrain.data.tokenizer import EOS, UNK, Tokenizer
from lmtrain.model.recurrent import State
from lmtrain.model.translator import Bridge, Translator
from lmtrain.tasks.inputs import TextInputs
from lmtrain.tasks.translate import ParallelData, Translation

END = 1
LENGTHS = torch.tensor([4, 1, 3])


def translator(**changes) -> Translator:
    vocabulary = TextInputs(Tokenizer([UNK, EOS, *"abcdef"]))
    chosen = config.load(
        overrides={
            "data.task": "translate", "train.precision": "fp32", "model.hidden_size": 5,
            **{f"model.{name}": value for name, value in changes.items()},
        }
    )  # fmt: skip
    return Translation.build(chosen, ParallelData(vocabulary, vocabulary)).double()


def random_tensor(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=device.generator(4))


def state(layers=2, parts=2, rows=3, size=5) -> State:
    """The final state of a bidirectional encoder: layer by layer, forward then backward."""
    values = random_tensor(2 * layers, parts, rows, size)
    return State([tuple(part) for part in values])


def bridge(layers=2, parts=2, size=5) -> Bridge:
    layer = Bridge(size, layers * parts)
    layer.initialize(device.generator(1), 0.7)
    return layer.double()


@pytest.mark.parametrize("parts", [1, 2])
def test_a_bridge_maps_both_directions_of_each_layer(parts):
    layers, last = bridge(parts=parts), state(parts=parts)

    first = layers(last)

    assert len(first) == 2
    for layer in range(2):
        for part in range(parts):
            weight = layers.weight[layer * parts + part]
            expected = torch.zeros(3, 5, dtype=torch.float64)
            for row in range(3):
                forward, backward = last[2 * layer][part][row], last[2 * layer + 1][part][row]
                expected[row] = weight[:, :5] @ forward + weight[:, 5:] @ backward
            assert_same(first[layer][part], expected)


def test_gradients_of_a_bridge_pass_gradcheck():
    layers, last = bridge(), state()
    inputs = [part.detach().requires_grad_() for parts in last for part in parts]

    def outputs(weight, *parts):
        pairs = State(list(zip(parts[::2], parts[1::2], strict=True)))
        first = torch.func.functional_call(layers, {"weight": weight}, (pairs,))
        return tuple(part for parts in first for part in parts)

    assert torch.autograd.gradcheck(outputs, [layers.weight, *inputs])


SHAPES = [
    {"attention": "dot"},
    {"attention": "dot", "bidirectional": True},
    {"attention": "additive", "bidirectional": True, "cell": "gru", "num_layers": 1},
    {"attention": "none", "bidirectional": True},
    {"attention": "none"},
]


@pytest.mark.parametrize("changes", SHAPES)
def test_hidden_states_depend_on_previous_tokens_only(changes):
    model = translator(**changes)
    sources = torch.randint(2, 8, (4, 3), generator=device.generator(2))
    sources = sources.masked_fill(torch.arange(4).unsqueeze(1) >= LENGTHS, -1)
    targets = torch.randint(2, 8, (5, 3), generator=device.generator(3))
    hidden = model.hidden(sources, LENGTHS, targets, END)

    changed = targets.clone()
    changed[2:] = 2 + (changed[2:] - 1) % 6
    other = model.hidden(sources, LENGTHS, changed, END)

    assert_same(other[:3], hidden[:3])
    assert ((other[3] - hidden[3]).abs().amax(-1) > 1e-6).all()


@pytest.mark.parametrize("changes", SHAPES)
def test_every_weight_has_a_gradient(changes):
    model = translator(**changes)
    sources, targets = (
        torch.randint(2, 8, shape, generator=device.generator(2)) for shape in ((4, 3), (5, 3))
    )

    hidden = model.hidden(sources, torch.full((3,), 4), targets, END)
    model.head.loss(hidden, targets, 1.0).backward()

    for name, weight in model.named_parameters():
        assert weight.grad is not None, name
        assert weight.grad.any(), name


def test_without_attention_the_decoder_ignores_the_memory():
    model = translator(attention="none")
    memory, last = model.encode(torch.tensor([[2], [3], [4]]), torch.tensor([3]))

    with_it, _ = model.decode(torch.tensor([[END]]), memory, last)
    without, _ = model.decode(
        torch.tensor([[END]]), memory._replace(hidden=memory.hidden * 9), last
    )

    assert_same(without, with_it)


def test_the_decoder_starts_from_the_final_state_of_the_encoder():
    model = translator(bidirectional=False)
    sources = torch.tensor([[2], [3], [4]])

    _, first = model.encode(sources, torch.tensor([3]))

    _, last = model.encoder(sources, None, torch.tensor([3]))
    for parts, expected in zip(first, last, strict=True):
        for part, expected_part in zip(parts, expected, strict=True):
            assert_same(part, expected_part)


def test_a_memory_repeats_each_row_in_succession():
    memory, _ = translator().encode(torch.tensor([[2, 3], [4, -1]]), torch.tensor([2, 1]))

    twice = memory.repeated(2)

    assert twice.lengths.tolist() == [2, 2, 1, 1]
    assert_same(twice.hidden[:, 1], memory.hidden[:, 0])
    assert_same(twice.hidden[:, 2], memory.hidden[:, 1])
