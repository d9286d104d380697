"""SIGINT and SIGTERM end a run after the step that is running, with a checkpoint."""

from __future__ import annotations

import os
import signal
import threading
import time
from typing import Any

STOPPING = (signal.SIGTERM, signal.SIGINT)
"""The signals that end a run; where ranks receive different ones, the first of these counts."""

_ECHO = 1.0
"""Seconds in which a launcher may send on a signal that the process has received itself."""


class Interrupted(SystemExit):
    """The run was stopped by a signal, and its checkpoint is saved.

    As an exception it ends the process with 130 (SIGINT) or 143 (SIGTERM), as shells count.
    """

    def __init__(self, signum: int, step: int):
        super().__init__(128 + signum)
        self.line: str = (
            f"stopped by {signal.Signals(signum).name}; checkpoint-{step} is saved. To go on, give "
            "the same command with --resume_from_checkpoint true (in Python: "
            "train(resume_from_checkpoint=True))."
        )


class Signals:
    """Receives SIGINT and SIGTERM while its block runs; the second one ends the process at once.

    In threads other than the main one nothing is received, and nothing changes.

    Attributes:
        received: the first signal; 0 for none.

    Example:
        >>> with Signals() as signals:
        ...     signal.raise_signal(signal.SIGTERM)
        ...     print(int(signals.received))
        15
    """

    def __init__(self) -> None:
        self.received: int = 0
        self._time = 0.0
        self._before: dict[int, Any] = {}
        self._pid = os.getpid()

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            for number in STOPPING:
                self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *error: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: Any) -> None:
        if os.getpid() != self._pid:
            # A worker of the data loader: it ends with its parent.
            return
        now = time.monotonic()
        if not self.received:
            self.received, self._time = number, now
        elif "TORCHELASTIC_RUN_ID" not in os.environ or now - self._time > _ECHO:
            # torchrun sends on to its workers what the whole process group has received.
            os._exit(128 + number)
