"""Sample order: which sample stands at which position of the run, a pure function of integers.

Positions number the samples of the whole run: the global batch of `step` is positions [step * G, (step + 1) * G).
Position p is place p % N of epoch p // N, N the number of samples. The order of an epoch is a shuffle in two levels, so
that a window can be read from few pages: pages are permuted over the epoch, then samples are permuted inside each
window of K * G positions (a window that holds an epoch boundary permutes each side by itself: no sample crosses it).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt

Samples = npt.NDArray[np.int64]

_PAGES, _WINDOW = 0, 1  # what a random stream is for; part of its seed


def steps_per_window(window_size: int, global_batch_size: int) -> int:
    """K: the largest power of two of global batches that a window of `window_size` samples holds, at least 1."""
    return 1 << max(0, (window_size // global_batch_size).bit_length() - 1)


def rank_slice(global_batch_size: int, rank: int, world_size: int) -> slice:
    """The part of a global batch that one rank processes: contiguous, and sizes differ by at most one.

    Raises:
        ValueError: the world is larger than the batch, or the rank is not in the world.
    """
    if not 0 <= rank < world_size <= global_batch_size:
        raise ValueError(f"rank {rank} of {world_size} has no slice of a global batch of {global_batch_size}")
    return slice(rank * global_batch_size // world_size, (rank + 1) * global_batch_size // world_size)


@dataclass(frozen=True)
class SampleOrder:
    """The order of a run, for given samples, seed, global batch size and window.

    Args:
        page_sizes: [pages] samples in each page; samples are numbered page after page.
        seed: of the shuffle.
        global_batch_size: G, samples a step.
        window_steps: K, steps a window.
    """

    page_sizes: npt.NDArray[np.int64]
    seed: int
    global_batch_size: int
    window_steps: int
    _newest: dict[int, Samples] = field(default_factory=dict, init=False, repr=False, compare=False)
    _epochs: dict[int, tuple[Samples, Samples]] = field(default_factory=dict, init=False, repr=False, compare=False)

    @cached_property
    def num_samples(self) -> int:
        """N, samples an epoch."""
        return int(self.page_sizes.sum())

    def window(self, number: int) -> Samples:
        """[K * G] the samples at positions [number * K * G, (number + 1) * K * G)."""
        size = self.window_steps * self.global_batch_size
        start, stop, epoch_size = number * size, (number + 1) * size, self.num_samples
        parts = []
        for epoch in range(start // epoch_size, -(-stop // epoch_size)):
            first = epoch * epoch_size
            places = self._places(epoch, max(start - first, 0), min(stop - first, epoch_size))
            parts.append(np.random.default_rng([self.seed, epoch, _WINDOW, number]).permutation(places))
        return np.concatenate(parts)

    def _places(self, epoch: int, start: int, stop: int) -> Samples:
        """Samples at places [start, stop) of an epoch whose pages, but not yet its samples, are shuffled."""
        pages, ends = self._shuffled_pages(epoch)
        first, last = np.searchsorted(ends, [start, stop - 1], side="right")
        pages, sizes = pages[first : last + 1], self.page_sizes[pages[first : last + 1]]
        skipped = start - (ends[first] - sizes[0])
        within = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        samples: Samples = np.repeat(self._page_starts[pages], sizes) + within
        return samples[skipped : skipped + stop - start]

    def _shuffled_pages(self, epoch: int) -> tuple[Samples, Samples]:
        """[pages] the pages in the order of an epoch, and at which place each one ends.

        Of hundreds of millions of samples this takes a second, and every rank needs it for every window that it checks.
        """
        if epoch not in self._epochs:
            pages = np.random.default_rng([self.seed, epoch, _PAGES]).permutation(len(self.page_sizes))
            self._epochs.clear()
            self._epochs[epoch] = pages, np.cumsum(self.page_sizes[pages])
        return self._epochs[epoch]

    @cached_property
    def _page_starts(self) -> Samples:
        starts: Samples = np.cumsum(self.page_sizes) - self.page_sizes
        return starts

    def global_batch(self, step: int) -> Samples:
        """[G] the samples of a step's global batch, by position."""
        number = step // self.window_steps
        if number not in self._newest:  # steps come in order: one window at hand serves K of them
            self._newest.clear()
            self._newest[number] = self.window(number)
        start = step % self.window_steps * self.global_batch_size
        return self._newest[number][start : start + self.global_batch_size]

    def positions(self, step: int) -> Samples:
        """[G] the positions of a step's global batch."""
        return np.arange(step * self.global_batch_size, (step + 1) * self.global_batch_size)
