import copy

import pytest
import torch
from numerics import assert_same
from torch.utils import _pytree as pytree

from lmtrain import device
from lmtrain.cells import GRU, LSTM, RNN, PeepholeLSTM, SimpleGRU
from lmtrain.errors import CheckpointError
from lmtrain.model.dropout import Dropout
from lmtrain.model.generator import ModelGenerator
from lmtrain.model.recurrent import Recurrent, State


def stack(cell=LSTM, dropout=0.0, **options) -> Recurrent:
    generator = ModelGenerator(1)

    def make_cell(input_size, hidden_size):
        layer = cell(input_size, hidden_size)
        layer.initialize(generator.generator, 0.5, 1.0)
        return layer

    layers = Recurrent(make_cell, 3, [5, 5], Dropout(dropout, generator), **options)
    return layers.double()


def inputs() -> torch.Tensor:
    return torch.randn(6, 2, 3, dtype=torch.float64, generator=device.generator(2))


def test_deep_layers_agree_with_torch():
    layers = stack()
    reference = torch.nn.LSTM(3, 5, 2, dtype=torch.float64)
    with torch.no_grad():
        for layer, cell in enumerate(layers.cells):
            for name, parameter in (
                ("weight_ih", cell.weight_input),
                ("weight_hh", cell.weight_recurrent),
                ("bias_ih", cell.bias),
            ):
                g, i, f, o = parameter.chunk(4)
                getattr(reference, f"{name}_l{layer}").copy_(torch.cat([i, f, g, o]))
            getattr(reference, f"bias_hh_l{layer}").zero_()

    hidden, state = layers(inputs())
    expected, (a, c) = reference(inputs())

    assert_same(hidden, expected)
    for layer in range(2):
        assert_same(state[layer][0], a[layer])
        assert_same(state[layer][1], c[layer])


def test_both_directions_agree_with_torch():
    layers = stack(is_bidirectional=True)
    reference = torch.nn.LSTM(3, 5, 2, bidirectional=True, dtype=torch.float64)
    with torch.no_grad():
        for index, cell in enumerate(layers.cells):
            suffix = f"l{index // 2}{'_reverse' if index % 2 else ''}"
            for name, parameter in (
                ("weight_ih", cell.weight_input),
                ("weight_hh", cell.weight_recurrent),
                ("bias_ih", cell.bias),
            ):
                g, i, f, o = parameter.chunk(4)
                getattr(reference, f"{name}_{suffix}").copy_(torch.cat([i, f, g, o]))
            getattr(reference, f"bias_hh_{suffix}").zero_()

    hidden, _ = layers(inputs())

    assert hidden.shape == (6, 2, 10)
    assert_same(hidden, reference(inputs())[0])


def test_the_state_carries_from_one_call_to_the_next():
    layers = stack(GRU)
    whole, _ = layers(inputs())

    first, state = layers(inputs()[:2])
    second, _ = layers(inputs()[2:], state)

    assert_same(torch.cat([first, second]), whole)


def test_rows_of_a_batch_are_independent():
    layers = stack(GRU)
    changed = inputs()
    changed[:, 1] += 1

    assert torch.equal(layers(inputs())[0][:, 0], layers(changed)[0][:, 0])


def test_a_detached_state_requires_no_gradient():
    _, state = stack()(inputs().requires_grad_())

    assert all(part.requires_grad for parts in state for part in parts)
    assert not any(part.requires_grad for parts in state.detach() for part in parts)
    assert isinstance(state.detach(), State)


def test_dropout_between_layers_acts_in_training_only():
    layers = stack(dropout=0.5)

    noisy, other = layers(inputs())[0], layers(inputs())[0]

    assert not torch.equal(noisy, other)
    assert torch.equal(layers.eval()(inputs())[0], stack()(inputs())[0])


def test_layers_may_have_different_sizes():
    layers = Recurrent(LSTM, 3, [5, 7, 2], Dropout(0.0, ModelGenerator(1)))

    hidden, state = layers(inputs().float())

    assert hidden.shape == (6, 2, 2)
    assert [parts[0].shape[1] for parts in state] == [5, 7, 2]


def test_a_residual_layer_adds_its_input():
    plain, residual = stack(), stack(is_residual=True)
    first, _ = Recurrent.forward(_only_first(plain), inputs())

    assert_same(residual(inputs())[0], plain(inputs())[0] + first)


def _only_first(layers):
    layers = copy.deepcopy(layers)
    del layers.cells[1:]
    return layers


@pytest.mark.parametrize("cell", [RNN, SimpleGRU, GRU, LSTM, PeepholeLSTM])
def test_weight_dropout_equals_a_cell_with_the_masked_weights(cell):
    layers = stack(cell, weight_dropout=0.5)
    generator_state = layers.dropout.generator.generator.get_state()
    hidden, _ = layers(inputs())
    (gradient,) = torch.autograd.grad(hidden.sum(), layers.cells[0].weight_recurrent)
    layers.dropout.generator.generator.set_state(generator_state)
    reference = copy.deepcopy(layers).eval()
    kept = []
    for masked_cell, original in zip(reference.cells, layers.cells, strict=True):
        weights = layers._weights(original)
        masked = {name for name in weights if weights[name] is not original.get_parameter(name)}
        assert masked == {"weight_recurrent", "weight_peephole"} & set(weights)
        kept.append(weights["weight_recurrent"] != 0)
        masked_cell.load_state_dict({name: weight.detach() for name, weight in weights.items()})
    expected, _ = reference(inputs())
    (exact,) = torch.autograd.grad(expected.sum(), reference.cells[0].weight_recurrent)

    assert_same(hidden, expected)
    assert_same(gradient, 2 * exact * kept[0])
    assert 0.3 < kept[0].double().mean() < 0.7


def test_a_state_is_a_pytree():
    _, state = stack(LSTM)(inputs())
    stacked = state.map(lambda part: torch.stack([part, 2 * part]))

    assert len(pytree.tree_leaves(state)) == 4
    assert isinstance(pytree.tree_map(torch.sin, state), State)
    halved = torch.vmap(lambda row: row.map(lambda part: part / 2))(stacked)
    assert isinstance(halved, State)
    assert torch.equal(halved[1][1][1], state[1][1])


def test_compiled_methods_of_a_state_return_a_state():
    _, state = stack(LSTM)(inputs())
    state = state.detach()

    def run(state, other, condition):
        return state.map(torch.sin).where(condition, other).detach()

    compiled = torch.compile(run, fullgraph=True, backend="eager")
    for condition in (torch.tensor(True), torch.tensor(False)):
        actual, expected = (function(state, state, condition) for function in (compiled, run))
        assert isinstance(actual, State)
        assert all(map(torch.equal, pytree.tree_leaves(actual), pytree.tree_leaves(expected)))


def test_a_state_is_restored_from_its_named_parts():
    _, state = stack(LSTM)(inputs())

    assert list(state.named()) == [f"{i}/{j}" for i in range(2) for j in range(2)]
    assert all(map(torch.equal, state.restored(state.named())[1], state[1]))
    assert state.restored({}) is None
    with pytest.raises(CheckpointError, match="0/1 does not fit the model"):
        state.restored({"0/0": state[0][0]})
