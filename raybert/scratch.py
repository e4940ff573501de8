"""Scratch: local directories for what is on its way elsewhere; those of processes that died are cleared away.

A process that is killed removes nothing, and a staged checkpoint is as large as the model. So whenever a directory is
made or removed, those that nobody owns go, too. To own one is to hold its lock (flock), which ends with the process.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PREFIX = "raybert-scratch-"


@contextmanager
def scratch() -> Iterator[Path]:
    """A temporary directory of this process, for the time of the context."""
    _clear_abandoned()
    path, lock = _create()
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        os.close(lock)
        _clear_abandoned()


def _create() -> tuple[Path, int]:
    """A directory and the lock on it; another one where somebody has cleared it away before the lock was there."""
    while True:
        path = Path(tempfile.mkdtemp(prefix=PREFIX))
        with suppress(FileNotFoundError):
            lock = os.open(path, os.O_RDONLY)
            fcntl.flock(lock, fcntl.LOCK_EX)
            if path.exists():
                return path, lock
            os.close(lock)


def _clear_abandoned() -> None:
    """Remove directories that no process owns; another user's stay."""
    for path in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        with suppress(OSError):
            lock = os.open(path, os.O_RDONLY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(lock)
