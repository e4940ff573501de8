"""Independent calls in processes of this machine."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from typing import Any

Run = Callable[[Callable[..., Any], tuple[Any, ...], Sequence[Any]], Iterator[Any]]
"""Gives function(*shared, item) for each item, as they are ready."""


@contextmanager
def in_processes(num_processes: int) -> Iterator[Run]:
    """Calls in so many processes, which end with the context or with this process, however that ends.

    Raises:
        BrokenProcessPool: a process was killed.
    """
    pool = ProcessPoolExecutor(num_processes, multiprocessing.get_context("spawn"), initializer=_begin)

    def run(function: Callable[..., Any], shared: tuple[Any, ...], items: Sequence[Any]) -> Iterator[Any]:
        for call in as_completed([pool.submit(function, *shared, item) for item in items]):
            yield call.result()

    try:
        yield run
    finally:
        pool.shutdown(cancel_futures=True)


def _begin() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends the processes at once, and in silence
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
