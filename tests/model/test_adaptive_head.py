import pytest
import torch
from networks import language_model, language_modelling, loss
from numerics import assert_same

from lmtrain import device
from lmtrain.errors import ConfigError
from lmtrain.model.language_model import LanguageModel
from lmtrain.tasks.language_model import LanguageModelling


def model(**changes) -> LanguageModel:
    arguments = {"embedding_size": 8, "hidden_size": 32, "num_layers": 1, **changes}
    return language_model(300, softmax="adaptive", **arguments)


def task(**changes) -> LanguageModelling:
    arguments = {"embedding_size": 8, "hidden_size": 32, "num_layers": 1, **changes}
    return language_modelling(300, softmax="adaptive", **arguments)


def tokens(seed: int) -> torch.Tensor:
    return torch.randint(0, 300, (5, 3), generator=device.generator(seed))


def test_probabilities_of_all_words_sum_to_one():
    logits, _ = model()(tokens(1))

    assert logits.shape == (5, 3, 300)
    assert_same(logits.exp().sum(-1), torch.ones(5, 3))


def test_the_loss_is_the_cross_entropy_of_the_log_probabilities():
    language = task()
    logits, _ = language.model(tokens(1))
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens(2).flatten())

    assert_same(loss(language, tokens(1), tokens(2)).objective, 5 * expected)
    assert_same(-language.model.log_probs(tokens(1), tokens(2))[0].mean(), expected)


def test_it_has_fewer_parameters_than_the_full_softmax():
    full = language_model(300, embedding_size=8, hidden_size=32, num_layers=1)

    assert model().num_parameters < 0.6 * full.num_parameters


def test_a_tail_without_targets_has_zero_gradients():
    language = task()
    targets = torch.zeros(5, 3, dtype=torch.long)

    loss(language, tokens(1), targets).objective.backward()

    tails = list(language.model.head.clusters.tail.parameters())
    assert len(tails) == 4
    assert not any(parameter.grad.any() for parameter in tails)


def test_too_few_hidden_units_are_refused():
    with pytest.raises(ConfigError, match="15 hidden units, the minimum is 16"):
        model(hidden_size=15)


def test_initial_weights_depend_on_the_seed_alone():
    global_state = torch.get_rng_state()
    network, other = model(train__seed=3), model(train__seed=4)

    assert torch.equal(global_state, torch.get_rng_state())
    assert not torch.equal(*(m.head.clusters.head.weight for m in (network, other)))
    for weight, again in zip(network.parameters(), model(train__seed=3).parameters(), strict=True):
        assert torch.equal(weight, again)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_training_halves_the_loss(precision):
    language = task(train__precision=precision)
    optimizer = torch.optim.Adam(language.model.parameters(), lr=0.01)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        objective = loss(language, tokens(1), tokens(2)).objective
        objective.backward()
        optimizer.step()
        losses.append(float(objective.detach()))

    assert losses[-1] < 0.5 * losses[0]


def test_tied_embeddings_are_refused():
    with pytest.raises(ConfigError, match="has weights of its own"):
        model(embedding_size=32, tied_embeddings=True)


def test_a_small_vocabulary_is_refused():
    with pytest.raises(ConfigError, match="11 tokens, the minimum is 100"):
        language_model(11, softmax="adaptive", embedding_size=4, hidden_size=4, num_layers=1)
