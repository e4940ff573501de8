"""Peer snapshots: every few steps the state goes to host memory that outlives the workers, on two nodes.

Every rank of data parallel training holds the whole state, so any node that is left can give it to all. A `Holder` on
each of two nodes keeps the newest snapshots; `Peers`, beside the driver, knows the holders and which steps were trained
on since the newest checkpoint. Both end with the driver: they are never another run's, and nothing is left behind.

A snapshot is what an attempt was after a step. It may be used where the steps since a checkpoint are known, and the
last of them was trained by that same attempt: an attempt trains a step once, so its state there can be no other.
"""

from __future__ import annotations

import threading
import zlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import ray
import torch
from ray.exceptions import RayActorError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raybert.checkpoint import HostCopy, bring, host_copy
from raybert.history import StepRecord
from raybert.manifest import place
from raybert.snapshot import CALL_S, Snapshot
from raybert.step import TrainState
from raybert.world import World

NUM_NODES = 2  # that hold a snapshot
ANSWER_S = 2.0  # that a holder may take to say what it has; one on a dead node never does
MOVE_S = 120.0  # that the state may take from one process to another
CLOSE_S = 5.0

Arrays = Mapping[str, npt.NDArray[Any]]


class SnapshotError(Exception):
    """A snapshot could not be loaded; the next attempt begins from another one, or from the newest checkpoint."""


# Decisions


@dataclass(frozen=True)
class Trail:
    """The steps since a checkpoint, whoever trained them.

    Args:
        parent: the checkpoint's name; None at the beginning of a run.
        records: of the steps from there on, without a gap.
    """

    parent: str | None = None
    records: tuple[StepRecord, ...] = ()

    @property
    def first(self) -> int:
        """Step of the checkpoint."""
        return place(self.parent)[0] if self.parent else 0

    def followed(self, parent: str | None, records: Sequence[StepRecord]) -> Trail:
        """The trail after more steps; those it had from the first of them on are not history any more."""
        first = records[0].step if records else self.first + len(self.records)
        kept = (record for record in self.records if record.step < first)
        since = Trail(parent).first
        return Trail(parent, tuple(record for record in (*kept, *records) if record.step >= since))

    def leads_to(self, snapshot: Snapshot) -> bool:
        """Whether these steps made the snapshot's state."""
        records = self.until(snapshot.step)
        is_whole = [record.step for record in records] == list(range(self.first, snapshot.step))
        return is_whole and bool(records) and records[-1].attempt == snapshot.attempt

    def until(self, step: int) -> tuple[StepRecord, ...]:
        """The records of the steps before this one."""
        return tuple(record for record in self.records if record.step < step)


def newest_usable(
    held: Iterable[Snapshot], trail: Trail, committed_step: int, rolled_back: int, tried: Collection[Snapshot]
) -> Snapshot | None:
    """The snapshot that the next attempt begins from; None: it begins from the newest checkpoint.

    Args:
        held: what the holders that answer have.
        trail: as it is known.
        committed_step: of the newest intact checkpoint; 0 if there is none.
        rolled_back: newest attempt that the guard ended: what is as old may hold what spoilt it. 0 if there is none.
        tried: that were begun from often enough.
    """
    usable = [
        snapshot
        for snapshot in held
        if snapshot.step > committed_step
        and snapshot.attempt > rolled_back
        and snapshot not in tried
        and trail.leads_to(snapshot)
    ]
    return max(usable, default=None)


def savers(nodes: Sequence[str]) -> dict[int, str]:
    """Which ranks hand over the state, and the node of each: the lowest on each of the first nodes.

    Args:
        nodes: id of each rank's node.
    """
    lowest: dict[str, int] = {}
    for rank, node in enumerate(nodes):
        lowest.setdefault(node, rank)
    return {rank: node for node, rank in list(lowest.items())[:NUM_NODES]}


# What is kept


@dataclass(frozen=True)
class Parcel:
    """A state on its way between processes: arrays, which Ray maps and does not copy."""

    step: int
    num_updates: int
    model: Arrays
    optimizer: Arrays
    scaler: Mapping[str, Any]

    @classmethod
    def of(cls, copy: HostCopy) -> Parcel:
        model, optimizer = ({name: t.numpy() for name, t in part.items()} for part in (copy.model, copy.optimizer))
        return cls(copy.step, copy.num_updates, model, optimizer, copy.scaler)

    def unpacked(self) -> HostCopy:
        """The state, in memory of its own: what Ray maps is read-only."""
        model, optimizer = (
            {name: torch.from_numpy(array.copy()) for name, array in part.items()}
            for part in (self.model, self.optimizer)
        )
        return HostCopy(self.step, self.num_updates, model, optimizer, self.scaler)

    def checksum(self) -> int:
        """CRC-32 of all that it holds."""
        crc = zlib.crc32(repr((self.step, self.num_updates, sorted(self.scaler.items()))).encode())
        for part in (self.model, self.optimizer):
            for name, array in sorted(part.items()):
                crc = zlib.crc32(f"{name} {array.dtype} {array.shape}".encode(), crc)
                crc = zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data, crc)
        return crc


class Holder:
    """Keeps the newest snapshots of its node in the node's object store. An actor: its workers die, it stays."""

    def __init__(self) -> None:
        self._kept: dict[Snapshot, tuple[int, Any]] = {}

    def keep(self, snapshot: Snapshot, checksum: int, boxed: list[Any]) -> None:
        """Keep a snapshot, and the one before it; returns once it is complete.

        Args:
            snapshot: which one.
            checksum: of its parcel.
            boxed: a reference to the parcel, which dies with the worker: so it is put once more, as this one's.
        """
        self._kept = dict(list(self._kept.items())[-1:])  # first: a third would only take room
        self._kept[snapshot] = (checksum, ray.put(ray.get(boxed[0])))

    def held(self) -> list[Snapshot]:
        """Which snapshots there are."""
        return list(self._kept)

    def give(self, snapshot: Snapshot) -> tuple[int, list[Any]]:
        """Checksum of a snapshot, and a reference to its parcel."""
        checksum, own = self._kept[snapshot]
        return checksum, [own]


class Peers:
    """Knows the holders and the trail. An actor on the driver's node; it owns the holders, so they end with it."""

    def __init__(self) -> None:
        self._holders: dict[str, Any] = {}  # by node
        self._trail, self._attempt = Trail(), 0
        self._sources: dict[Snapshot, list[str]] = {}  # nodes, as `find` saw them
        self._offered = Trail()  # likewise: what is cut off may still add to the other

    def holder(self, node_id: str) -> Any:
        """The holder of a node, from now on if there was none."""
        if node_id not in self._holders:
            there: Any = NodeAffinitySchedulingStrategy(node_id, soft=False)
            self._holders[node_id] = ray.remote(num_cpus=0, scheduling_strategy=there)(Holder).remote()
        return self._holders[node_id]

    def follow(self, attempt: int, parent: str | None, records: Sequence[StepRecord]) -> None:
        """Take in the steps that an attempt has trained since it last said so, and the checkpoint they stand on."""
        if attempt >= self._attempt:  # one that was cut off may still speak
            self._attempt, self._trail = attempt, self._trail.followed(parent, records)

    def settle(self, nodes: Collection[str]) -> None:
        """These nodes hold newer snapshots now: let the others go, which may be idle and are not to be kept by us."""
        for node in self._holders.keys() - set(nodes):
            self.drop(node)

    def drop(self, node_id: str) -> None:
        """End the holder of a node."""
        holder = self._holders.pop(node_id, None)
        if holder is not None:
            ray.kill(holder)

    def find(
        self, committed_step: int, rolled_back: int, tried: Collection[Snapshot]
    ) -> tuple[Snapshot, str | None] | None:
        """The snapshot that the next attempt begins from (`newest_usable`), and the checkpoint it stands on."""
        self._sources, self._offered = {}, self._trail
        for node, snapshots in self._held().items():
            for snapshot in snapshots:
                self._sources.setdefault(snapshot, []).append(node)
        found = newest_usable(self._sources, self._offered, committed_step, rolled_back, tried)
        return None if found is None else (found, self._offered.parent)

    def _held(self) -> dict[str, list[Snapshot]]:
        """What each holder that answers has."""
        replies = {holder.held.remote(): node for node, holder in self._holders.items()}
        if not replies:
            return {}
        ready, _ = ray.wait(list(replies), num_returns=len(replies), timeout=ANSWER_S)
        answers: dict[str, list[Snapshot]] = {}
        for reply in ready:
            with suppress(RayError):
                answers[replies[reply]] = ray.get(reply)
        return answers

    def source(self, snapshot: Snapshot) -> tuple[Any, tuple[StepRecord, ...]]:
        """A holder that has a snapshot, and the records of the steps since the checkpoint that it stands on."""
        return self._holders[self._sources[snapshot][0]], self._offered.until(snapshot.step)

    def forget(self, snapshot: Snapshot) -> None:
        """Do not give this snapshot from this holder again."""
        for node in self._sources.pop(snapshot, [])[:1]:
            self.drop(node)


def create_peers() -> Any:
    """The handle of this run's `Peers`, on this node; it and all holders end when the handle, or its process, does."""
    here: Any = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(num_cpus=0, scheduling_strategy=here)(Peers).remote()


# What workers do


class Sender:
    """Hands this rank's state to the holder of its node, behind the next steps; the loop stops for the host copy."""

    def __init__(self, peers: Any, attempt: int, nodes: Mapping[int, str], rank: int, warn: Callable[[str], None]):
        """Args:
        peers: handle of the run's `Peers`.
        attempt: number of the attempt.
        nodes: of the ranks that hand over the state.
        rank: this one.
        warn: told once if there are no snapshots here.
        """
        self._peers, self._attempt, self._nodes, self._rank, self._warn = peers, attempt, nodes, rank, warn
        self._holder: Any = None
        self._thread: threading.Thread | None = None
        self._has_warned = False
        self._copy: HostCopy | None = None  # the newest, whose memory the next one takes
        peers.holder.remote(nodes[rank])  # its process takes seconds to start

    def send(self, state: TrainState) -> None:
        """Copy the state and hand it over; left out while the one before is on its way."""
        if self._thread is not None and self._thread.is_alive():
            return
        self._copy = copy = host_copy(state, self._copy)
        self._thread = threading.Thread(target=self._hand_over, args=(copy,), name="snapshot", daemon=True)
        self._thread.start()

    def _hand_over(self, copy: HostCopy) -> None:
        node = self._nodes[self._rank]
        try:
            if self._holder is None:
                self._holder = ray.get(self._peers.holder.remote(node), timeout=CALL_S)
            parcel = Parcel.of(copy)
            boxed = [ray.put(parcel)]
            kept = self._holder.keep.remote(Snapshot(copy.step, self._attempt), parcel.checksum(), boxed)
            ray.get(kept, timeout=MOVE_S)
            if self._rank == 0:
                self._peers.settle.remote(list(self._nodes.values()))
        except Exception as error:  # whatever it is, training goes on
            if isinstance(error, RayActorError):  # it has died; others keep what they have
                self._holder = None
                with suppress(RayError):
                    self._peers.drop.remote(node)
            if not self._has_warned:
                self._has_warned = True
                self._warn(f"No snapshot at step {copy.step} on rank {self._rank}'s node, training goes on: {error}")

    def close(self) -> None:
        """Wait for what is on its way, though not for long."""
        if self._thread is not None:
            self._thread.join(CLOSE_S)


def sender(peers: Any, attempt: int, world: World, warn: Callable[[str], None]) -> Sender | None:
    """This rank's sender if it is to have one; all ranks call it."""
    own = ray.get_runtime_context().get_node_id()
    ids = world.gather(torch.tensor(list(bytes.fromhex(own)), dtype=torch.uint8, device=world.device))
    nodes = savers([bytes(row).hex() for row in ids.tolist()])
    return Sender(peers, attempt, nodes, world.rank, warn) if world.rank in nodes else None


def resume(peers: Any, snapshot: Snapshot, state: TrainState, world: World) -> Sequence[StepRecord]:
    """Bring the state to where a snapshot is; all ranks call it. Returns the records that the next commit carries.

    Raises:
        SnapshotError: on all ranks, where one of them could not; the snapshot is not used again.
    """
    records: Sequence[StepRecord] = ()
    error: Exception | None = None
    try:
        holder, records = ray.get(peers.source.remote(snapshot), timeout=CALL_S)
        checksum, boxed = ray.get(holder.give.remote(snapshot), timeout=MOVE_S)
        load(ray.get(boxed[0], timeout=MOVE_S), checksum, snapshot, state)
    except Exception as failure:  # whatever it is: the other ranks wait for this one's word
        error = failure
    if world.any(error is not None)():
        with suppress(RayError):
            if world.is_first:
                ray.get(peers.forget.remote(snapshot), timeout=CALL_S)
        raise SnapshotError(f"the {snapshot} could not be loaded: {error or 'another rank says why'}")
    return records


def load(parcel: Parcel, checksum: int, snapshot: Snapshot, state: TrainState) -> None:
    """Bring the state to where a parcel is.

    Raises:
        ValueError: it is not what was handed over.
        UserError: it is of another model; nothing was changed.
    """
    if parcel.step != snapshot.step or parcel.checksum() != checksum:
        raise ValueError(f"what was kept (step {parcel.step}) is not what was handed over")
    bring(parcel.unpacked(), state, str(snapshot))
