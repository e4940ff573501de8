"""Retries: when a storage that fails is asked again, and for how long. Most outages end by themselves."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

FIRST_S, LONGEST_S = 0.5, 30.0
BLIP_S = 60.0  # a failure that ends within so long ends no attempt
ANSWERS = (FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError)  # asked again, they are the same
_JITTER = random.Random()

T = TypeVar("T")
Wait = Callable[[OSError, float], None]


def pauses() -> Iterator[float]:
    """Seconds before each further try, without end: doubling from FIRST_S to LONGEST_S, each less up to a half.

    By chance, so that those whom one outage hit do not come back in step.
    """
    longest_s = FIRST_S
    while True:
        yield longest_s * _JITTER.uniform(0.5, 1)
        longest_s = min(2 * longest_s, LONGEST_S)


def give_up(error: OSError, pause_s: float) -> None:
    """Try once only."""
    raise error


def retry(action: Callable[[], T], wait: Wait) -> T:
    """What the action gives.

    Args:
        action: may be tried again after an OSError; others are no errors of storage, and raised.
        wait: told the error and for how long to wait; it returns for another try, or raises.
    """
    for pause_s in pauses():
        try:
            return action()
        except OSError as error:
            wait(error, pause_s)
    raise AssertionError("pauses end")


def outlast_blip(action: Callable[[], T], limit_s: float | None = None) -> T:
    """What the action gives, tried again for `limit_s` seconds (default: BLIP_S).

    Raises:
        OSError: it is an answer, such as that there is no such file; or it did not pass.
    """
    until_s = time.monotonic() + (BLIP_S if limit_s is None else limit_s)

    def wait(error: OSError, pause_s: float) -> None:
        if isinstance(error, ANSWERS) or time.monotonic() + pause_s > until_s:
            raise error
        time.sleep(pause_s)

    return retry(action, wait)
