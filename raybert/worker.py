"""What each worker runs: build, restore, train. With `num_workers: 0` the driver itself runs it."""

from __future__ import annotations

import socket
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
from ray.train.torch import get_device

from raybert import ingest
from raybert.begin import Begin
from raybert.cadence import Past, past
from raybert.capacity import fitted
from raybert.checkpoint import Saver, Writer, load_moments, restore
from raybert.config import Config
from raybert.entry import read_ledger
from raybert.errors import UserError
from raybert.evaluate import evaluate
from raybert.events import Event, Tell
from raybert.failures import AT_STEP
from raybert.feed import Layout, RankBatch, local_batches, rank_batches
from raybert.guard import RollbackError, bar, check_rollbacks, reasons
from raybert.history import Attempt, StepRecord, newest_attempt
from raybert.hold import HOLD, HOLD_S
from raybert.index import Index
from raybert.loop import train
from raybert.manifest import open_checkpoint, place
from raybert.masking import Remasking
from raybert.order import SampleOrder
from raybert.peers import Sender, resume, sender
from raybert.pretrained import load_pretrained
from raybert.retry import outlast_blip
from raybert.scratch import scratch
from raybert.snapshot import Snapshot
from raybert.step import TrainState, create_state, settle_buckets
from raybert.storage import Directory
from raybert.telemetry import EVAL, TRAIN, Telemetry, training_summary
from raybert.world import CPU, World

VOCABULARY = "vocab.txt"
LATE_S = 60.0
SHARED_S = 30.0  # that a file written on one node may take to be seen on another


@dataclass(frozen=True)
class Job:
    """What the driver hands to every worker.

    Args:
        config: resolved; every path absolute.
        run: the run directory.
        order: of the training samples.
        index, evaluation: of the training and held-out files, or references to them in the object store.
        identity: what a resumed run must agree on.
        tell: takes events to the driver.
        peers: handle of the `Peers` that find snapshots; None without them.
        remasking: of the training samples; None: they are masked as they are in the files.
    """

    config: Config
    run: Directory
    order: SampleOrder
    index: Any
    evaluation: Any
    identity: Mapping[str, Any]
    tell: Tell
    peers: Any = None
    remasking: Remasking | None = None


def train_worker(job: Job) -> None:
    """Train this rank's part of an attempt, from its checkpoint to the last step."""
    torch.set_num_threads(job.config.cluster.cpus_per_worker)
    world, attempt, batches = _join(job)
    if attempt.start_step >= job.config.training.num_steps:
        return  # the attempt before died between its last checkpoint and its end
    handing = sender(job.peers, attempt.number, world, partial(_warn, job.tell)) if job.peers else None
    state = create_state(job.config.model, job.config.training, job.config.optimizer, world)
    records = _initialize(state, job, attempt, world)
    settle_buckets(state, job.config.data.max_seq_length, job.config.training, world)
    job = _fitted(job, state, world)
    with ExitStack() as contexts:
        recorder = Recorder(job, attempt, contexts.enter_context(scratch()), records) if world.is_first else None
        if recorder:
            recorder.prepare(state)
            batches = _warn_if_late(batches, job.tell)
        try:
            barred, evaluator = reasons(attempt.barred), _evaluator(job, state, world)
            snapshot = partial(_snapshot, recorder, handing) if job.peers else None
            result = train(state, batches, job.config, world, attempt.number, barred, evaluator, recorder, snapshot)
            if recorder:
                recorder.finish(state, result.records, result.train, result.evaluation)
        except RollbackError as error:
            check_rollbacks(attempt.barred, job.config.guard, error)
            if recorder:
                recorder.close()  # its pending checkpoint is the one to go back to
                outlast_blip(partial(bar, job.run, attempt.number, error))
            world.any(False)()  # nobody ends the attempt before that is done
            raise
        except Exception as error:
            error.add_note(f"{AT_STEP}{state.step}")
            raise
        finally:
            if recorder:
                recorder.close()
            if handing:
                handing.close()


def _fitted(job: Job, state: TrainState, world: World) -> Job:
    """The job with a number of tokens that fits the memory, where it leaves that open."""
    config, training = job.config, fitted(state, job.config.data, job.config.training, world)
    if training != config.training and world.is_first:
        job.tell(Event("note", text=f"micro-batches of up to {training.micro_batch_tokens:,} tokens fit the memory"))
    return replace(job, config=replace(config, training=training))


def _snapshot(recorder: Recorder | None, handing: Sender | None, state: TrainState, records: list[StepRecord]) -> None:
    """What a rank does for a snapshot: rank 0 says which steps it holds, and some hand over the state."""
    if recorder:
        recorder.note(records)
    if handing:
        handing.send(state)


def _warn(tell: Tell, text: str) -> None:
    tell(Event("warning", text=text))


def train_ray_worker(job: Job) -> None:
    """As `train_worker`; an error takes its traceback along as a note, since Ray Train hands on the error alone."""
    try:
        train_worker(job)
    except Exception as error:
        error.add_note(traceback.format_exc())
        raise


def _join(job: Job) -> tuple[World, Attempt, Iterator[RankBatch]]:
    """This rank's world, the attempt it belongs to, and its batches."""
    num_steps = job.config.training.num_steps
    device = get_device() if job.config.cluster.use_gpu else CPU
    if job.config.cluster.worker_range()[1] == 0:
        world, attempt = World(device=device), Begin(job.run, job.tell)(1)
        return (
            world,
            attempt,
            local_batches(Layout(job.order, 1, attempt.start_step, num_steps, job.remasking), job.index),
        )
    world = World.current(device, job.config.cluster.collective_timeout_s)
    iterator = ray.train.get_dataset_shard(ingest.TRAIN)
    attempt = iterator.attempt
    check_shared(job.run, attempt.number)
    layout = Layout(job.order, world.size, attempt.start_step, num_steps)
    return world, attempt, rank_batches(ingest.blocks(iterator), layout, world.rank)


def check_shared(run: Directory, attempt: int, timeout_s: float = SHARED_S) -> None:
    """Refuse a run directory that is this node's own: what the driver wrote must be there.

    Raises:
        UserError: the attempt's record is not seen here.
    """
    until_s = time.monotonic() + timeout_s
    while outlast_blip(lambda: newest_attempt(run)) < attempt:
        if time.monotonic() >= until_s:
            raise UserError(
                f"run_dir: node {socket.gethostname()} has another {run.uri} than the driver; give a directory that "
                "every node sees: s3://, gs:// or a file system mounted on all of them under one path."
            )
        time.sleep(1)


def _warn_if_late(batches: Iterator[RankBatch], tell: Tell) -> Iterator[RankBatch]:
    """The batches; a warning if the first does not come."""
    text = (
        f"no batch has arrived for {LATE_S:.0f} s; if that goes on, the feed has no CPU: lower cluster.num_workers or "
        "cluster.cpus_per_worker, or add CPUs."
    )
    timer = threading.Timer(LATE_S, tell, [Event("warning", text=text)])
    timer.daemon = True
    timer.start()
    for batch in batches:
        timer.cancel()
        yield batch


def _initialize(state: TrainState, job: Job, attempt: Attempt, world: World) -> Sequence[StepRecord]:
    """Bring the state to where the attempt begins; returns the records that no checkpoint carries yet."""
    if attempt.snapshot is not None:
        return resume(job.peers, Snapshot(attempt.start_step, attempt.snapshot), state, world)
    if attempt.checkpoint is not None:
        restore(outlast_blip(partial(open_checkpoint, job.run, attempt.checkpoint)), state)
    elif job.config.training.init_checkpoint is not None:
        with Directory(job.config.training.init_checkpoint).local() as path:
            load_pretrained(state.model, path)
            if job.config.training.init_optimizer:
                load_moments(path, state)
    return ()


def _evaluator(job: Job, state: TrainState, world: World) -> Callable[[], dict[str, float]] | None:
    if job.evaluation is None:
        return None
    index: Index = ray.get(job.evaluation) if isinstance(job.evaluation, ray.ObjectRef) else job.evaluation
    config = job.config
    return lambda: evaluate(state.model, index, config.evaluation.num_steps, config.training, world)


class Recorder:
    """Rank 0's observer of the loop: metrics, checkpoints and events."""

    def __init__(self, job: Job, attempt: Attempt, local: Path, records: Sequence[StepRecord]) -> None:
        """Args:
        job: of the run.
        attempt: that this worker belongs to.
        local: a directory of this machine that lives as long as this.
        records: of steps before the attempt that no checkpoint carries yet.
        """
        self._peers = job.peers
        self._tell, self._num_steps, self._attempt = job.tell, job.config.training.num_steps, attempt.number
        self._run = job.run
        self._telemetry = Telemetry(job.run, attempt.start_step, local, self.warn)
        vocab_file, config = outlast_blip(lambda: _local_vocabulary(job.run, local)), job.config.checkpoint
        writer = Writer(job.run, attempt.number, job.config.model, vocab_file, job.identity, config.keep)
        self._saver = Saver(writer, attempt.checkpoint, self._committed, self.warn, config.outage_limit_s, records)

    def train_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log training metrics."""
        self._telemetry.log(TRAIN, step, metrics)
        self._tell(Event("train", step, metrics=metrics, attempt=self._attempt))

    def eval_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log held-out metrics."""
        self._telemetry.log(EVAL, step, metrics)
        self._tell(Event("eval", step, metrics=metrics))

    def prepare(self, state: TrainState) -> None:
        """Get ready for the first checkpoint, behind the next steps."""
        self._saver.prepare(state)

    def save(self, state: TrainState, records: list[StepRecord]) -> None:
        """Save a checkpoint behind the next steps."""
        self._follow(records)
        self._saver.save(state, records)

    def note(self, records: list[StepRecord]) -> None:
        """Take in the records of steps that the next checkpoint carries, and that a snapshot is of."""
        self._follow(records)
        self._saver.note(records)

    def _follow(self, records: list[StepRecord]) -> None:
        """Tell the peers of steps that were trained."""
        if self._peers is not None:
            self._peers.follow.remote(self._attempt, self._saver.parent, records)

    def is_asked_to_hold(self) -> bool:
        """Whether the one who is about to end this attempt asks for a checkpoint first; not while there can be none."""
        return HOLD.state == "asked" and not self._saver.is_failing

    def is_writing(self) -> bool:
        """Whether a checkpoint is being written."""
        return self._saver.is_writing

    def past(self) -> Past:
        """What the run has lived through, as far as its ledger can be read."""
        try:
            return past(read_ledger(self._run))
        except (OSError, ValueError):  # the driver warns of that
            return Past()

    def save_and_hold(self, state: TrainState, records: list[StepRecord]) -> None:
        """Save a checkpoint now; once it is complete, wait for the end that it was asked for."""
        self._follow(records)
        self._saver.save(state, records)
        self._saver.wait(HOLD_S)
        if not self._saver.is_saved(state.step):
            HOLD.release()
        elif not HOLD.keep():
            self.warn(f"Nobody ended attempt {self._attempt} after the checkpoint it was asked for; it trains on.")

    def finish(
        self,
        state: TrainState,
        records: list[StepRecord],
        train_metrics: Mapping[str, float],
        eval_metrics: Mapping[str, float] | None,
    ) -> None:
        """Save the last checkpoint and the training summary."""
        self._saver.finish(state, records)
        try:
            self._telemetry.finish(training_summary(self._num_steps, train_metrics, eval_metrics))
        except OSError as error:
            self._warn_of_metrics(error)

    def close(self) -> None:
        """End what goes on behind the steps; a checkpoint that is being written is waited for, unless storage fails."""
        self._saver.close()
        self._telemetry.close()

    def _committed(self, name: str) -> None:
        """Runs behind the next steps: a storage that fails must not stop them."""
        self._tell(Event("checkpoint", place(name)[0], name, attempt=self._attempt))
        try:
            self._telemetry.sync()
        except OSError as error:
            self._warn_of_metrics(error)

    def _warn_of_metrics(self, error: OSError) -> None:
        self.warn(f"metrics could not be brought to the run directory: {error}")

    def warn(self, text: str) -> None:
        """Warn the person who watches."""
        self._tell(Event("warning", text=text))

    def say(self, text: str) -> None:
        """Tell the person who watches."""
        self._tell(Event("note", text=text))


def _local_vocabulary(run: Directory, local: Path) -> Path | None:
    """The run's vocabulary as a local file, if it has one."""
    if not run.exists(VOCABULARY):
        return None
    (local / VOCABULARY).write_bytes(run.read(VOCABULARY))
    return local / VOCABULARY
