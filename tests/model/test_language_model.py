import math

import pytest
import torch
from networks import language_model, language_modelling, loss
from numerics import assert_same

from lmtrain import device
from lmtrain.errors import ConfigError
from lmtrain.model.language_model import LanguageModel


def model(**changes) -> LanguageModel:
    arguments = {"embedding_size": 6, "hidden_size": 6, "num_layers": 2, **changes}
    return language_model(11, **arguments)


def task(**changes):
    return language_modelling(11, embedding_size=6, hidden_size=6, **changes)


def tokens(seed: int = 1) -> torch.Tensor:
    return torch.randint(0, 11, (5, 3), generator=device.generator(seed))


@pytest.mark.parametrize("cell", ["rnn", "simple-gru", "gru", "lstm", "peephole-lstm"])
def test_the_loss_is_the_cross_entropy_of_the_logits_summed_over_time(cell):
    language = task(cell=cell)

    actual = loss(language, tokens(), tokens(2))
    logits, _ = language.model(tokens())

    mean = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens(2).flatten())
    assert_same(actual.objective, 5 * mean)
    assert_same(actual.total.float(), 15 * mean)
    assert actual.predictions == 15


def test_probabilities_of_all_words_sum_to_one():
    network = model().eval()
    total = sum(
        network.log_probs(tokens(), torch.full((5, 3), word))[0].exp() for word in range(11)
    )

    assert_same(total, torch.ones(5, 3))


def test_tied_embeddings_share_one_parameter():
    tied, untied = model(tied_embeddings=True), model()

    assert tied.head.weight is tied.encoder.embedding.weight
    assert untied.num_parameters - tied.num_parameters == 11 * 6


def test_tied_embeddings_of_another_size_than_a_single_layer_are_refused():
    with pytest.raises(ConfigError, match="embedding_size 6 to equal hidden_size 9"):
        model(tied_embeddings=True, hidden_size=9, num_layers=1)


def test_tied_embeddings_set_the_size_of_the_last_layer():
    network = model(tied_embeddings=True, hidden_size=9, num_layers=3)

    assert [cell.hidden_size for cell in network.encoder.recurrent.cells] == [9, 9, 6]
    assert network(tokens())[0].shape == (5, 3, 11)


@pytest.mark.parametrize(
    "part",
    ["dropout", "input_dropout", "output_dropout", "word_dropout", "weight_dropout"],
)
def test_each_dropout_acts_in_training_only(part):
    network, without_dropout = model(**{part: 0.5}), model()

    first, second = (network(tokens())[0] for _ in range(2))

    assert not torch.equal(first, second)
    assert torch.equal(network.eval()(tokens())[0], without_dropout.eval()(tokens())[0])


def test_a_dropped_word_is_dropped_at_all_its_positions():
    language = task(word_dropout=0.5)
    network, captured = language.model, {}
    network.encoder.recurrent.register_forward_pre_hook(
        lambda _, inputs: captured.update(vectors=inputs[0].detach())
    )

    loss(language, tokens(), tokens(2))

    vectors = torch.nn.functional.embedding(tokens(), network.encoder.embedding.weight)
    is_kept = (captured["vectors"] != 0).any(-1)
    assert_same(captured["vectors"], 2 * vectors * is_kept.unsqueeze(-1))
    by_word = [set(is_kept[tokens() == word].tolist()) for word in tokens().unique().tolist()]
    assert sorted(set(map(tuple, by_word))) == [(False,), (True,)]


def test_penalties_are_added_to_the_objective_only():
    language = task(activation_regularization=2.0, temporal_regularization=3.0)
    hidden, _ = language.model.hidden(tokens())
    expected = 5 * (2 * hidden.square().mean() + 3 * (hidden[1:] - hidden[:-1]).square().mean())

    penalized = loss(language, tokens(), tokens(2))
    plain = loss(task(), tokens(), tokens(2))

    assert_same(penalized.total, plain.total)
    assert_same(penalized.objective, plain.objective + expected)


def test_equal_seeds_give_equal_initial_weights():
    weights = [model(train__seed=seed).encoder.embedding.weight for seed in (3, 3, 4)]

    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_in_evaluation_a_token_below_0_has_a_zero_embedding():
    network = model().eval()
    with torch.no_grad():
        network.encoder.embedding.weight[0] = 0

    logits, _ = network(torch.full((1, 2), -1))

    assert_same(logits, network(torch.zeros(1, 2, dtype=torch.long))[0])


def test_an_untrained_model_has_nearly_the_loss_of_a_uniform_distribution():
    actual = loss(task(), tokens(), tokens(2))

    assert abs(actual.objective.item() / 5 - math.log(11)) < 0.3


@pytest.mark.parametrize("cell", ["rnn", "simple-gru", "gru", "lstm", "peephole-lstm"])
def test_bf16_is_near_fp32_in_training_and_unused_in_evaluation(cell):
    fp32, bf16 = (
        language_modelling(
            11, cell=cell, embedding_size=32, hidden_size=32, train__precision=precision
        )
        for precision in ("fp32", "bf16")
    )

    losses, gradients = [], []
    for language in (fp32, bf16):
        actual = loss(language, tokens(), tokens(2))
        losses.append(actual.objective.item())
        weights = list(language.model.parameters())
        gradients.append(
            torch.cat([g.flatten() for g in torch.autograd.grad(actual.objective, weights)])
        )
        assert {part.dtype for parts in actual.state for part in parts} == {torch.float32}

    assert losses[1] == pytest.approx(losses[0], rel=1e-2)
    assert not torch.equal(*gradients)
    assert {g.dtype for g in gradients} == {torch.float32}
    assert (gradients[1] - gradients[0]).norm() < 0.02 * gradients[0].norm()
    assert torch.equal(*(language.model.eval()(tokens())[0] for language in (fp32, bf16)))
