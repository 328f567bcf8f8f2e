import torch
from numerics import assert_same

from lmtrain import device
from lmtrain.cells import GRU, LSTM
from lmtrain.model.recurrent import Recurrent, State


def stack(cell=LSTM, dropout=0.0, is_bidirectional=False) -> Recurrent:
    chance = device.generator(1)

    def make(size):
        each = cell(size, 5)
        each.initialize(chance, 0.5, 1.0)
        return each

    layers = Recurrent(make, 3, 2, dropout, chance, is_bidirectional=is_bidirectional)
    return layers.double()


def inputs() -> torch.Tensor:
    return torch.randn(6, 2, 3, dtype=torch.float64, generator=device.generator(2))


def test_deep_layers_agree_with_torch():
    ours = stack()
    theirs = torch.nn.LSTM(3, 5, 2, dtype=torch.float64)
    with torch.no_grad():
        for layer, cell in enumerate(ours.cells):
            for name, parameter in (
                ("weight_ih", cell.weight_input),
                ("weight_hh", cell.weight_recurrent),
                ("bias_ih", cell.bias),
            ):
                g, i, f, o = parameter.chunk(4)
                getattr(theirs, f"{name}_l{layer}").copy_(torch.cat([i, f, g, o]))
            getattr(theirs, f"bias_hh_l{layer}").zero_()

    hidden, state = ours(inputs())
    expected, (a, c) = theirs(inputs())

    assert_same(hidden, expected)
    for layer in range(2):
        assert_same(state[layer][0], a[layer])
        assert_same(state[layer][1], c[layer])


def test_both_directions_agree_with_torch():
    ours = stack(is_bidirectional=True)
    theirs = torch.nn.LSTM(3, 5, 2, bidirectional=True, dtype=torch.float64)
    with torch.no_grad():
        for index, cell in enumerate(ours.cells):
            suffix = f"l{index // 2}{'_reverse' if index % 2 else ''}"
            for name, parameter in (
                ("weight_ih", cell.weight_input),
                ("weight_hh", cell.weight_recurrent),
                ("bias_ih", cell.bias),
            ):
                g, i, f, o = parameter.chunk(4)
                getattr(theirs, f"{name}_{suffix}").copy_(torch.cat([i, f, g, o]))
            getattr(theirs, f"bias_hh_{suffix}").zero_()

    hidden, _ = ours(inputs())

    assert hidden.shape == (6, 2, 10)
    assert_same(hidden, theirs(inputs())[0])


def test_the_state_carries_over():
    layers = stack(GRU)
    whole, _ = layers(inputs())

    first, state = layers(inputs()[:2])
    second, _ = layers(inputs()[2:], state)

    assert_same(torch.cat([first, second]), whole)


def test_rows_do_not_see_each_other():
    layers = stack(GRU)
    changed = inputs()
    changed[:, 1] += 1

    assert torch.equal(layers(inputs())[0][:, 0], layers(changed)[0][:, 0])


def test_a_detached_state_has_no_history():
    _, state = stack()(inputs().requires_grad_())

    assert all(part.requires_grad for parts in state for part in parts)
    assert not any(part.requires_grad for parts in state.detach() for part in parts)
    assert isinstance(state.detach(), State)


def test_dropout_acts_between_layers_and_only_there():
    layers = stack(dropout=0.5)

    noisy, other = layers(inputs())[0], layers(inputs())[0]

    assert not torch.equal(noisy, other)
    assert torch.equal(layers.eval()(inputs())[0], stack()(inputs())[0])
