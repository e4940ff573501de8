"""Scaling: which number of workers an attempt gets, and when a running one is ended for another number.

Ray's own policy decides by a view of the cluster that is up to 20 s old, counts nodes that are about to go, and ends
workers without a word. This one looks afresh, knocks at every node, and ends workers only once the checkpoint that it
asked for is complete (`hold`), so that a planned change costs no step.

All that raybert needs of Ray's private parts for this is imported here; `tests/test_scaling.py` holds the contract.
"""

from __future__ import annotations

import math
import socket
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import ray
from ray._private.state import available_resources_per_node
from ray._raylet import RAY_NODE_ID_KEY  # type: ignore[attr-defined]
from ray.exceptions import RayError
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.callback import ControllerCallback
from ray.train.v2._internal.execution.scaling_policy import NoopDecision, ScalingDecision
from ray.train.v2._internal.execution.scaling_policy.elastic import ElasticScalingPolicy
from ray.train.v2._internal.execution.worker_group import Worker, WorkerGroupPollStatus, WorkerGroupState
from ray.train.v2.api.config import ScalingConfig

from raybert import hold
from raybert.events import Event
from raybert.inbox import Post
from raybert.lookout import Lookout
from raybert.spares import ACTORS, ENVIRONMENT, Spares, environment

KNOCK_S = 2.0  # that a node may take to answer
CALL_S = 5.0  # that Ray's actors may take to answer
LOOK_S = 2.0  # between two looks at how many workers there is room for while they run
IDLE_S = 0.2  # between two looks while there is no room; Ray's controller itself would not pause
CALM_S = 10.0  # of training, after which processes for the next group are started: not while this one starts
SETTLE_S = 5.0  # that a run which begins waits for more nodes than it needs at least, once they stop coming
RELEASE_S = 3.0  # that what workers held may take to be free after their end
ASK_AGAIN_S = 2.0  # after a checkpoint that was asked for could not be written

SEAM = "_initialize_and_run_controller"
NEEDED = {
    TorchTrainer: (SEAM,),
    ElasticScalingPolicy: ("_maybe_send_resource_request", "_get_resize_decision", "_autoscaling_coordinator"),
    ControllerCallback: ("on_controller_start_worker_group",),
    Worker: ("execute_async",),
}

Resources = Mapping[str, float]
T = TypeVar("T")


@dataclass(frozen=True)
class Node:
    """A live node as the scheduler knows it: where its raylet listens, and when it will be taken away, if so."""

    node_id: str
    address: str
    port: int
    is_draining: bool

    @property
    def place(self) -> str:
        """host:port of its raylet."""
        return f"{self.address}:{self.port}"


def live_nodes() -> dict[str, Node]:
    """The nodes that Ray takes to be alive, by id; none while its head does not answer."""
    try:
        draining, rows = ray._private.state.state.get_draining_nodes(), ray.nodes()
    except RayError:
        return {}
    return {
        row["NodeID"]: Node(row["NodeID"], row["NodeManagerAddress"], row["NodeManagerPort"], row["NodeID"] in draining)
        for row in rows
        if row["Alive"]
    }


def own_node() -> str:
    """Id of the node that this process is on."""
    node_id: str = ray.get_runtime_context().get_node_id()
    return node_id


def answers(node: Node) -> bool:
    """Whether the node's raylet takes a connection: one that was just killed is still alive in Ray's eyes."""
    try:
        with closing(socket.create_connection((node.address, node.port), KNOCK_S)):
            return True
    except OSError:
        return False


def room(resources: Mapping[str, Resources], worker: Resources) -> dict[str, int]:
    """How many workers each node has room for.

    Args:
        resources: of each node.
        worker: what one worker needs.
    """
    needs = {name: amount for name, amount in worker.items() if amount > 0}
    return {
        node: min(int(has.get(name, 0.0) // amount) for name, amount in needs.items())
        for node, has in resources.items()
    }


def seats(own: Mapping[str, int], rooms: Mapping[str, int], most: int) -> dict[str, int]:
    """Where the next group of workers may be: as this one is, and then where there is room.

    Args:
        own: workers of this group on each node.
        rooms: how many workers each node has room for; one that is not in it is not to be used.
        most: workers in all.
    """
    found: Counter[str] = Counter()
    for numbers in (own, rooms):
        for node_id, number in numbers.items():
            possible = min(number, rooms.get(node_id, 0)) - found[node_id]
            found[node_id] += max(0, min(possible, most - found.total()))
    return {node_id: number for node_id, number in found.items() if number}


class Persistence:
    """How long a wish has been the same: what comes and goes is not followed."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._wish: object = None
        self._since_s = 0.0

    def held_s(self, wish: object) -> float:
        """Seconds since the wish was first this one, without another between."""
        now_s = self._clock()
        if wish != self._wish:
            self._wish, self._since_s = wish, now_s
        return now_s - self._since_s


class CheckpointedScaling(ElasticScalingPolicy):
    """Starts on nodes that answer, leaves nodes that are about to go, and grows or shrinks right after a checkpoint."""

    def __init__(self, scaling_config: ScalingConfig, tell: Post, hang_timeout_s: float, keeps_spares: bool) -> None:
        """Args:
        scaling_config: smallest and largest number of workers; a wish for another number must last its
            `elastic_resize_monitor_interval_s` before it is followed.
        tell: takes events, and a handle of the process that this runs in, to the driver.
        hang_timeout_s: after which a worker that does not answer is killed.
        keeps_spares: whether processes wait for the next group of workers.
        """
        super().__init__(scaling_config)
        self._keeps_spares, self._spares = keeps_spares, Spares()
        self._environment: str | None = None
        self._tell = tell
        self._lookout = Lookout(tell, hang_timeout_s)
        self._avoided: list[str] = []
        self._begin(None)

    def _begin(self, started_at_s: float | None) -> None:
        """Forget what was wished for another group of workers."""
        self._started_at_s = started_at_s
        self._lookout.begin()
        self._wishes = Persistence()
        self._looked_at_s = self._asked_at_s = -math.inf
        self._possible: int | None = None
        self._rooms: dict[str, int] = {}

    def after_controller_start(self, train_run_context: Any) -> None:
        """Let the driver know whom to end when it is interrupted."""
        super().after_controller_start(train_run_context)
        self._tell.greet(ray.get_runtime_context().current_actor)

    def make_decision_for_non_running_worker_group(self) -> ScalingDecision:
        """As many workers as there is room for now."""
        self._maybe_send_resource_request()  # type: ignore[no-untyped-call]
        number = self._possible_workers(live_nodes(), {})
        if number is None or number < self.scaling_config.min_workers or not self._is_settled(number):
            time.sleep(IDLE_S)
            return NoopDecision()
        return self._get_resize_decision(number)

    def _is_settled(self, number: int) -> bool:
        """Whether a run that begins has waited long enough for nodes that are still on their way."""
        has_begun, is_all = self._started_at_s is not None, number == self.scaling_config.max_workers
        return has_begun or is_all or self._wishes.held_s(number) >= SETTLE_S

    def make_decision_for_running_worker_group(
        self, worker_group_state: WorkerGroupState, worker_group_status: WorkerGroupPollStatus
    ) -> ScalingDecision:
        """Whether to end the workers for another number of them, or for other nodes."""
        group, first, size = worker_group_state, worker_group_state.workers[0], worker_group_state.num_workers
        self._maybe_send_resource_request()  # type: ignore[no-untyped-call]
        if group.start_time != self._started_at_s:
            self._begin(group.start_time)
            if self._keeps_spares:
                self._use_spares(live_nodes(), group.workers)
        self._lookout.look(group.workers)
        nodes = live_nodes()
        is_leaving = any(
            nodes[worker.metadata.node_id].is_draining for worker in group.workers if worker.metadata.node_id in nodes
        )
        if time.monotonic() - self._looked_at_s >= (IDLE_S if is_leaving else LOOK_S):
            own = Counter(worker.metadata.node_id for worker in group.workers)
            self._possible, self._looked_at_s = self._possible_workers(nodes, own), time.monotonic()
        number = size if self._possible is None else self._possible
        lasts_s = self._wishes.held_s(number)
        if self._keeps_spares and self._lookout.trained_s >= CALM_S:
            self._keep_spares(nodes, Counter(worker.metadata.node_id for worker in group.workers))
        is_wanted = is_leaving or (number != size and lasts_s >= self.scaling_config.elastic_resize_monitor_interval_s)
        if not is_wanted or number < self.scaling_config.min_workers:
            self._take_back(first)
            return NoopDecision()
        if not self._is_held(first):
            return NoopDecision()
        reason = "a node is about to go" if is_leaving else "there are more nodes" if number > size else "nodes went"
        self._tell(Event("resize", text=f"{reason}: from {size} to {number} workers"))
        return self._get_resize_decision(number)

    def on_controller_start_worker_group(self, *, num_workers: int, **_: object) -> dict[str, str] | None:
        """Keep the workers off nodes that do not answer or are about to go.

        Waits until what the workers before them held is free: while a second reservation stood beside the first, an
        autoscaler would start nodes for it.
        """
        until_s = time.monotonic() + RELEASE_S
        while self._free_workers() < num_workers and time.monotonic() < until_s:
            time.sleep(IDLE_S)
        return {RAY_NODE_ID_KEY: f"!in({','.join(self._avoided)})"} if self._avoided else None

    def _free_workers(self) -> int:
        """How many workers what nobody uses has room for."""
        try:
            free = room(available_resources_per_node(), self.scaling_config._resources_per_worker_not_none)
        except RayError:
            return 0
        return sum(number for node_id, number in free.items() if node_id not in self._avoided)

    def _possible_workers(self, nodes: Mapping[str, Node], own: Mapping[str, int]) -> int | None:
        """How many workers there is room for, on nodes that answer and stay; None if Ray does not say.

        Args:
            nodes: that Ray takes to be alive.
            own: workers of this run on each node.
        """
        with ThreadPoolExecutor(32) as pool:
            there = dict(zip(nodes, pool.map(answers, nodes.values()), strict=True))
        staying = {node_id for node_id, node in nodes.items() if there[node_id] and not node.is_draining}
        self._avoided = sorted(nodes.keys() - staying)
        try:
            reserved, free = self._fresh_reservations(), available_resources_per_node()
        except RayError:
            return None
        worker = self.scaling_config._resources_per_worker_not_none
        allowed = room(reserved, worker)
        # Another node that nobody uses may stand in for a reserved one that goes.
        rooms = Counter(own) | Counter(allowed) | Counter(room(free, worker))
        self._rooms = {node_id: number for node_id, number in rooms.items() if node_id in staying}
        there_is = sum(self._rooms.values())
        return min(there_is, sum(allowed.values()), self.scaling_config.max_workers)

    def _fresh_reservations(self) -> dict[str, Resources]:
        """What Ray has set aside for this run on each node, as of now."""
        reply: Any = self._autoscaling_coordinator.get_reserved_resources.remote(self._requester_id, recompute=True)
        reserved: dict[str, Resources] = ray.get(reply, timeout=CALL_S)
        return reserved

    def _use_spares(self, nodes: Mapping[str, Node], workers: Sequence[Worker]) -> None:
        """Note that a group has started, where processes waited for it."""
        own, self._environment = nodes.get(own_node()), _called(workers[0], environment) or self._environment
        for worker in workers:
            node = nodes.get(worker.metadata.node_id)
            if node and self._environment:
                self._spares.use(node.place, self._environment, 1)
        if own:
            self._spares.use(own.place, environment(), ACTORS)

    def _keep_spares(self, nodes: Mapping[str, Node], workers: Mapping[str, int]) -> None:
        """Have processes wait where the next group may start; `workers` of this one are on each node."""
        own = nodes.get(own_node())
        if own:
            self._spares.keep(own.place, environment(), ACTORS)
        for node_id, number in seats(workers, self._rooms, self.scaling_config.max_workers).items():
            if node_id in nodes and self._environment:
                self._spares.keep(nodes[node_id].place, self._environment, number)

    def _is_held(self, first: Worker) -> bool:
        """Whether rank 0 waits to be ended, its checkpoint complete; it is asked to where that is not under way."""
        state = _called(first, hold.state)
        if state == "none" and time.monotonic() - self._asked_at_s >= ASK_AGAIN_S:
            self._asked_at_s = time.monotonic()
            _called(first, hold.ask)
        return state == "held"

    def _take_back(self, first: Worker) -> None:
        """Let training go on where it was asked to wait for what is not wanted any more."""
        if self._asked_at_s > -math.inf and _called(first, hold.state) != "none":
            _called(first, hold.release)
        self._asked_at_s = -math.inf


def _called(worker: Worker, function: Callable[[], T]) -> T | None:
    """What a function returns in a worker's process; None if it does not answer: Ray's next poll says why."""
    reply: Any = worker.execute_async(function)
    try:
        result: T = ray.get(reply, timeout=CALL_S)
    except RayError:
        return None
    return result


class ElasticTrainer(TorchTrainer):
    """Ray's trainer, with this module's policy in the place of Ray's, and nothing that outlives it: the one seam."""

    def __init__(
        self,
        *arguments: Any,
        run_config: Any,
        tell: Post,
        hang_timeout_s: float,
        keeps_spares: bool,
        **named: Any,
    ) -> None:
        if keeps_spares:
            run_config.worker_runtime_env = ENVIRONMENT
        super().__init__(*arguments, run_config=run_config, **named)
        self._policy = partial(CheckpointedScaling, tell=tell, hang_timeout_s=hang_timeout_s, keeps_spares=keeps_spares)

    def _initialize_and_run_controller(self, **arguments: Any) -> Any:
        scaling: Any = self.scaling_config
        arguments["scaling_policy"] = self._policy(scaling)
        # Its process outlives a driver that is killed, for ever; Ray itself removes the placement groups of such a one.
        arguments["callbacks"] = [
            each for each in arguments["callbacks"] if not isinstance(each, PlacementGroupCleanerCallback)
        ]
        return super()._initialize_and_run_controller(**arguments)  # type: ignore[misc]


def missing() -> list[str]:
    """What this module needs of Ray's insides and the installed Ray lacks."""
    return [f"{owner.__name__}.{name}" for owner, names in NEEDED.items() for name in names if not hasattr(owner, name)]
