"""Signals between the end of a training and that of its process."""

import signal

import pytest

from lmtrain.errors import RunInterruptedError
from lmtrain.training.signals import Signals

NUMBERS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)


@pytest.fixture
def refused():
    """Signals that reach the handlers that were there before a training."""
    before = {number: signal.getsignal(number) for number in NUMBERS}
    came = []
    for number in NUMBERS:
        signal.signal(number, lambda number, frame: came.append(number))
    yield came
    for number, handler in before.items():
        signal.signal(number, handler)


def stop(signals):
    with signals:
        signal.raise_signal(signal.SIGTERM)
        raise RunInterruptedError(signals.ending, "interrupted")


@pytest.mark.parametrize("is_launched", [True, False])
def test_what_a_launcher_repeats_does_not_disturb_a_process_that_ends(refused, is_launched):
    with pytest.raises(RunInterruptedError):
        stop(Signals(is_launched=is_launched))
    signal.raise_signal(signal.SIGTERM)
    assert refused == ([] if is_launched else [signal.SIGTERM])


def test_after_a_training_that_ended_by_itself_signals_are_heeded_again(refused):
    with Signals(is_launched=True):
        pass
    signal.raise_signal(signal.SIGTERM)
    assert refused == [signal.SIGTERM]
