"""SplitMix64's constants and output function (Steele et al. 2014, figure 16): 64 bits well mixed."""

from __future__ import annotations

from typing import Any

import numpy as np

STEP, _MIX_1, _MIX_2 = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_SHIFT_1, _SHIFT_2, _SHIFT_3 = np.uint64(30), np.uint64(27), np.uint64(31)


def mixed(z: Any) -> Any:
    """A bijection of uint64 whose every output bit depends on every input bit; arrays in numpy, scalars in numba."""
    z = (z ^ (z >> _SHIFT_1)) * _MIX_1
    z = (z ^ (z >> _SHIFT_2)) * _MIX_2
    return z ^ (z >> _SHIFT_3)
