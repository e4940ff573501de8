"""Spares: processes that are started, and done with importing, before anybody needs them.

Ray starts a process when an actor is created, which then imports torch: seconds in which nobody trains. So beside each
worker, and on each node that may get one, a process is kept that the next group of workers finds ready. Only speed
depends on this: what is not there is started when it is needed.
"""

from __future__ import annotations

import importlib
import math
import os
import time
from collections import Counter
from collections.abc import Callable
from contextlib import closing, suppress

import grpc
import ray
from ray._private.grpc_utils import init_grpc_channel
from ray._private.ray_constants import WORKER_PROCESS_SETUP_HOOK_ENV_VAR
from ray.core.generated.common_pb2 import PYTHON
from ray.core.generated.node_manager_pb2 import PrestartWorkersRequest
from ray.core.generated.node_manager_pb2_grpc import NodeManagerServiceStub

from raybert import interface

ACTORS = 3  # that Ray Train starts beside the workers of a group, on the node of its controller
EVERY_S = 3.0  # a raylet that is asked for more processes at once than it has CPUs forgets the rest
KEEP_S = 7 * 24 * 3600  # that Ray keeps a process which nobody has come for
CALL_S = 2.0  # that a raylet may take to answer


IMPORTED = "torch._dynamo", "raybert.worker"  # the first optimizer imports torch's compiler, for a second


def begin() -> None:
    """What Ray calls in a worker's process before it takes work."""
    interface.choose()
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # no import may fix the GPUs before Ray has named them
    for name in IMPORTED:
        importlib.import_module(name)


ENVIRONMENT = {"env_vars": {WORKER_PROCESS_SETUP_HOOK_ENV_VAR: f"{__name__}.{begin.__name__}"}}


def environment() -> str:
    """The runtime environment of this process, as Ray spells it; a process serves no actor of another one."""
    spelt: str = ray.get_runtime_context().get_runtime_env_string()
    return spelt


def prestart(place: str, environment: str) -> None:
    """Start a process for an actor of this job.

    Args:
        place: host:port of the raylet of the node that it is for.
        environment: that the actor will have.
    """
    job = bytes.fromhex(ray.get_runtime_context().get_job_id())
    request = PrestartWorkersRequest(language=PYTHON, job_id=job, keep_alive_duration_secs=KEEP_S, num_workers=1)
    request.runtime_env_info.serialized_runtime_env = environment
    with suppress(grpc.RpcError), closing(init_grpc_channel(place)) as channel:
        NodeManagerServiceStub(channel).PrestartWorkers(request, timeout=CALL_S)


class Spares:
    """How many processes wait on each node: what was asked for, less what has been used since."""

    def __init__(
        self, start: Callable[[str, str], None] = prestart, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._start, self._clock = start, clock
        self._numbers: Counter[tuple[str, str]] = Counter()
        self._started_at_s: dict[str, float] = {}

    def use(self, place: str, environment: str, number: int) -> None:
        """So many actors have started at a place, in processes that waited there."""
        self._numbers[place, environment] = max(0, self._numbers[place, environment] - number)

    def keep(self, place: str, environment: str, number: int) -> None:
        """Start another process where fewer than so many wait, if it is time for one.

        Args:
            place: host:port of a node's raylet.
            environment: of the actors that they are for.
            number: that are to wait.
        """
        now_s = self._clock()
        is_time = now_s - self._started_at_s.get(place, -math.inf) >= EVERY_S
        if self._numbers[place, environment] < number and is_time:
            self._started_at_s[place] = now_s
            self._numbers[place, environment] += 1
            self._start(place, environment)
