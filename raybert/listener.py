"""Listeners: callables that hear a run's events, in the driver's process, each in a thread of its own.

None of them can end or slow training: events wait in a queue, in order, and an error costs a warning, the first time.
"""

from __future__ import annotations

import _thread
import queue
import threading
import traceback
from collections.abc import Callable
from types import TracebackType

from raybert.events import Event, Tell

PATIENCE_S = 90.0  # at the end of a run, for one event
FINISHED, INTERRUPTED = "finished", "interrupted"


class Listener:
    """Hands events to one callable."""

    def __init__(self, on_log: Tell, name: str, warn: Callable[[str], None]) -> None:
        """Args:
        on_log: called with every event. A KeyboardInterrupt that it raises interrupts the run, as Ctrl-C does.
        name: for warnings.
        warn: told of its first error.
        """
        self._on_log, self._name, self._warn = on_log, name, warn
        self._events: queue.SimpleQueue[Event | None] = queue.SimpleQueue()
        self._num_heard, self._has_warned = 0, False
        self._thread = threading.Thread(target=self._listen, name=name, daemon=True)
        self._thread.start()

    def hear(self, event: Event) -> None:
        """Put an event at the end of the queue."""
        self._events.put(event)

    def close(self) -> None:
        """Wait until all events are heard; no longer than PATIENCE_S for one of them."""
        self._events.put(None)
        while self._thread.is_alive():
            num_heard = self._num_heard
            self._thread.join(PATIENCE_S)
            if self._thread.is_alive() and self._num_heard == num_heard:
                self._warn(f"{self._name} does not come to an end: {self._events.qsize()} events are left out.")
                return

    def _listen(self) -> None:
        while (event := self._events.get()) is not None:
            try:
                self._on_log(event)
            except KeyboardInterrupt:
                _thread.interrupt_main()
            except Exception as error:
                self._warn_of(error)
            self._num_heard += 1

    def _warn_of(self, error: Exception) -> None:
        if not self._has_warned:
            self._has_warned = True
            frame = traceback.extract_tb(error.__traceback__)[-1]
            line = (str(error).strip().splitlines() or [""])[0]
            self._warn(
                f"{self._name} failed with {type(error).__name__}: {line} ({frame.filename}, line {frame.lineno}); the "
                "run goes on, and further errors of it are not shown."
            )


class Listeners:
    """All listeners of a run; a context manager that tells them how it ended, as an event of kind "end"."""

    def __init__(self, warn: Callable[[str], None]) -> None:
        self._warn = warn
        self._listeners: list[Listener] = []

    def add(self, on_log: Tell, name: str) -> None:
        """Let a callable hear the events from now on."""
        self._listeners.append(Listener(on_log, name, self._warn))

    def hear(self, event: Event) -> None:
        """Hand an event to all of them."""
        for listener in self._listeners:
            listener.hear(event)

    def __enter__(self) -> Listeners:
        return self

    def __exit__(self, _: type[BaseException] | None, error: BaseException | None, __: TracebackType | None) -> None:
        reason = FINISHED
        if error is not None:
            reason = INTERRUPTED if isinstance(error, KeyboardInterrupt) else str(error) or type(error).__name__
        self.hear(Event("end", text=reason))
        for listener in self._listeners:
            listener.close()
