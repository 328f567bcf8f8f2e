import numpy as np
import pytest

from lmtrain.data.padded import PaddedBatches, by_length, pad


def lengths(count: int) -> np.ndarray:
    return np.random.default_rng(1).geometric(1 / 9, count)


@pytest.mark.parametrize(("count", "batch_size"), [(1, 1), (1, 32), (64, 32), (97, 8), (4000, 32)])
def test_an_epoch_holds_every_example_once(count, batch_size):
    batches = PaddedBatches(lengths(count), batch_size, seed=3)

    for epoch in range(3):
        first = epoch * batches.steps_per_epoch
        steps = range(first, first + batches.steps_per_epoch)
        drawn = [batches.indices(step) for step in steps]
        assert sorted(np.concatenate(drawn).tolist()) == list(range(count))
        assert all(0 < len(each) <= batch_size for each in drawn)


def test_a_step_is_a_function_of_seed_and_step_alone():
    in_turn, at_once = (PaddedBatches(lengths(97), 8, seed=3) for _ in range(2))
    other = PaddedBatches(lengths(97), 8, seed=4)
    steps = range(3 * in_turn.steps_per_epoch)

    drawn = [in_turn.indices(step).tolist() for step in steps]

    assert [at_once.indices(step).tolist() for step in reversed(steps)] == drawn[::-1]
    assert [other.indices(step).tolist() for step in steps] != drawn
    assert drawn[:13] != drawn[13:26]


def test_little_of_a_batch_is_padding():
    each = lengths(4000)
    batches = PaddedBatches(each, 32, seed=3)

    shapes = [each[batches.indices(step)] for step in range(batches.steps_per_epoch)]

    padded = sum(int(own.max()) * len(own) for own in shapes)
    assert 1 - each.sum() / padded < 0.1


@pytest.mark.parametrize("most_tokens", [None, 1, 40, 10_000])
def test_evaluation_sees_every_example_once_by_length(most_tokens):
    each = lengths(50)

    batches = list(by_length(each, 8, most_tokens))
    drawn = np.concatenate(batches)

    assert sorted(drawn.tolist()) == list(range(50))
    assert (np.diff(each[drawn]) >= 0).all()
    sizes = [(len(batch), each[batch].max() * len(batch)) for batch in batches]
    assert all(rows <= 8 and (rows == 1 or size <= (most_tokens or size)) for rows, size in sizes)
    assert len(batches) == {None: 7, 1: 50, 10_000: 7}.get(most_tokens, len(batches))


def test_sequences_are_padded_at_their_ends():
    ids, found = pad([np.array([4, 5, 6]), np.array([7])])

    assert ids.tolist() == [[4, 7], [5, -1], [6, -1]]
    assert found.tolist() == [3, 1]
