"""Signals that arrive between the end of a training and the end of its process."""

import signal

import pytest

from lmtrain.errors import RunInterruptedError
from lmtrain.training.signals import Signals

NUMBERS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)


@pytest.fixture
def received():
    """The signals that reach the handlers from before the training."""
    original = {number: signal.getsignal(number) for number in NUMBERS}
    numbers = []
    for number in NUMBERS:
        signal.signal(number, lambda number, frame: numbers.append(number))
    yield numbers
    for number, handler in original.items():
        signal.signal(number, handler)


def interrupt(signals):
    with signals:
        signal.raise_signal(signal.SIGTERM)
        raise RunInterruptedError(signals.termination_signal, "interrupted")


@pytest.mark.parametrize("is_worker", [True, False])
def test_a_worker_that_ends_after_a_signal_ignores_further_signals(received, is_worker):
    with pytest.raises(RunInterruptedError):
        interrupt(Signals(is_worker=is_worker))
    signal.raise_signal(signal.SIGTERM)
    assert received == ([] if is_worker else [signal.SIGTERM])


def test_handlers_are_restored_after_a_training_that_ended_normally(received):
    with Signals(is_worker=True):
        pass
    signal.raise_signal(signal.SIGTERM)
    assert received == [signal.SIGTERM]
