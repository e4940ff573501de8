"""`notice`: beside `ray start` on a spot machine, wait for the cloud's notice and drain this node from Ray.

Ray itself asks no cloud. A drained node gets nothing new to do, and a run of raybert leaves it at its next checkpoint,
which it makes at once, where a node that just goes costs the steps since the last one.
"""

from __future__ import annotations

import argparse
import time
from datetime import UTC, datetime, timedelta

import ray
from ray._private.services import canonicalize_bootstrap_address_or_die, find_node_ids
from ray._raylet import GcsClient  # type: ignore[attr-defined]
from ray.core.generated.autoscaler_pb2 import DrainNodeReason

from raybert.errors import UserError
from raybert.notice import CLOUDS, HOST, Notice, watch

CALL_TIMEOUT_S = 5  # of one call to the head
RETRY_S = 0.5
LEAST_TRIES = timedelta(seconds=30)  # however near the deadline: a machine may outlive it
NODE_ID_DIGITS = 2 * ray.NodeID.size()


class NotDrainedError(Exception):
    """The head did not take the request."""


def main(argv: list[str]) -> int:
    """Wait for a notice, drain the node, and end: a drained node does not come back, so nothing is left to watch for.

    Raises:
        UserError: it cannot be told which node to drain.
    """
    options = _parser().parse_args(argv)
    node_id = _checked(options.node_id) if options.node_id else find_node()
    tell(f"watching for the end of {f'node {node_id}' if node_id else 'a node that is not started yet'}")
    notice = watch(CLOUDS[options.cloud](options.endpoint), options.interval, tell)
    return 0 if drain(options.node_id, options.address, notice) else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python run.py notice",
        description=(__doc__ or "").replace("`notice`: beside", "Beside"),
        epilog="Ends with code 0 when the node drains, 1 when its head could not be told so before the deadline. A "
        "metadata service that does not answer is only warned of. Ray's token is found as everywhere: "
        "RAY_AUTH_MODE=token and ~/.ray/auth_token or RAY_AUTH_TOKEN_PATH.",
    )
    parser.add_argument("--cloud", choices=CLOUDS, default="auto", help="default: %(default)s, whose service answers")
    parser.add_argument(
        "--endpoint", type=_url, metavar="URL", default=HOST, help="of the metadata service; default: %(default)s"
    )
    parser.add_argument(
        "--interval", type=_positive, metavar="SECONDS", default=1.0, help="between two questions; default: %(default)s"
    )
    parser.add_argument("--node-id", metavar="HEX", help="of the node to drain; default: the one on this machine")
    parser.add_argument("--address", metavar="HOST:PORT", help="of the head; default: RAY_ADDRESS, or as Ray finds it")
    return parser


def _url(text: str) -> str:
    if not text.startswith(("http://", "https://")):
        raise argparse.ArgumentTypeError(f"must begin with http://, got {text}")
    return text.rstrip("/")


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be above 0, got {text}")
    return value


def _checked(node_id: str) -> str:
    if len(node_id) != NODE_ID_DIGITS or set(node_id) - set("0123456789abcdef"):
        raise UserError(
            f"--node-id must be {NODE_ID_DIGITS} hexadecimal digits, got {node_id!r}; `ray list nodes` shows the ids."
        )
    return node_id


def tell(text: str) -> None:
    """A line of the log, with the time in UTC."""
    print(f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} notice: {text}", flush=True)


def find_node() -> str | None:
    """The id of the node on this machine, in hexadecimal, found as Ray does it: among the processes; None before it is.

    Raises:
        UserError: there are several.
    """
    found = sorted(find_node_ids())
    if len(found) > 1:
        raise UserError(f"{len(found)} Ray nodes are on this machine; name one with --node-id: {', '.join(found)}.")
    return found[0] if found else None


def drain(node_id: str | None, address: str | None, notice: Notice) -> bool:
    """Tell Ray's head that a node will be preempted; tried again until the deadline, and 30 s at least.

    Args:
        node_id: in hexadecimal; None for the one on this machine.
        address: the head's; None for the one that Ray finds.
        notice: why, and until when.

    Returns:
        Whether the head took it.
    """
    until = max(notice.deadline, datetime.now(UTC) + LEAST_TRIES)
    told = False
    while True:
        try:
            drained = node_id or find_node()
            _drain(drained, canonicalize_bootstrap_address_or_die(address or "auto"), notice)
        except Exception as error:  # whatever it is, there is nothing better to do than to try again
            if not told:
                tell(f"warning: {notice.what} at {notice.deadline:%H:%M:%S}, not drained yet: {error!r}")
            told = True
            if datetime.now(UTC) >= until:
                return False
            time.sleep(RETRY_S)
        else:
            tell(f"{notice.what} at {notice.deadline:%H:%M:%S}: node {drained} is drained")
            return True


def _drain(node_id: str | None, address: str, notice: Notice) -> None:
    """As `ray drain-node` does it, with a time limit and only for a node that the head knows: Ray accepts any id.

    Raises:
        NotDrainedError: the node is not there, or the head does not take the request.
    """
    if node_id is None:
        raise NotDrainedError("no Ray node is on this machine")
    head = GcsClient(address=address)  # tries for half a minute by itself
    if ray.NodeID.from_hex(node_id) not in head.get_all_node_info(timeout=CALL_TIMEOUT_S):
        raise NotDrainedError(f"the head at {address} knows no node {node_id}")
    reason, deadline_ms = DrainNodeReason.DRAIN_NODE_REASON_PREEMPTION, int(notice.deadline.timestamp() * 1000)
    is_accepted, objection = head.drain_node(node_id, reason, notice.what, deadline_ms, timeout=CALL_TIMEOUT_S)
    if not is_accepted:
        raise NotDrainedError(f"the head at {address} refuses: {objection}")
