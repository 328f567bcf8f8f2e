import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmtrain.data.streams import Streams, fitting
from lmtrain.errors import TextError

SIZES = {"batch_size": st.integers(1, 7), "seq_len": st.integers(1, 13)}


def naive(ids: list[int], batch_size: int, seq_len: int) -> list[tuple[list, list]]:
    """One epoch, token by token: inputs and targets as T rows of B."""
    length = len(ids) // batch_size
    steps, at = [], 0
    while at + seq_len < length:
        inputs, targets = [], []
        for t in range(at, at + seq_len):
            inputs.append([ids[row * length + t] for row in range(batch_size)])
            targets.append([ids[row * length + t + 1] for row in range(batch_size)])
        steps.append((inputs, targets))
        at += seq_len
    return steps


@settings(deadline=None)
@given(**SIZES, extra=st.integers(0, 100))
def test_steps_are_those_of_a_naive_writing(batch_size, seq_len, extra):
    ids = np.arange(batch_size * (seq_len + 1) + extra, dtype=np.uint16) * 3
    expected = naive(ids.tolist(), batch_size, seq_len)

    batches = Streams(ids, batch_size, seq_len)

    assert batches.steps_per_epoch == len(expected)
    for step, (inputs, targets) in enumerate(expected * 2):
        found = batches[step]
        assert found[0].tolist() == inputs
        assert found[1].tolist() == targets


@settings(deadline=None)
@given(**SIZES, extra=st.integers(0, 100))
def test_streams_are_contiguous_from_step_to_step(batch_size, seq_len, extra):
    ids = np.arange(batch_size * (seq_len + 1) + extra)
    batches = Streams(ids, batch_size, seq_len)

    streams = np.concatenate([batches[step][0] for step in range(batches.steps_per_epoch)])

    assert (np.diff(streams, axis=0) == 1).all()
    assert streams[0].tolist() == [row * (len(ids) // batch_size) for row in range(batch_size)]


@settings(deadline=None)
@given(**SIZES, extra=st.integers(0, 100))
def test_a_state_is_carried_to_the_token_after_it(batch_size, seq_len, extra):
    batches = Streams(np.arange(batch_size * (seq_len + 1) + extra), batch_size, seq_len)

    for step in range(2 * batches.steps_per_epoch):
        last_targets = batches[step][1][-1].tolist()
        follows = batches[step + 1][0][0].tolist() == last_targets
        assert follows != batches.starts_epoch(step + 1)
    assert batches.starts_epoch(0)


@settings(deadline=None)
@given(**SIZES, extra=st.integers(0, 100))
def test_all_but_less_than_a_window_of_each_stream_is_trained_on(batch_size, seq_len, extra):
    ids = np.arange(batch_size * (seq_len + 1) + extra)
    batches = Streams(ids, batch_size, seq_len)

    trained = batches.steps_per_epoch * seq_len * batch_size

    assert trained > len(ids) - batch_size * (seq_len + 2)


def test_a_step_is_the_same_whenever_it_is_asked_for():
    batches = Streams(np.arange(100), 3, 5)
    first = [batches[step][0].tolist() for step in range(20)]

    assert [batches[step][0].tolist() for step in reversed(range(20))] == first[::-1]


@pytest.mark.parametrize("kind", [np.uint16, np.uint32])
def test_ids_are_64_bit_numbers_that_can_be_written_to(kind):
    ids = np.arange(40, dtype=kind)
    ids.flags.writeable = False

    inputs, targets = Streams(ids, 3, 5)[0]
    inputs[:] = 0

    assert inputs.dtype == targets.dtype == np.int64
    assert inputs.shape == targets.shape == (5, 3)
    assert ids.tolist() == list(range(40))


@settings(deadline=None)
@given(**SIZES, num_tokens=st.integers(2, 300), processes=st.integers(1, 3))
def test_a_short_text_gets_the_most_streams_that_have_a_window(
    batch_size, seq_len, num_tokens, processes
):
    batch_size *= processes
    num_tokens *= processes

    streams, steps = fitting(num_tokens, batch_size, seq_len, processes)

    assert Streams(np.arange(num_tokens), streams, steps).steps_per_epoch >= 1
    assert streams % processes == 0
    assert 1 <= steps <= seq_len
    if num_tokens >= batch_size * (seq_len + 1):
        assert (streams, steps) == (batch_size, seq_len)
    elif steps == seq_len:
        assert num_tokens < (streams + processes) * (seq_len + 1)
    else:
        assert streams == processes
        assert num_tokens < streams * (steps + 2)


@pytest.mark.parametrize(("num_tokens", "processes"), [(0, 1), (1, 1), (5, 3)])
def test_a_text_without_a_prediction_for_each_process_is_refused(num_tokens, processes):
    message = rf"too short: {num_tokens} tokens\n.*at least {2 * processes} are needed"
    with pytest.raises(TextError, match=message):
        fitting(num_tokens, 21, 35, processes)


@settings(deadline=None)
@given(**SIZES, extra=st.integers(0, 300), seed=st.integers(0, 2**64 - 1))
def test_random_windows_are_contiguous_and_cover_each_epoch(batch_size, seq_len, extra, seed):
    ids = np.arange(batch_size * (seq_len + 1) + extra)
    batches = Streams(ids, batch_size, seq_len, seed)
    steps, length = batches.steps_per_epoch, len(ids) // batch_size
    first = np.arange(batch_size) * length

    assert steps == Streams(ids, batch_size, seq_len).steps_per_epoch
    for epoch in range(2):
        windows = [batches[epoch * steps + step] for step in range(steps)]
        assert min(len(inputs) for inputs, _ in windows) >= 1
        streams = np.concatenate([inputs for inputs, _ in windows])
        position = streams[0] - first
        assert ((position >= 0) & (position < length)).all()
        expected = first + (position + np.arange(length)[:, np.newaxis]) % length
        assert (streams == expected[:-1]).all()
        assert (np.concatenate([targets for _, targets in windows]) == expected[1:]).all()


def test_streams_start_at_another_random_position_in_each_epoch():
    batches = Streams(np.arange(3_000), 3, 70, seed=1)
    starts = [batches[epoch * batches.steps_per_epoch][0][0].tolist() for epoch in range(4)]
    assert len({position % 1_000 for start in starts for position in start}) == 12
    assert [start[0] // 1_000 for start in starts] == [0] * 4


def test_random_windows_are_a_function_of_seed_epoch_and_index():
    batches, same, other = (Streams(np.arange(20_000), 2, 70, seed) for seed in (1, 1, 2))
    steps = range(3 * batches.steps_per_epoch)
    lengths = [len(batches[step][0]) for step in steps]

    assert [len(same[step][0]) for step in reversed(steps)] == lengths[::-1]
    for step in (5, steps.stop - 1):
        assert (batches[step][0] == same[step][0]).all()
    assert [len(other[step][0]) for step in steps] != lengths
    epochs = np.array(lengths).reshape(3, -1)
    assert (epochs[0] != epochs[1]).any()
    # Around 70, some around 35, brought to the mean that windows of 70 have.
    assert np.median(lengths) == pytest.approx(71.8, abs=2)
    assert 20 < min(lengths) < 45
    assert max(lengths) < 100
