"""The lookout: names the worker that does not answer, and kills it; names the one that all others wait for.

Ray Train gives up a worker whose process does not answer, but waits a minute for such a process to end; a collective
that nobody joins ends by its timeout. Neither says in a person's words which rank, process and host it was.
"""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raybert import progress
from raybert.events import Event, Tell
from raybert.progress import Place, described

ASK_S = 2.0  # between two questions to a worker


class Lookout:
    """Asks every worker of a group where it is, without waiting for answers."""

    def __init__(self, tell: Tell, hang_timeout_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        """Args:
        tell: takes events to the driver.
        hang_timeout_s: seconds without an answer after which a worker is killed; it is named after half of them.
        clock: seconds.
        """
        self._tell, self._hang_timeout_s, self._limit_s, self._clock = tell, hang_timeout_s, hang_timeout_s / 2, clock
        self.begin()

    def begin(self) -> None:
        """Forget the workers; there are others now."""
        self._asked: dict[int, tuple[Any, float]] = {}
        self._heard_at_s: dict[int, float] = {}
        self._places: dict[int, Place] = {}
        self._since_s = self._clock()
        self._moving_at_s = math.inf
        self._named: set[int] = set()
        self._killed: set[int] = set()

    @property
    def trained_s(self) -> float:
        """Seconds since a worker was first seen to go from one step to the next; 0 before."""
        return max(0.0, self._clock() - self._moving_at_s)

    def look(self, workers: Sequence[Any]) -> None:
        """Take the answers there are, ask again, and name whom that shows; called at every poll.

        Args:
            workers: Ray Train's, by rank.
        """
        before = dict(self._places)
        for rank, worker in enumerate(workers):
            self._exchange(rank, worker)
        now_s = self._clock()
        if self._places != before or len(self._places) < len(workers):
            self._since_s = now_s
        silent = {rank: now_s - at_s for rank, (_, at_s) in self._asked.items() if now_s - at_s >= self._limit_s}
        if silent:
            self._name(workers, silent, "does not answer")
            self._kill(workers, silent)
        elif now_s - self._since_s >= self._limit_s:
            for rank in awaited(self._places):
                what = f"{described(self._places[rank])}, for which the others wait,"
                self._name(workers, {rank: now_s - self._since_s}, what)

    def _exchange(self, rank: int, worker: Any) -> None:
        """Take a worker's answer if it is there; ask where none is awaited."""
        now_s = self._clock()
        if rank not in self._asked:
            if now_s - self._heard_at_s.get(rank, -ASK_S) >= ASK_S:
                self._asked[rank] = worker.execute_async(progress.place), now_s
            return
        reply, _ = self._asked[rank]
        if ray.wait([reply], timeout=0)[0]:
            del self._asked[rank]
            self._heard_at_s[rank] = now_s
            try:
                place = ray.get(reply)
                if self._places.get(rank, place)[0] not in (-1, place[0]):
                    self._moving_at_s = min(self._moving_at_s, now_s)
                self._places[rank] = place
            except RayError:  # it died: Ray Train's next poll says so
                self._places.pop(rank, None)

    def _name(self, workers: Sequence[Any], silent_s: Mapping[int, float], what: str) -> None:
        """Warn of workers, of each once."""
        for rank, for_s in silent_s.items():
            if rank not in self._named:
                self._named.add(rank)
                self._tell(
                    Event("warning", text=f"rank {rank} ({whereabouts(workers[rank])}) {what} since {for_s:.0f} s.")
                )

    def _kill(self, workers: Sequence[Any], silent_s: Mapping[int, float]) -> None:
        """End the processes that have been silent for too long, from a task on their nodes; Ray Train replaces them."""
        for rank, for_s in silent_s.items():
            if for_s >= self._hang_timeout_s and rank not in self._killed:
                self._killed.add(rank)
                self._tell(Event("warning", text=f"rank {rank} ({whereabouts(workers[rank])}) is killed and replaced."))
                there: Any = NodeAffinitySchedulingStrategy(workers[rank].metadata.node_id, soft=False)
                task: Any = ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=there)(end)
                task.remote(workers[rank].metadata.pid)


def end(pid: int) -> None:
    """End a process of this machine, even one that is stopped."""
    os.kill(pid, signal.SIGKILL)


def awaited(places: Mapping[int, Place]) -> list[int]:
    """The ranks that the others wait for; none where all are at one place."""
    least = min(places.values())
    return [rank for rank, place in places.items() if place == least] if max(places.values()) > least else []


def whereabouts(worker: Any) -> str:
    """A worker's process and host."""
    found = worker.metadata
    return f"process {found.pid} on {found.hostname}, {found.node_ip}"
