"""Stragglers: the rank that all others wait for at every step, and whether it computes slowly or its data is late.

All ranks leave a step together, since gradients are averaged in it. So only what a rank spends before that, on its own,
shows which one is late.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

FACTOR = 1.5  # of the others' time to compute; a rank that holds them up by half of it is named
OVER = 1.25  # below which it is over
LEAST_S = 0.01  # a rank that holds the others up by less is not named
NUM_WINDOWS = 5  # log windows that are looked at
LASTS_S = 30.0  # before which a rank that is late is not named


@dataclass(frozen=True)
class Pace:
    """One rank's seconds a step on its own, over a log window.

    Args:
        compute_s: NaN where not known; from the batch's arrival to where gradients are averaged over ranks; median.
        wait_s: for the batch; mean, since data comes in blocks of several steps.
    """

    compute_s: float
    wait_s: float


@dataclass
class Stragglers:
    """Judges the paces of all ranks, window by window, and names each rank once while it is late.

    Args:
        hosts: of the ranks.
    """

    hosts: Sequence[str]
    _windows: deque[Sequence[Pace]] = field(default_factory=lambda: deque(maxlen=NUM_WINDOWS))
    _since_s: dict[tuple[str, int], float] = field(default_factory=dict)
    _named: set[tuple[str, int]] = field(default_factory=set)

    def judge(self, paces: Sequence[Pace], now_s: float) -> Iterator[str]:
        """What is to be told after another window, which ended at `now_s`: who is late, and who is no longer."""
        if any(math.isnan(pace.compute_s) or math.isnan(pace.wait_s) for pace in paces):
            return  # of a window whose steps tell nothing
        self._windows.append(paces)
        if len(self._windows) < NUM_WINDOWS or len(paces) == 1:
            return
        ranks = list(zip(*self._windows, strict=True))
        computes_s = [statistics.median(pace.compute_s for pace in windows) for windows in ranks]
        waits_s = [statistics.fmean(pace.wait_s for pace in windows) for windows in ranks]
        # Of two ranks the faster one is what the other is compared with.
        usual_s = statistics.median_low(computes_s)
        yield from self._compare("is slow: it computes", computes_s, usual_s, now_s)
        yield from self._compare("waits for data:", waits_s, usual_s, now_s)

    def _compare(self, what: str, seconds: Sequence[float], usual_s: float, now_s: float) -> Iterator[str]:
        """Compare ranks with their median; `usual_s` is what a step takes to compute."""
        median_s = statistics.median_low(seconds)
        for rank, mine_s in enumerate(seconds):
            late_s, figures = mine_s - median_s, f"{mine_s:.3f} s a step, the median of all ranks is {median_s:.3f} s"
            who, key = f"rank {rank} ({self.hosts[rank]})", (what, rank)
            if key in self._named:
                if late_s < max((OVER - 1) * usual_s, LEAST_S / 2):
                    self._named.discard(key)
                    yield f"{who} no longer {what} {figures}."
            elif late_s <= max((FACTOR - 1) * usual_s, LEAST_S):
                self._since_s.pop(key, None)
            elif now_s - self._since_s.setdefault(key, now_s) >= LASTS_S:
                self._named.add(key)
                del self._since_s[key]
                yield f"{who} {what} {figures}; the others wait for it."
