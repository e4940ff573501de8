"""The deal: which samples of a global batch each rank gets, so that all have about as many tokens and none waits.

The batch stays the set that the sample order says; what is dealt are its places, of which rank r has `rank_slice`.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import numpy.typing as npt

from raybert.order import rank_slice

Ints = npt.NDArray[np.int64]


def deal(lengths: npt.NDArray[np.integer], world_size: int) -> Ints:
    """Which sample stands at each place; the samples of a rank stand the longest first.

    Samples are dealt by length in rounds that turn back at the end (1, 2, 3, 3, 2, 1, 1, ...), so what two ranks get
    differs by one longest sample at most, and usually by far less.

    Args:
        lengths: [steps, G] real tokens of each sample of some global batches.
        world_size: number of ranks, at most G.

    Returns:
        [steps, G] numbers in [0, G), each once a step.
    """
    longest_first: Ints = np.argsort(-lengths.astype(np.int64), axis=1, kind="stable")
    return longest_first[:, _hands(lengths.shape[1], world_size)]


@cache
def _hands(num_samples: int, world_size: int) -> Ints:
    """[G] which sample, counted from the longest, each rank gets in each round, rank after rank."""
    slices = [rank_slice(num_samples, rank, world_size) for rank in range(world_size)]
    whole_rounds, rest = divmod(num_samples, world_size)
    rounds = np.arange(whole_rounds * world_size).reshape(whole_rounds, world_size)
    rounds[1::2] = rounds[1::2, ::-1]
    more = iter(range(num_samples - rest, num_samples))
    hands = [
        [*rounds[:, rank], *([next(more)] if mine.stop - mine.start > whole_rounds else [])]
        for rank, mine in enumerate(slices)
    ]
    return np.concatenate(hands).astype(np.int64)
