"""Independent calls as Ray tasks, anywhere in the cluster."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray.exceptions import RayTaskError

from raybert import cluster
from raybert.config import ClusterConfig
from raybert.errors import UserError

Run = Callable[[Callable[..., Any], tuple[Any, ...], Iterable[Any]], Iterator[Any]]
"""Gives function(*shared, item) for each item, as they are ready."""


@contextmanager
def on_ray(num_workers: int, verbose: bool) -> Iterator[Run]:
    """Calls as Ray tasks of one CPU each, for the time of the context; a task whose node dies is run again.

    Args:
        num_workers: CPUs of the local Ray, two or more; a cluster that RAY_ADDRESS names has its own.
        verbose: log what Ray does.

    Raises:
        UserError: the cluster cannot be reached; or a call raised it.
    """
    cluster.quiet(verbose)
    with cluster.connected(ClusterConfig(num_workers=max(0, num_workers - cluster.LOCAL_FEED_CPUS)), verbose):
        yield _run_on_ray


def _run_on_ray(function: Callable[..., Any], shared: tuple[Any, ...], items: Iterable[Any]) -> Iterator[Any]:
    remote: Any = ray.remote(scheduling_strategy="SPREAD")(function)
    references = [ray.put(value) for value in shared]
    pending = [remote.remote(*references, item) for item in items]
    while pending:
        ready, pending = ray.wait(pending, num_returns=1)
        try:
            yield ray.get(ready[0])
        except RayTaskError as error:
            raise (error.cause if isinstance(error.cause, UserError | OSError) else error) from error
