"""The Ray cluster of a run: its own local one or that of RAY_ADDRESS, and whether it is large enough."""

from __future__ import annotations

import json
import logging
import os
import secrets
import signal
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import ray
import torch
from ray._private.runtime_env.constants import RAY_JOB_CONFIG_JSON_ENV_VAR
from ray.autoscaler.v2.utils import is_autoscaler_v2
from ray.exceptions import AuthenticationError, RayError

from raybert import interface
from raybert.allocator import MALLOC
from raybert.config import ClusterConfig
from raybert.errors import UserError
from raybert.storage import Directory

COORDINATOR = "AutoscalingCoordinator"  # Ray's actor of that name, in a namespace of that name
REQUEST = "ray_request"  # names, in the run directory, what the newest driver asks of Ray
ADDRESS, LOCAL = "RAY_ADDRESS", "local"
CONNECT_TIMEOUT_S = 5
HANG_SLACK_S = 10.0  # the lookout is to be first: what Ray gives up takes it a minute to end
TOKEN = "set RAY_AUTH_MODE=token and put the token into ~/.ray/auth_token, or name its file in RAY_AUTH_TOKEN_PATH"
LOCAL_FEED_CPUS = 2  # logical CPUs beyond the workers', for the feed's tasks
ENVIRONMENT = {
    # Ray Train's defaults, above all for noticing what went wrong, are several times as long.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1",
    "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": "5",
    "RAY_TRAIN_ENABLE_STATE_TRACKING": "0",
}

NO_NODES_FOR_THE_FEED = {
    # Ray Data would ask the autoscaler for twice the nodes once half of a resource is in use, as workers do.
    f"RAY_DATA_DEFAULT_CLUSTER_SCALING_UP_{resource}_UTIL_THRESHOLD": "1e9"
    for resource in ("CPU", "GPU", "MEMORY", "OBJECT_STORE_MEMORY")
}


@dataclass(frozen=True)
class Node:
    """What a live node has."""

    num_cpus: float
    num_gpus: float


def is_local() -> bool:
    """Whether a run starts its own Ray on this machine: no cluster is named."""
    return os.environ.get(ADDRESS, LOCAL) in ("", LOCAL)


def check_gpus(config: ClusterConfig) -> None:
    """Refuse GPUs where the run stays on this machine, which has none; a cluster's are counted there.

    Raises:
        UserError: with what torch finds, and the remedy.
    """
    here = config.worker_range()[1] == 0 or is_local()
    if config.use_gpu and here and not torch.cuda.is_available():
        raise UserError(
            f"cluster.use_gpu is true, but torch {torch.__version__} finds no GPU on this machine (CUDA of this build: "
            f"{torch.version.cuda}); set cluster.use_gpu to false, mend the driver, or name a cluster in RAY_ADDRESS."
        )


@contextmanager
def connected(config: ClusterConfig, verbose: bool) -> Iterator[None]:
    """Ray for the time of the context: RAY_ADDRESS's cluster, or an own local one that ends with it.

    Raises:
        UserError: the cluster that RAY_ADDRESS names cannot be reached.
    """
    limits = {
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": str(config.start_timeout_s),
        "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": str(config.hang_timeout_s + HANG_SLACK_S),
    }
    for name, value in {**ENVIRONMENT, **limits}.items():
        os.environ.setdefault(name, value)
    variables = {**MALLOC, **NO_NODES_FOR_THE_FEED, **_own_state_api()}
    settings: dict[str, Any] = {
        "runtime_env": {"env_vars": {name: variables[name] for name in variables.keys() - _given_variables()}},
        "log_to_driver": verbose,
        "logging_level": logging.INFO if verbose else logging.ERROR,
    }
    interrupt = signal.getsignal(signal.SIGTERM)
    if is_local():
        # A token of its own: no other cluster's opens this Ray, and none is left in the home directory.
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        # Said explicitly: a stale record of another cluster on this machine must not be joined.
        num_cpus = config.worker_range()[1] * config.cpus_per_worker + LOCAL_FEED_CPUS
        ray.init(address=LOCAL, num_cpus=num_cpus, include_dashboard=False, **settings)
    else:
        settings["runtime_env"]["worker_process_setup_hook"] = f"{interface.__name__}.{interface.choose.__name__}"
        _join(os.environ[ADDRESS], settings)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, interrupt)  # Ray has put its own in place
    try:
        yield
    finally:
        ray.shutdown()


def _own_state_api() -> dict[str, str]:
    """Where Ray Train's cleaner of placement groups asks whether its controller lives.

    Left to itself it asks any Ray that it finds on the machine; one that does not know the controller makes it kill the
    workers. Our local Ray has no dashboard to ask, so nobody answers there, which the cleaner takes for a short outage.
    """
    if is_local():
        return {"RAY_API_SERVER_ADDRESS": "http://127.0.0.1:1"}
    host, _, port = os.environ[ADDRESS].rpartition(":")
    return {"RAY_API_SERVER_ADDRESS": os.environ[ADDRESS]} if host and port.isdigit() else {}


def _given_variables() -> set[str]:
    """The environment variables that this job was submitted with: Ray refuses a second value for one of them."""
    job = json.loads(os.environ.get(RAY_JOB_CONFIG_JSON_ENV_VAR) or "{}")
    return set((job.get("runtime_env") or {}).get("env_vars") or {})


def _join(address: str, settings: dict[str, Any]) -> None:
    """Connect to the cluster of RAY_ADDRESS."""
    _check_kind(address)
    try:
        host, _, port = address.rpartition("://")[2].rpartition(":")
        if host and port.isdigit():  # else "auto" or the like; Ray itself would try for minutes
            socket.create_connection((host.strip("[]"), int(port)), CONNECT_TIMEOUT_S).close()
        ray.init(**settings)
    except AuthenticationError as error:
        raise UserError(
            f"The cluster at RAY_ADDRESS={address} asks for a token, and there is none; {TOKEN}."
        ) from error
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"RAY_ADDRESS is {address!r}, but no Ray cluster answers there: {error}; start one with "
            "`ray start --head`, correct RAY_ADDRESS, or unset it to train on this machine alone. If the cluster wants "
            f"a token, {TOKEN}."
        ) from error


def _check_kind(address: str) -> None:
    """Refuse the addresses of Ray's other doors.

    Raises:
        UserError: naming the door, and the right one.
    """
    scheme = address.rpartition("://")[0]
    door = {"http": "the dashboard", "https": "the dashboard", "ray": "Ray Client"}.get(scheme)
    if door:
        raise UserError(
            f"RAY_ADDRESS is {address!r}, which is {door}; submit the run as a job, `ray job submit --working-dir . -- "
            "python run.py ...`, or, on a node of the cluster, set RAY_ADDRESS to the head's address, as 10.0.0.5:6379."
        )


def quiet(verbose: bool) -> None:
    """Without `verbose`, only errors are shown, of Ray's and of what draws the report."""
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if not verbose:
        for name in ("ray", "ray.data", "ray.train", "ray._private", "matplotlib"):
            logging.getLogger(name).setLevel(logging.ERROR)


def live_nodes() -> list[Node]:
    """The nodes that are alive now."""
    resources = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return [Node(found.get("CPU", 0), found.get("GPU", 0)) for found in resources]


def may_grow() -> bool:
    """Whether an autoscaler may add nodes: Ray's (v2), or one that has told Ray its node groups."""
    config = ray._private.state.state.get_cluster_config()
    return is_autoscaler_v2(fetch_from_server=True) or (config is not None and bool(config.node_group_configs))


def check_capacity(config: ClusterConfig) -> None:
    """Refuse a cluster that is too small and has no autoscaler; see `check_nodes`."""
    if not may_grow():
        check_nodes(live_nodes(), config)


def room(config: ClusterConfig) -> int:
    """How many workers the live nodes have room for."""
    return sum(_fitting(node, config) for node in live_nodes())


def shortage(config: ClusterConfig) -> str | None:
    """What a run waits for while the live nodes have no room for its workers; None if they have."""
    now, (low, high) = room(config), config.worker_range()
    if now >= low:
        return None
    return (
        f"waiting for nodes: {_needs(config)} for each of at least {low} workers, and room for {now} now; "
        f"`ray status` on the head says what the autoscaler does. It starts none at all if it may not start {high}."
    )


def replace_request(run: Directory, train_run_id: str) -> None:
    """Give up what a driver of the same run, that was killed, still asks for: for 180 s nobody else would get it."""
    if run.exists(REQUEST):
        cancel_request(run.read(REQUEST).decode())
    run.write(REQUEST, train_run_id.encode())


def cancel_request(train_run_id: str) -> None:
    """Give up what Ray Train asks of the autoscaler for a run: until then no node that it asks for goes for being idle.

    Train does so itself at the end of a run, but not when the driver is interrupted, after which nodes would stay, and
    cost, for more than three minutes.
    """
    with suppress(ValueError, RayError):  # nothing was asked, or nobody answers: it expires
        coordinator = ray.get_actor(COORDINATOR, namespace=COORDINATOR)
        ray.get(coordinator.cancel_request.remote(f"train-{train_run_id}"), timeout=CONNECT_TIMEOUT_S)


def check_nodes(nodes: Sequence[Node], config: ClusterConfig) -> None:
    """Refuse nodes that can never run the workers, or whose workers would leave no CPU for the feed.

    Args:
        nodes: all that the cluster will have.
        config: what the run asks for.

    Raises:
        UserError: with what is asked for, what there is, and the remedy.
    """
    low, high = config.worker_range()
    fitting = sum(_fitting(node, config) for node in nodes)
    num_cpus, num_gpus = sum(node.num_cpus for node in nodes), sum(node.num_gpus for node in nodes)
    needs = _needs(config)
    has = f"the cluster has {num_cpus:g} CPUs and {num_gpus:g} GPUs on {len(nodes)} nodes, room for {fitting} workers"
    if fitting < low:
        raise UserError(
            f"cluster.num_workers={config.num_workers} needs at least {low} workers of {needs} each, but {has}; "
            "lower cluster.num_workers, or add nodes. (An autoscaler counts if the head was started with "
            "RAY_enable_autoscaler_v2=1.)"
        )
    num_workers = min(high, fitting)
    if num_cpus - num_workers * config.cpus_per_worker < 1:
        raise UserError(
            f"cluster.num_workers={config.num_workers} at {needs} each takes every CPU, but the feed needs one of its "
            f"own: {has}; lower cluster.num_workers or cluster.cpus_per_worker, or add CPUs."
        )


def _needs(config: ClusterConfig) -> str:
    return f"{config.cpus_per_worker} CPU" + (" and 1 GPU" if config.use_gpu else "")


def _fitting(node: Node, config: ClusterConfig) -> int:
    by_cpu = int(node.num_cpus // config.cpus_per_worker)
    return min(by_cpu, int(node.num_gpus)) if config.use_gpu else by_cpu
