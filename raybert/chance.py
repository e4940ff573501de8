"""Chance without state: a stream of random numbers for every key, the same wherever and whenever it is drawn.

SplitMix64 (Steele et al. 2014): the key is where the stream begins. For compiled code.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from raybert.jit import as_int, compiled
from raybert.splitmix import STEP, mixed

Keys = npt.NDArray[np.uint64]
Stream = npt.NDArray[np.uint64]  # [1] where a stream stands
_ONE, _LOW_BITS = np.uint64(1), np.uint64(11)
_UNIT = 2.0**-53

_mixed = compiled(mixed)


def key_of(*numbers: int) -> np.uint64:
    """A key from integers, such as (seed, epoch, ...); other integers give an unrelated stream."""
    key = np.zeros(1, np.uint64)  # arrays wrap around, where scalars would warn
    for number in numbers:
        key = mixed(key + STEP) ^ np.uint64(number % (1 << 64))
    return np.uint64(mixed(key)[0])


def keys_of(key: np.uint64 | Keys, numbers: npt.NDArray[Any]) -> Keys:
    """A key for each of some numbers, such as the samples of an epoch; of one key, or each number of its own."""
    keys: Keys = mixed(mixed(np.atleast_1d(key) + STEP) ^ numbers.astype(np.uint64))
    return keys


@compiled
def uniform(stream: Stream) -> float:
    """The next number of a stream, in [0, 1), to 53 bits."""
    stream[0] += STEP
    return np.float64(_mixed(stream[0]) >> _LOW_BITS) * _UNIT


@compiled
def below(limit: int, stream: Stream) -> int:
    """The next number of a stream as an integer in [0, limit)."""
    return as_int(uniform(stream) * limit)
