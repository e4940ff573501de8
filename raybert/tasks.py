"""Independent calls as tasks of Ray Data, anywhere in the cluster."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import ray
from ray.data import DataContext
from ray.exceptions import RayTaskError

from raybert import cluster
from raybert.config import ClusterConfig
from raybert.errors import UserError
from raybert.ingest import quiet_data
from raybert.processes import Run


@contextmanager
def on_ray(verbose: bool) -> Iterator[Run]:
    """Calls on the cluster of RAY_ADDRESS, as tasks of one CPU each; a task whose node dies is run again.

    Raises:
        UserError: the cluster cannot be reached; or a call raised it.
    """
    cluster.quiet(verbose)
    with cluster.connected(ClusterConfig(), verbose):
        quiet_data()
        DataContext.get_current().raise_original_map_exception = True
        yield _run_on_ray


def _run_on_ray(function: Callable[..., Any], shared: tuple[Any, ...], items: Sequence[Any]) -> Iterator[Any]:
    given = ray.put((shared, items))

    def call(row: dict[str, int]) -> dict[str, Any]:
        shared, items = ray.get(given)
        return {"made": [function(*shared, items[row["id"]])]}

    calls = ray.data.range(len(items), override_num_blocks=len(items)).map(call)
    try:
        for row in calls.iter_rows():
            yield row["made"][0]
    except RayTaskError as error:
        raise (error.cause if isinstance(error.cause, UserError | OSError) else error) from error
