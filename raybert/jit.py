"""Numba, as all compiled code here uses it, and the arrays that such code reads and writes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar, cast

import numba
import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]
Flags = npt.NDArray[np.bool_]
Ints = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint32]
Buffer = bytes | bytearray | memoryview | Bytes

_Args = ParamSpec("_Args")
_Result = TypeVar("_Result")


def compiled(function: Callable[_Args, _Result]) -> Callable[_Args, _Result]:
    """Compiled at its first call and kept on disk, for the many short-lived processes that need it; frees the GIL.

    A kept function is made anew when its own file has changed, not when the file of a function that it calls has: while
    you change such a callee, remove raybert/__pycache__/*.nb?.
    """
    return cast(Callable[_Args, _Result], numba.njit(cache=True, nogil=True)(function))


# Numba makes a float64 of uint64 with int64, so every integer that is read becomes an int64 first; int() would not do.
as_int = cast(Callable[[Any], int], np.int64)


def view(buffer: Buffer) -> Bytes:
    """Bytes as a read-only array: always the same type, so that numba compiles once."""
    array = np.frombuffer(buffer, np.uint8)
    array.flags.writeable = False
    return array
