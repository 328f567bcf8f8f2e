"""Gradients over time against a second writing of each network, in which every state is nudged."""

import numpy as np
import pytest
import torch
from networks import language_model, random_ids
from numerics import assert_same
from torch import Tensor

from lmtrain.errors import TextError
from lmtrain.model.language_model import LanguageModel
from lmtrain.tasks import gradient_norms as module
from lmtrain.tasks.gradient_norms import LagNorms, gradient_norms

CELLS = ("rnn", "simple-gru", "gru", "lstm", "peephole-lstm")
LAGS, H = 4, 5


def model(cell: str, **changes) -> LanguageModel:
    settings = {"hidden_size": H, "num_layers": 2, "init_scale": 0.7, **changes}
    return language_model(9, cell=cell, **settings).double()


def step(cell: str, own, x: Tensor, state: list[Tensor], nudges: list[Tensor]) -> list[Tensor]:
    """A step by the equations of the notes; each part of the state is nudged as it comes to be."""

    def gate(name: str, a: Tensor) -> Tensor:
        rows = slice(own.gates.index(name) * H, (own.gates.index(name) + 1) * H)
        return x @ own.weight_input[rows].T + a @ own.weight_recurrent[rows].T + own.bias[rows]

    a = state[0]
    if cell == "rnn":
        return [torch.tanh(gate("candidate", a)) + nudges[0]]
    update = gate("update", a)
    if cell in ("simple-gru", "gru"):
        reset = torch.sigmoid(gate("relevance", a)) if cell == "gru" else 1.0
        update, candidate = torch.sigmoid(update), torch.tanh(gate("candidate", reset * a))
        return [update * candidate + (1 - update) * a + nudges[0]]
    c = state[1]
    forget, output = gate("forget", a), gate("output", a)
    if cell == "peephole-lstm":
        see_update, see_forget, see_output = (own.weight_peephole @ c).chunk(3)
        update, forget, output = update + see_update, forget + see_forget, output + see_output
    update, forget, output = (torch.sigmoid(z) for z in (update, forget, output))
    c = update * torch.tanh(gate("candidate", a)) + forget * c + nudges[1]
    return [output * torch.tanh(c) + nudges[0], c]


def expected(cell: str, network: LanguageModel, ids: list[int], *, residual=False) -> Tensor:
    """Norms of the gradient of −log P of the last token at each nudge, (layer, part, lag).

    Time runs outside, layers inside. The nudges of the first steps, the context, are not asked for.
    """
    layers = list(network.encoder.recurrent.cells)
    parts = len(layers[0].state_names)
    nudges = torch.zeros(len(ids) - 1, 2, parts, H, dtype=torch.float64, requires_grad=True)
    states = [[torch.zeros(H, dtype=torch.float64)] * parts for _ in layers]
    for token, nudge in zip(ids[:-1], nudges, strict=True):
        x = network.encoder.embedding.weight[token]
        for layer, own in enumerate(layers):
            states[layer] = step(cell, own, x, states[layer], list(nudge[layer]))
            x = states[layer][0] + (x if residual and layer else 0)
    logits = network.head.weight @ x + network.head.bias
    loss = logits.logsumexp(0) - logits[ids[-1]]
    (gradient,) = torch.autograd.grad(loss, nudges)
    return gradient[-LAGS - 1 :].norm(dim=-1).flip(0).permute(1, 2, 0)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("cell", CELLS)
def test_norms_are_those_of_a_second_writing_of_the_network(cell, residual):
    network, ids = model(cell, residual=residual), random_ids(2 * LAGS + 4)

    found = gradient_norms(network, ids, LAGS)

    names = [(layer, part) for layer in (1, 2) for part in ("hidden", "cell_state")]
    assert [(each.layer, each.part) for each in found] == (
        names if "lstm" in cell else [(1, "hidden"), (2, "hidden")]
    )
    rows = [ids[start : start + 2 * LAGS + 2].tolist() for start in range(3)]
    wanted = [expected(cell, network, row, residual=residual) for row in rows]
    norms = torch.stack([torch.from_numpy(each.norms) for each in found])
    assert_same(norms, torch.stack(wanted).flatten(1, 2).transpose(0, 1), cell)


def test_an_lstm_of_torch_has_the_same_norms():
    network, ids = model("lstm", num_layers=1), random_ids(2 * LAGS + 2)
    (own,) = network.encoder.recurrent.cells
    cell = torch.nn.LSTMCell(H, H).double()
    # torch's order is update, forget, candidate, output.
    rows = torch.cat([torch.arange(H) + H * block for block in (1, 2, 0, 3)])
    with torch.no_grad():
        cell.weight_ih.copy_(own.weight_input[rows])
        cell.weight_hh.copy_(own.weight_recurrent[rows])
        cell.bias_ih.copy_(own.bias[rows])
        cell.bias_hh.zero_()
    state, states = None, []
    for token in ids[:-1].astype(np.int64):
        state = cell(network.encoder.embedding.weight[token], state)
        states.append(state[0])
    logits = network.head.weight @ state[0] + network.head.bias
    loss = torch.nn.functional.cross_entropy(logits, torch.tensor(int(ids[-1])))

    hidden, _ = gradient_norms(network, ids, LAGS)

    gradients = torch.autograd.grad(loss, states[-LAGS - 1 :])
    wanted = torch.stack([gradient.norm() for gradient in gradients]).flip(0)
    assert_same(torch.from_numpy(hidden.norms), wanted.unsqueeze(0))


@pytest.mark.parametrize("softmax", ["sampled", "adaptive"])
def test_the_loss_is_that_of_evaluation_for_every_softmax(softmax):
    network = language_model(600, cell="rnn", hidden_size=16, num_layers=1, softmax=softmax)
    network.double()
    ids = random_ids(12)

    (found,) = gradient_norms(network, ids, LAGS)

    rows = torch.from_numpy(np.stack([ids[start : start + 10] for start in range(3)], axis=1))
    inputs, targets = rows[:-1].long(), rows[1:].long()
    hidden, _ = network.hidden(inputs)
    last = hidden[-1:].detach().requires_grad_()
    nats = -network.head(last).log_softmax(-1)[0].gather(1, targets[-1:].T)
    (gradient,) = torch.autograd.grad(nats.sum(), last)
    assert_same(torch.from_numpy(found.norms[:, 0]), gradient[0].norm(dim=-1))


def test_rows_are_spread_over_the_text_and_independent_of_each_other(monkeypatch):
    network, ids = model("gru"), random_ids(60)
    (one, _) = gradient_norms(network, ids, LAGS)
    monkeypatch.setattr(module, "_ROWS", 7)
    (other, _) = gradient_norms(network, ids, LAGS)
    (ends, _) = gradient_norms(network, ids, LAGS, positions=2)

    assert one.norms.shape == (51, LAGS + 1)
    assert_same(torch.from_numpy(other.norms), torch.from_numpy(one.norms))
    assert_same(torch.from_numpy(ends.norms), torch.from_numpy(one.norms[[0, -1]]))


def test_nothing_is_dropped_and_a_model_in_training_stays_in_training():
    network, ids = model("lstm", dropout=0.5, weight_dropout=0.5).train(), random_ids(40)

    first, second = gradient_norms(network, ids, LAGS), gradient_norms(network, ids, LAGS)

    assert network.training
    assert all(parameter.grad is None for parameter in network.parameters())
    for one, other in zip(first, second, strict=True):
        assert_same(torch.from_numpy(one.norms), torch.from_numpy(other.norms))


def of(*rows) -> LagNorms:
    return LagNorms(1, "hidden", np.array(rows, dtype=np.float64))


def test_relative_norms_are_divided_row_by_row():
    found = of([2, 1, 0], [4, 4, 1], [0, 0, 0], [8, 2, 4])

    assert found.relative.median.tolist() == [1, 0.5, 0.25]
    assert found.relative.upper.tolist() == [1, 0.75, 0.375]
    assert found.absolute.median.tolist() == [3, 1.5, 0.5]
    assert found.absolute.lower.tolist() == [1.5, 0.75, 0]


@pytest.mark.parametrize(
    ("row", "half_lag"),
    [
        ([4, 1, 1], 1),
        ([4, 2, 1], 2),
        ([4, 1, 3, 1], 3),
        ([4, 3, 2], None),
        ([4, 9, 30], None),
        ([0, 0, 0], None),
    ],
)
def test_half_is_gone_where_it_stays_gone(row, half_lag):
    assert of(row).half_lag == half_lag


def test_gradients_that_explode_to_infinity_are_infinite():
    found = of([1, 10, np.inf], [1, 10, np.inf], [1, 10, np.inf])

    assert found.absolute.lower[1] == 10
    assert not np.isfinite(found.relative.median[2])
    assert np.isnan(of([np.inf, np.inf, np.nan]).relative.median).all()
    assert of([np.inf, np.inf, np.nan]).half_lag is None


def test_a_text_too_short_names_the_lags_that_fit():
    network = model("rnn")

    with pytest.raises(TextError, match=r"9 tokens\n  --lags 4 needs at least 10\n  .*--lags 3"):
        gradient_norms(network, random_ids(9), LAGS)
    with pytest.raises(TextError, match="try: a longer text"):
        gradient_norms(network, random_ids(3), LAGS)
    assert gradient_norms(network, random_ids(10), LAGS)[0].norms.shape == (1, LAGS + 1)
