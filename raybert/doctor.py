"""`doctor`: before a long run, look at all that it needs, in that order, and say "go" or what to mend first.

It trains a few steps, but no run begins: it leaves nothing behind but the index of the files that it has read.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import socket
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ray
import torch
from ray.train.torch import TorchTrainer, get_device
from ray.train.v2.api.config import FailureConfig, RunConfig, ScalingConfig
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raybert import cluster, preflight
from raybert.checks import check_config
from raybert.config import ClusterConfig, Config
from raybert.errors import UserError
from raybert.failures import cause_of
from raybert.finding import FIX, GB, OK, WARNING, Finding, Node, Trial, of_checkpoints, of_nodes, of_run, of_trial
from raybert.inbox import Inbox
from raybert.index import Index
from raybert.inspection import inspect_files, make_report
from raybert.retry import outlast_blip
from raybert.scratch import scratch
from raybert.starts import PatientTorchConfig
from raybert.storage import Directory, File, find_files, resolve
from raybert.trackers import check_trackers
from raybert.trial import index_some, run_trial, some_files
from raybert.view import counted, duration
from raybert.wordpiece import read_vocabulary
from raybert.world import CPU, World

GO, FIX_FIRST = 0, 1  # exit codes
SMALL_BYTES, LARGE_BYTES, SPEED_S = 4 << 20, 64 << 20, 5.0  # written to find the storage's speed, in about so long
SLOW_BYTES_PER_S = 10e6
SHARED_S = 10.0  # that a file written by the driver may take to be seen on another node
NODE_S, PINGS = 120.0, 5  # that a node may take to start a process; questions for its clock
INSPECTED_BYTES = 32 << 20
LOOKED_FOR = 1000  # files that every node is asked for, of all


def main(config: Config, as_json: bool = False, verbose: bool = False) -> int:
    """Look at everything, and print a line each; 0 if the run may go, 1 if something must be mended first."""
    cluster.quiet(verbose)
    findings = []
    for finding in _findings(config, verbose):
        findings.append(finding)
        if not as_json:
            print(finding.line(), flush=True)
    wrong = list(dict.fromkeys(finding.check for finding in findings if finding.status == FIX))
    if as_json:
        print(json.dumps({"go": not wrong, "findings": [asdict(finding) for finding in findings]}, indent=1))
    else:
        print(f"fix these first: {', '.join(wrong)}" if wrong else "go")
    return FIX_FIRST if wrong else GO


@dataclass
class _Known:
    """What the checks before have found out."""

    config: Config
    files: Sequence[File] = ()
    held_out: Sequence[File] = ()
    write_rate: float = 0.0
    index: Index | None = None


def _findings(config: Config, verbose: bool) -> Iterator[Finding]:
    """All findings; what depends on something that must be mended is not looked at, and that is said."""
    known, broken = _Known(config), set[str]()
    with ExitStack() as contexts:
        for name, needs, check in CHECKS:
            missing = [need for need in needs if need in broken]
            if missing:
                broken.add(name)
                yield Finding(name, WARNING, f"not looked at, before this is mended: {', '.join(missing)}")
                continue
            try:
                for finding in check(known, contexts, verbose):
                    if finding.status == FIX:
                        broken.add(name)
                    yield finding
            except UserError as error:
                broken.add(name)
                yield Finding(name, FIX, str(error))
            except OSError as error:
                broken.add(name)
                yield Finding(name, FIX, f"{error}; check the path, the network and the credentials")


def _configuration(known: _Known, _: ExitStack, __: bool) -> Iterator[Finding]:
    check_config(known.config)
    known.config = config = preflight.resolve(known.config)
    cluster.check_gpus(config.cluster)
    check_trackers(config.logging)
    yield Finding(
        "configuration", OK, f"{config.training.num_steps:,} steps of {config.training.global_batch_size} samples"
    )
    warnings: list[str] = []
    preflight.check_window(config, warnings.append)
    yield from (Finding("configuration", WARNING, text) for text in warnings)


def _files(known: _Known, _: ExitStack, __: bool) -> Iterator[Finding]:
    known.files = find_files(known.config.data.input_files, "data.input_files")
    known.held_out = find_files(known.config.evaluation.input_files, "evaluation.input_files")
    size_bytes = sum(file.size_bytes for file in known.files)
    text = f"{counted(len(known.files), 'file')}, {size_bytes / GB:.3g} GB, and {len(known.held_out)} held-out"
    yield Finding("files", OK, text, {"files": len(known.files), "bytes": size_bytes})


def _run_dir(known: _Known, _: ExitStack, __: bool) -> Iterator[Finding]:
    """Speed of storage, what is seen after a write, and room."""
    run, warnings = Directory(known.config.run_dir), list[str]()
    preflight.check_run_dir(run, warnings.append)
    checkpoint = preflight.existing_run(run, known.config, warnings.append)
    yield from (Finding("run_dir", WARNING, text) for text in warnings)
    write_rate, read_rate, wrong = _speed(run)
    known.write_rate = write_rate
    if wrong:
        yield Finding("run_dir", FIX, f"{run.uri} {wrong}; choose another run_dir")
        return
    place = f", a run at step {checkpoint.step:,}" if checkpoint else ""
    text = f"{run.uri}{place}: writes {write_rate / 1e6:,.0f} MB/s, reads {read_rate / 1e6:,.0f} MB/s"
    values: dict[str, Any] = {"write_bytes_per_s": write_rate, "read_bytes_per_s": read_rate}
    free_bytes = _free_disk_bytes(run)
    if free_bytes is not None:
        text += f", {free_bytes / GB:,.1f} GB free"
        values["free_bytes"] = free_bytes
    if min(write_rate, read_rate) < SLOW_BYTES_PER_S:
        yield Finding("run_dir", WARNING, text + "; that is slow for checkpoints", values)
    else:
        yield Finding("run_dir", OK, text, values)


def _speed(run: Directory) -> tuple[float, float, str]:
    """Bytes a second written and read, and what is wrong with what is seen afterwards, if anything."""
    name = f".probe-{uuid.uuid4().hex}"
    try:
        small_s, _ = _written(run, name, SMALL_BYTES, b"a")
        size_bytes = max(SMALL_BYTES, min(LARGE_BYTES, int(SMALL_BYTES * SPEED_S / small_s)))
        write_s, content = _written(run, name, size_bytes, b"b")
        if name not in run.names():
            return 0.0, 0.0, "does not list a file that was written"
        _forget_cached(run, name)
        began_at_s = time.perf_counter()
        is_same = run.read(name) == content
        read_s = time.perf_counter() - began_at_s
        wrong = "" if is_same else "gives the old content of a file that was replaced"
        return size_bytes / write_s, size_bytes / read_s, wrong
    finally:
        if run.exists(name):
            run.remove(name)


def _written(run: Directory, name: str, size_bytes: int, start: bytes) -> tuple[float, bytes]:
    content = start + os.urandom(size_bytes - 1)
    began_at_s = time.perf_counter()
    outlast_blip(lambda: run.write(name, content))
    return time.perf_counter() - began_at_s, content


def _forget_cached(run: Directory, name: str) -> None:
    """Let a local file be read from its disk, not from memory."""
    if run.is_local:
        with Path(run.path, name).open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _free_disk_bytes(run: Directory) -> int | None:
    return shutil.disk_usage(run.path).free if run.is_local else None


# --- The cluster ------------------------------------------------------------------------------------------------------


def _cluster(known: _Known, contexts: ExitStack, verbose: bool) -> Iterator[Finding]:
    config, run = known.config, Directory(known.config.run_dir)
    if config.cluster.worker_range()[1] > 0:
        contexts.enter_context(cluster.connected(config.cluster, verbose))
        cluster.check_capacity(config.cluster)
    name = f".probe-{uuid.uuid4().hex}"
    run.write(name, b"probe")
    try:
        files = [*known.files, *known.held_out]
        yield from of_nodes(list(_nodes(run, name, files[:: -(-len(files) // LOOKED_FOR)])), run.uri)
    finally:
        run.remove(name)
    shortage = cluster.shortage(config.cluster) if ray.is_initialized() else None
    if shortage:
        yield Finding("cluster", WARNING, shortage)


def _nodes(run: Directory, probe: str, files: Sequence[File]) -> Iterator[Node]:
    """The driver's node, and every other."""
    here = Probe().node(run, probe, files)
    if not ray.is_initialized():
        yield _node(here, os.cpu_count() or 1, ())
        return
    own = ray.get_runtime_context().get_node_id()
    nodes = [node for node in ray.nodes() if node["Alive"]]
    for node in sorted(nodes, key=lambda node: str(node["NodeID"]) != own):
        num_cpus = node["Resources"].get("CPU", 0)
        if node["NodeID"] == own:
            yield _node(here, num_cpus, ())
            continue
        asked = _on_node(Probe, node["NodeID"])
        try:
            there = ray.get(asked.node.remote(run, probe, files), timeout=NODE_S)
            clock = [_ask(asked) for _ in range(PINGS)]
        except ray.exceptions.RayError as error:
            raise UserError(
                f"node {node['NodeManagerAddress']} starts no process of raybert: {str(error).splitlines()[0]}; look "
                "at its logs, install raybert there as on the driver, or take it out of the cluster."
            ) from error
        yield _node(there, num_cpus, clock)


def _ask(asked: Any) -> tuple[float, float, float]:
    sent_at_s = time.time()
    there_s = ray.get(asked.time_s.remote(), timeout=NODE_S)
    return sent_at_s, there_s, time.time()


def _node(said: dict[str, Any], num_cpus: float, clock: Iterable[tuple[float, float, float]]) -> Node:
    return Node(**said, num_cpus=num_cpus, clock=tuple(clock) or ((0.0, 0.0, 0.0),))


class Probe:
    """An actor on a node that says what it sees from there."""

    def time_s(self) -> float:
        return time.time()

    def node(self, run: Directory, probe: str, files: Sequence[File]) -> dict[str, Any]:
        """Fields of `Node`."""
        until_s = time.monotonic() + SHARED_S
        while not (sees := _is_there(run, probe)) and time.monotonic() < until_s:
            time.sleep(0.5)
        gpus = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
        return {
            "name": f"{socket.gethostname()} ({ray.util.get_node_ip_address()})",
            "versions": {"python": platform.python_version(), "torch": torch.__version__, "ray": ray.__version__},
            "gpus": tuple(torch.cuda.get_device_name(number) for number in gpus),
            "sees_run_dir": sees,
            "missing": tuple(file.path for file in files if not _is_same(file)),
        }


def _is_there(run: Directory, name: str) -> bool:
    try:
        return run.exists(name)
    except OSError:
        return False


def _is_same(file: File) -> bool:
    try:
        filesystem, path = resolve(file.path)
        return bool(filesystem.get_file_info(path).size == file.size_bytes)
    except OSError:
        return False


# --- Data and steps ---------------------------------------------------------------------------------------------------


def _data(known: _Known, _: ExitStack, __: bool) -> Iterator[Finding]:
    """Some of the files, verified as the run will do it, and what would spoil training."""
    config, files = known.config, some_files(known.files)
    known.index = index = index_some(config, files, "data.input_files")
    if known.held_out:
        index_some(config, some_files(known.held_out), "evaluation.input_files")
    preflight.check_tokens(config, index)
    text = f"{index.num_samples:,} samples in {len(files)} of {len(known.files)} files are sound"
    yield Finding("data", OK, text, {"samples": index.num_samples, "files": len(files)})
    if config.data.vocab_file is None:
        yield Finding("data", WARNING, "without data.vocab_file it cannot be told whether the samples read as text")
        return
    first = files[: max(1, sum(size <= INSPECTED_BYTES for size in _sizes(files)))]
    found = inspect_files(first, preflight.schema(config), read_vocabulary(config.data.vocab_file), 0)
    for warning in make_report(first, preflight.schema(config), found)["warnings"]:
        yield Finding("data", WARNING, warning)


def _sizes(files: Sequence[File]) -> Iterator[int]:
    """Bytes of the files up to each."""
    size_bytes = 0
    for file in files:
        size_bytes += file.size_bytes
        yield size_bytes


def _steps(known: _Known, _: ExitStack, __: bool) -> Iterator[Finding]:
    """A few steps, and what they mean for the whole run."""
    config = known.config
    assert known.index is not None
    low, high = config.cluster.worker_range()
    room = min(high, _free_room(config.cluster)) if high else 0
    if high and not room:
        yield Finding("step", WARNING, "not measured: no node has room for a worker now; let other jobs end first")
        return
    trial = _trial_here(config, known.index) if not high else _trial_on_ray(config, known.index, room)
    yield from of_trial(trial)
    if room < high:
        text = f"measured on {room} workers, since there is no room for {high} now"
        yield Finding("step", WARNING, text + ("" if room >= low else f"; the run waits for {low}"))
    training, run = config.training, Directory(config.run_dir)
    checkpoint = outlast_blip(lambda: preflight.existing_run(run, config, lambda _: None))
    left = max(0, training.num_steps - (checkpoint.step if checkpoint else 0))
    yield of_run(trial.step_s, left, trial.world_size, config.cluster.price_per_worker_hour, duration)
    saving = config.checkpoint
    yield of_checkpoints(
        trial.parameters, saving.keep, saving.every_steps, training.num_steps, trial.step_s, known.write_rate,
        _free_disk_bytes(run),
    )  # fmt: skip


def _free_room(config: ClusterConfig) -> int:
    """How many workers the live nodes have room for, beside what others are using."""
    free = ray.available_resources()
    by_cpu = int(free.get("CPU", 0) // config.cpus_per_worker)
    return min(cluster.room(config), by_cpu, int(free.get("GPU", 0)) if config.use_gpu else by_cpu)


def _trial_here(config: Config, index: Index) -> Trial:
    device = torch.device("cuda", 0) if config.cluster.use_gpu else CPU
    return run_trial(config, index, World(device=device))


def _trial_on_ray(config: Config, index: Index, num_workers: int) -> Trial:
    """On as many workers, in a process group that is set up as a run's."""
    ours, resources = config.cluster, {"CPU": config.cluster.cpus_per_worker}
    resources |= {"GPU": 1} if ours.use_gpu else {}
    scaling: Any = ScalingConfig(num_workers=num_workers, use_gpu=ours.use_gpu, resources_per_worker=resources)
    inbox: Any = _on_node(Inbox, ray.get_runtime_context().get_node_id())
    with scratch() as local:
        run: Any = RunConfig(name="doctor", storage_path=str(local), failure_config=FailureConfig(max_failures=0))
        trainer: Any = TorchTrainer(
            partial(_send_trial, config, ray.put(index.for_reading()), inbox),
            torch_config=PatientTorchConfig(timeout_s=int(ours.collective_timeout_s), tell=_ignore, limit=1),
            scaling_config=scaling,
            run_config=run,
        )
        try:
            trainer.fit()
        except Exception as error:
            cause = cause_of(error)
            if isinstance(cause, UserError):
                raise cause from error
            line = (str(cause).strip().splitlines() or [""])[-1]
            raise UserError(
                f"{num_workers} workers could not train together: {type(cause).__name__}: {line}; look at the network "
                "between the nodes (ports, GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME), or run it with --verbose."
            ) from error
    (trial,) = ray.get(inbox.take.remote())
    assert isinstance(trial, Trial)
    return trial


def _send_trial(config: Config, index: Any, inbox: Any) -> None:
    """What each worker runs."""
    world = World.current(get_device() if config.cluster.use_gpu else CPU, config.cluster.collective_timeout_s)
    trial = run_trial(config, ray.get(index), world)
    if world.is_first:
        ray.get(inbox.put.remote(trial))


def _on_node(actor: type, node_id: str) -> Any:
    """An actor that takes no CPU of a node."""
    place: Any = {"num_cpus": 0, "scheduling_strategy": NodeAffinitySchedulingStrategy(node_id, soft=False)}
    return ray.remote(**place)(actor).remote()


def _ignore(_: object) -> None:
    pass


Check = Callable[[_Known, ExitStack, bool], Iterator[Finding]]
CHECKS: Sequence[tuple[str, Sequence[str], Check]] = (
    ("configuration", (), _configuration),
    ("files", ("configuration",), _files),
    ("run_dir", ("configuration",), _run_dir),
    ("cluster", ("configuration", "files", "run_dir"), _cluster),
    ("data", ("files", "run_dir"), _data),
    ("steps", ("cluster", "data"), _steps),
)
