import math

import pytest
import torch
from numerics import assert_same

from lmtrain import device
from lmtrain.errors import ConfigError
from lmtrain.model.language_model import LanguageModel, Regularization


def model(**changes) -> LanguageModel:
    arguments = {"embedding_size": 6, "hidden_size": 6, "num_layers": 2, **changes}
    return LanguageModel(11, **arguments)


def tokens(seed: int = 1) -> torch.Tensor:
    return torch.randint(0, 11, (5, 3), generator=device.generator(seed))


@pytest.mark.parametrize("cell", ["rnn", "simple-gru", "gru", "lstm", "peephole-lstm"])
def test_the_loss_is_the_cross_entropy_of_the_logits_summed_over_time(cell):
    network = model(cell=cell)

    loss, _, _ = network.loss(tokens(), tokens(2))
    logits, _ = network(tokens())

    mean = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens(2).flatten())
    assert_same(loss, 5 * mean)


def test_log_probs_of_all_words_sum_to_one():
    network = model().eval()
    total = sum(
        network.log_probs(tokens(), torch.full((5, 3), word))[0].exp() for word in range(11)
    )

    assert_same(total, torch.ones(5, 3))


def test_tied_embeddings_are_one_matrix():
    tied, untied = model(tied_embeddings=True), model()

    assert tied.decoder is tied.embedding
    assert untied.num_parameters - tied.num_parameters == 11 * 6


def test_a_single_layer_needs_the_size_of_tied_embeddings():
    with pytest.raises(ConfigError, match="embedding_size 6 is not hidden_size 9"):
        model(tied_embeddings=True, hidden_size=9, num_layers=1)


def test_tied_embeddings_give_the_last_layer_their_size():
    network = model(tied_embeddings=True, hidden_size=9, num_layers=3)

    assert [cell.hidden_size for cell in network.recurrent.cells] == [9, 9, 6]
    assert network(tokens())[0].shape == (5, 3, 11)


@pytest.mark.parametrize(
    "part",
    ["dropout", "input_dropout", "output_dropout", "word_dropout", "weight_dropout"],
)
def test_each_kind_of_dropout_acts_in_training_alone(part):
    network, plain = model(regularization=Regularization(**{part: 0.5})), model()

    first, second = (network(tokens())[0] for _ in range(2))

    assert not torch.equal(first, second)
    assert torch.equal(network.eval()(tokens())[0], plain.eval()(tokens())[0])


def test_a_dropped_word_is_dropped_wherever_it_stands():
    network = model(regularization=Regularization(word_dropout=0.5))
    seen = {}
    network.recurrent.register_forward_pre_hook(
        lambda _, inputs: seen.update(embedded=inputs[0].detach())
    )

    network.loss(tokens(), tokens(2))

    embedded = torch.nn.functional.embedding(tokens(), network.embedding)
    kept = (seen["embedded"] != 0).any(-1)
    assert_same(seen["embedded"], 2 * embedded * kept.unsqueeze(-1))
    of_word = {word: kept[tokens() == word].tolist() for word in tokens().unique().tolist()}
    assert all(len(set(each)) == 1 for each in of_word.values())
    assert {each[0] for each in of_word.values()} == {True, False}


def test_penalties_are_added_to_the_objective_alone():
    network = model(regularization=Regularization(activation=2.0, temporal=3.0))
    hidden, _ = network.hidden(tokens())
    expected = 5 * (2 * hidden.square().mean() + 3 * (hidden[1:] - hidden[:-1]).square().mean())

    loss = network.loss(tokens(), tokens(2))
    plain = model().loss(tokens(), tokens(2))

    assert_same(loss.nats, plain.nats)
    assert_same(loss.objective, plain.objective + expected)
    evaluated = network.eval().loss(tokens(), tokens(2))
    assert torch.equal(evaluated.objective.detach(), evaluated.nats)


def test_the_seed_gives_the_same_first_weights():
    one, same, other = model(seed=3), model(seed=3), model(seed=4)

    assert torch.equal(one.embedding, same.embedding)
    assert not torch.equal(one.embedding, other.embedding)


def test_nothing_before_the_first_token_is_a_zero_embedding():
    network = model().eval()
    with torch.no_grad():
        network.embedding[0] = 0

    nothing, _ = network(torch.full((1, 2), -1))

    assert_same(nothing, network(torch.zeros(1, 2, dtype=torch.long))[0])


def test_an_untrained_model_is_about_as_good_as_guessing():
    loss, _, _ = model().loss(tokens(), tokens(2))

    assert abs(loss.item() / 5 - math.log(11)) < 0.3


def test_dropout_acts_in_training_alone():
    network = model(regularization=Regularization(dropout=0.5))

    first, second = (network(tokens())[0] for _ in range(2))

    assert not torch.equal(first, second)
    assert torch.equal(network.eval()(tokens())[0], network(tokens())[0])


@pytest.mark.parametrize("cell", ["rnn", "simple-gru", "gru", "lstm", "peephole-lstm"])
def test_mixed_precision_is_near_fp32_in_training_and_nothing_elsewhere(cell):
    exact, mixed = (
        model(cell=cell, embedding_size=32, hidden_size=32, is_mixed=is_mixed)
        for is_mixed in (False, True)
    )

    losses, gradients = [], []
    for network in (exact, mixed):
        loss, _, state = network.loss(tokens(), tokens(2))
        losses.append(loss.item())
        gradients.append(
            torch.cat([g.flatten() for g in torch.autograd.grad(loss, network.parameters())])
        )
        assert {part.dtype for parts in state for part in parts} == {torch.float32}

    assert losses[1] == pytest.approx(losses[0], rel=1e-2)
    assert not torch.equal(*gradients)
    assert {g.dtype for g in gradients} == {torch.float32}
    assert (gradients[1] - gradients[0]).norm() < 0.02 * gradients[0].norm()
    assert torch.equal(*(network.eval()(tokens())[0] for network in (exact, mixed)))
