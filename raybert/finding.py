"""Findings: what `doctor` says, one line each, and the decisions behind them; pure functions of what was measured."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Status = Literal["ok", "warning", "fix"]
OK: Status = "ok"
WARNING: Status = "warning"
FIX: Status = "fix"
SKEW_S, WRONG_CLOCK_S = 1.0, 300.0  # from where times are hard to read; from where S3 is about to refuse requests (900)
ROOM = 0.1  # of a machine's memory, that should stay free
GB = 1e9


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Args:
        check: what was looked at.
        status: "fix" must be mended before a run.
        text: for a person; of a "fix" or a "warning" with the remedy.
        values: measured ones, for JSON.
    """

    check: str
    status: Status
    text: str
    values: Mapping[str, Any] = field(default_factory=dict)

    def line(self) -> str:
        return f"{self.status:<8} {self.check}: {self.text}"


@dataclass(frozen=True)
class Node:
    """What a node says of itself.

    Args:
        name: of the host, and its address.
        versions: of what must be the same everywhere.
        num_cpus: that Ray may use.
        gpus: their names.
        sees_run_dir: whether what the driver wrote to the run directory is there.
        missing: data files that are not there, or of another size.
        clock: (driver's time when asked, the node's, driver's when answered), in seconds since 1970, several times.
    """

    name: str
    versions: Mapping[str, str]
    num_cpus: float
    gpus: tuple[str, ...]
    sees_run_dir: bool
    missing: tuple[str, ...]
    clock: tuple[tuple[float, float, float], ...]


def of_nodes(nodes: Sequence[Node], run_dir: str) -> Iterator[Finding]:
    """What the nodes of a cluster, the driver's first, have in common and what not."""
    gpus = [gpu for node in nodes for gpu in node.gpus]
    named = ", ".join(f"{gpus.count(name)} x {name}" for name in dict.fromkeys(gpus)) or "no GPU"
    num_cpus = sum(node.num_cpus for node in nodes)
    values = {"nodes": [node.name for node in nodes], "num_cpus": num_cpus, "gpus": gpus}
    yield Finding("cluster", OK, f"{_count(len(nodes), 'node')}, {num_cpus:g} CPUs, {named}", values)
    yield from _versions(nodes)
    yield from _sharing(nodes, run_dir)
    yield from _clocks(nodes)


def _versions(nodes: Sequence[Node]) -> Iterator[Finding]:
    ours = nodes[0].versions
    for node in nodes:
        differing = [f"{name} {theirs}, not {ours.get(name)}" for name, theirs in node.versions.items()
                     if theirs != ours.get(name)]  # fmt: skip
        if differing:
            text = f"node {node.name} has {', '.join(differing)}, which is the driver's; install the same everywhere"
            yield Finding("versions", FIX, text, {"node": node.name, "versions": dict(node.versions)})
            return
    text = ", ".join(f"{name} {version}" for name, version in ours.items())
    yield Finding("versions", OK, text + (" on every node" if len(nodes) > 1 else ""), {"versions": dict(ours)})


def _sharing(nodes: Sequence[Node], run_dir: str) -> Iterator[Finding]:
    blind = [node.name for node in nodes if not node.sees_run_dir]
    if blind:
        text = (
            f"{run_dir} is another directory on {', '.join(blind)}; give s3://, gs:// or a file system that all share"
        )
        yield Finding("sharing", FIX, text, {"nodes": blind})
    for node in nodes:
        if node.missing:
            text = (
                f"node {node.name} does not see {node.missing[0]}{_more(len(node.missing))}; put the files where every "
                "node has them under this path: s3://, gs:// or a shared file system"
            )
            yield Finding("sharing", FIX, text, {"node": node.name, "missing": list(node.missing)})
    if not blind and not any(node.missing for node in nodes) and len(nodes) > 1:
        yield Finding("sharing", OK, "every node sees run_dir and the data files")


def offset_s(clock: Sequence[tuple[float, float, float]]) -> float:
    """How far a clock is ahead of the driver's, by the answer that came soonest; 0 where the way explains it."""
    asked, there, answered = min(clock, key=lambda times: times[2] - times[0])
    return max(0.0, there - answered) + min(0.0, there - asked)


def _clocks(nodes: Sequence[Node]) -> Iterator[Finding]:
    offsets = {node.name: offset_s(node.clock) for node in nodes}
    name = max(offsets, key=lambda each: abs(offsets[each]))
    worst_s, values = offsets[name], {"offsets_s": offsets}
    if abs(worst_s) < SKEW_S:
        if len(nodes) > 1:
            yield Finding("clocks", OK, f"within {SKEW_S:g} s of the driver's", values)
        return
    way = f"the clock of node {name} is {abs(worst_s):,.0f} s {'ahead of' if worst_s > 0 else 'behind'} the driver's"
    status = FIX if abs(worst_s) >= WRONG_CLOCK_S else WARNING
    yield Finding("clocks", status, f"{way}; run a time service (chrony, systemd-timesyncd) on every node", values)


@dataclass(frozen=True)
class Trial:
    """What some steps of the real model on real batches came to.

    Args:
        world_size: ranks.
        steps_s: seconds of each step, after warming up.
        tokens: real tokens of a step, all ranks.
        parameters: of the model.
        device: its name.
        averaging_bytes, averaging_s: of an all-reduce between the ranks; 0 for one rank.
        worker_bytes: memory of the rank that takes most: of its GPU, or of its process.
        free_bytes, total_bytes: of the GPU or the host that has least left meanwhile.
    """

    world_size: int
    steps_s: tuple[float, ...]
    tokens: float
    parameters: int
    device: str
    averaging_bytes: int
    averaging_s: float
    worker_bytes: int
    free_bytes: int
    total_bytes: int

    @property
    def step_s(self) -> float:
        return statistics.median(self.steps_s)


def of_trial(trial: Trial) -> Iterator[Finding]:
    """What the trial says of network, speed and memory."""
    if trial.world_size > 1:
        rate, size = trial.averaging_bytes / trial.averaging_s, trial.averaging_bytes
        text = f"{size / 1e6:,.0f} MB in {1e3 * trial.averaging_s:,.0f} ms ({rate / GB:.2f} GB/s), "
        text += f"between {trial.world_size} workers"
        yield Finding("all-reduce", OK, text, {"bytes_per_s": rate})
    text = f"{trial.step_s:.3g} s on {_count(trial.world_size, 'worker')} ({trial.device}), "
    text += f"{trial.tokens / trial.step_s:,.0f} tokens/s; median of {len(trial.steps_s)}"
    yield Finding("step", OK, text, {"step_s": trial.step_s, "steps_s": trial.steps_s, "world_size": trial.world_size})
    share = trial.free_bytes / trial.total_bytes
    text = f"a worker takes {trial.worker_bytes / GB:.2f} GB, and of {trial.total_bytes / GB:.1f} GB "
    text += f"{trial.free_bytes / GB:.2f} stay free"
    values = {"worker_bytes": trial.worker_bytes, "free_bytes": trial.free_bytes, "total_bytes": trial.total_bytes}
    if share < ROOM:
        text += "; lower training.micro_batch_size or micro_batch_tokens, or the workers of a node"
    yield Finding("memory", OK if share >= ROOM else WARNING, text, values)


def of_run(
    step_s: float,
    num_steps: int,
    num_workers: int,
    price_per_worker_hour: float | None,
    duration: Callable[[float], str],
) -> Finding:
    """How long the run will take, and what it costs."""
    whole_s = step_s * num_steps
    text = f"{num_steps:,} steps take {duration(whole_s)} and more: evaluation, checkpoints and restarts come on top"
    values: dict[str, Any] = {"seconds": whole_s, "num_steps": num_steps, "num_workers": num_workers}
    if price_per_worker_hour is not None:
        values["cost"] = whole_s / 3600 * num_workers * price_per_worker_hour
        text += f"; cost {values['cost']:,.2f} at {price_per_worker_hour:g} a worker hour"
    return Finding("run", OK, text, values)


def of_checkpoints(
    parameters: int,
    keep: int,
    every_steps: int | str,
    num_steps: int,
    step_s: float,
    write_rate: float,
    free_bytes: int | None,
) -> Finding:
    """What checkpoints take on the storage: weights and two moments in fp32, one more while another is written."""
    each = 12 * parameters
    number = keep if keep else -(-num_steps // every_steps) if isinstance(every_steps, int) else None
    values: dict[str, Any] = {"bytes": each, "number": number, "write_s": each / write_rate}
    text = f"{each / GB:.3g} GB each, written in about {each / write_rate:.3g} s"
    if number is not None:
        number += 1
        values["all_bytes"] = number * each
        text += f"; up to {number} of them, {number * each / GB:.3g} GB"
        if free_bytes is not None and number * each > free_bytes:
            text += (
                f", where {free_bytes / GB:.3g} GB are free; free some, lower checkpoint.keep, or give another run_dir"
            )
            return Finding("checkpoints", FIX, text, values)
    if isinstance(every_steps, int) and each / write_rate > every_steps * step_s:
        text += f", longer than the {every_steps * step_s:.3g} s between two; raise checkpoint.every_steps, or use auto"
        return Finding("checkpoints", WARNING, text, values)
    return Finding("checkpoints", OK, text, values)


def _more(number: int) -> str:
    return f" and {number - 1} more" if number > 1 else ""


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'s' * (number != 1)}"
