"""The hold: whoever is about to end the workers asks for a checkpoint first, after which training waits to be ended.

So a planned end costs no step. Whoever asks runs in another thread of rank 0's process; there is one hold a process.
"""

from __future__ import annotations

import threading
import time
from typing import Literal

State = Literal["none", "asked", "held"]
HOLD_S = 60.0  # a worker that nobody ends in this time trains on
LOOK_S = 0.05


class Hold:
    """Asked for by one thread, kept by another; `state` is where it stands."""

    def __init__(self) -> None:
        self.state: State = "none"
        self._lock = threading.Lock()

    def ask(self) -> None:
        """Ask for a checkpoint and a halt at the next step; nothing happens where that is under way already."""
        with self._lock:
            if self.state == "none":
                self.state = "asked"

    def release(self) -> None:
        """Let training go on."""
        with self._lock:
            self.state = "none"

    def keep(self, limit_s: float = HOLD_S) -> bool:
        """Wait to be ended or released; returns False after `limit_s` seconds, when nobody came."""
        with self._lock:
            self.state = "held"
        until_s = time.monotonic() + limit_s
        while self.state == "held":
            if time.monotonic() >= until_s:
                self.release()
                return False
            time.sleep(LOOK_S)
        return True


HOLD = Hold()


def ask() -> None:
    """Ask this process for a hold."""
    HOLD.ask()


def release() -> None:
    """Release this process's hold."""
    HOLD.release()


def state() -> State:
    """Where this process's hold stands."""
    return HOLD.state
