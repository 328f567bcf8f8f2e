"""Signals that request a checkpoint or the end of a training."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from lmtrain.errors import RunInterruptedError

_TERMINATION_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Signals:
    """Context manager that records signals, for the training loop to handle between steps.

    SIGINT, SIGTERM and SIGHUP request the end of training; a second one ends the process
    immediately. SIGUSR1 requests a checkpoint. Signals that were ignored when the process started,
    for example by nohup, stay ignored. A worker of a launcher ignores repeated signals while it
    ends.

    Args:
        is_worker: whether this process was started by a launcher, which may send a signal more than
            once and kills processes that do not end.

    Attributes:
        termination_signal: the signal that requested the end; None without one.
        checkpoint_requested: whether a checkpoint was requested.
    """

    def __init__(self, *, is_worker: bool = False) -> None:
        self._is_worker = is_worker
        self.termination_signal: int | None = None
        self.checkpoint_requested = False
        self._previous_handlers: dict[int, Any] = {}

    def __enter__(self) -> "Signals":
        # Python allows signal handlers in the main thread only.
        if threading.current_thread() is threading.main_thread():
            for number in _TERMINATION_SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._previous_handlers[number] = signal.signal(number, self._request_end)
            self._previous_handlers[signal.SIGUSR1] = signal.signal(
                signal.SIGUSR1, self._request_checkpoint
            )
        return self

    def _request_end(self, number: int, frame: FrameType | None) -> None:
        self.termination_signal = number
        if self._is_worker:
            return
        for handled in self._previous_handlers.keys() & set(_TERMINATION_SIGNALS):
            signal.signal(handled, signal.SIG_DFL)

    def _request_checkpoint(self, number: int, frame: FrameType | None) -> None:
        self.checkpoint_requested = True

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._is_worker and error_type is RunInterruptedError:
            # The launcher may send the signal again until the process has ended.
            return
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)
