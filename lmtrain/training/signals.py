"""Signals that ask a training to save, or to save and end."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from lmtrain.errors import RunInterruptedError

_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Signals:
    """Inside its block, takes note of signals instead of obeying them.

    SIGINT, SIGTERM and SIGHUP ask for the end, a second one ends the process at once; SIGUSR1
    asks for a checkpoint. What was ignored when the process started, as by nohup, stays ignored.
    Launched processes that end after a signal heed no further one.

    Args:
        is_launched: whether a launcher passes signals on, maybe more than once, and ends what does
            not end by itself.

    Attributes:
        ending: the signal that asked for the end; None if none did.
        wants_checkpoint: whether a checkpoint was asked for.
    """

    def __init__(self, *, is_launched: bool = False) -> None:
        self._is_launched = is_launched
        self.ending: int | None = None
        self.wants_checkpoint = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Signals":
        # Python lets no other thread receive signals.
        if threading.current_thread() is threading.main_thread():
            for number in _ENDING:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._end)
            self._before[signal.SIGUSR1] = signal.signal(signal.SIGUSR1, self._save)
        return self

    def _end(self, number: int, frame: FrameType | None) -> None:
        self.ending = number
        if self._is_launched:
            return
        for each in self._before.keys() & set(_ENDING):
            signal.signal(each, signal.SIG_DFL)

    def _save(self, number: int, frame: FrameType | None) -> None:
        self.wants_checkpoint = True

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._is_launched and kind is RunInterruptedError:
            # The launcher asks again whoever takes a moment longer than the others.
            return
        for number, handler in self._before.items():
            signal.signal(number, handler)
