"""The driver: indices, attempts through Ray Train, and what the user sees of them."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.train.torch import TorchTrainer
from ray.train.v2.api.config import FailureConfig, RunConfig, ScalingConfig
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raybert import cluster, ingest, preflight
from raybert.begin import Begin
from raybert.chronicle import BASELINES, REPORT, SKIPPED
from raybert.compression import compression
from raybert.config import ClusterConfig, Config
from raybert.config_file import CONFIG, config_to_yaml
from raybert.display import Display
from raybert.entry import read_ledger
from raybert.errors import UserError
from raybert.evaluate import unigram_loss
from raybert.events import Event, Tell
from raybert.failures import StopRetrying, cause_of
from raybert.gauges import Gauges
from raybert.goodput import lines, summarize
from raybert.guard import RollbackError
from raybert.inbox import Inbox, Post
from raybert.index import INDEX, Index, Shard, check_shards, index_shard, write_list
from raybert.ledger import Ledger
from raybert.listener import Listeners
from raybert.manifest import Checkpoint, newest_checkpoint
from raybert.peers import create_peers
from raybert.retry import outlast_blip
from raybert.scratch import scratch
from raybert.starts import PatientTorchConfig
from raybert.storage import Directory, File, absolute, find_files, local_file, open_input
from raybert.telemetry import EVAL, read_metrics
from raybert.trackers import check_trackers, trackers
from raybert.worker import VOCABULARY, Job, train_ray_worker, train_worker

POLL_S = 0.3
END_S = 10.0  # that an interrupted run's controller may take to end
SHORTAGE_S = 60.0  # between two looks at whether the run waits for nodes
MAX_BAD_RECORDS = 20  # after so many, a file that is refused is not read on


def run(config: Config, verbose: bool = False, on_log: Tell | None = None) -> int:
    """Pretrain, or continue the run found in run_dir, and return the exit code.

    Args:
        config: of the run.
        verbose: log what Ray and raybert do.
        on_log: hears the run's events; see `raybert.train`.

    Raises:
        UserError: something the user can mend; the run, if there is one, can be resumed.
    """
    cluster.quiet(verbose)
    config = preflight.resolve(config)
    cluster.check_gpus(config.cluster)
    check_trackers(config.logging)
    run_dir = Directory(config.run_dir)
    every_steps = config.checkpoint.every_steps
    shown = Display(config.training.num_steps, save_every_steps=0 if every_steps == "auto" else every_steps)
    with shown as display, _terminable() as received:
        try:
            with Listeners(display.warn) as listeners:
                display.hand_on(listeners.hear)
                if on_log is not None:
                    listeners.add(on_log, "on_log")
                preflight.check_run_dir(run_dir, display.warn)
                for name, tracker in trackers(config, run_dir).items():
                    listeners.add(tracker, name)
                return _run(config, run_dir, display, verbose)
        except KeyboardInterrupt:
            display.freeze()
            display.line(f"Interrupted; the same command resumes the run in {run_dir.uri}.")
            _write_report(run_dir, display)  # last: who stops a job may wait for seconds only
            return 128 + (received[0] if received else signal.SIGINT)


def train(config: Config, on_log: Tell | None = None, verbose: bool = False) -> str:
    """See `raybert.train`."""
    if run(config, verbose, on_log):
        raise KeyboardInterrupt
    checkpoint = outlast_blip(lambda: newest_checkpoint(Directory(absolute(config.run_dir)), lambda _: None))
    assert checkpoint is not None
    return checkpoint.directory.uri


@contextmanager
def _terminable() -> Iterator[list[int]]:
    """SIGTERM, by which schedulers end a job, interrupts as Ctrl-C does; gives a list that then holds its number."""
    received: list[int] = []

    def interrupt(number: int, _: object) -> None:
        received.append(number)
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield received
    finally:
        signal.signal(signal.SIGTERM, before)


def _run(config: Config, run_dir: Directory, display: Display, verbose: bool) -> int:
    checkpoint = preflight.existing_run(run_dir, config, display.warn)
    if checkpoint is not None and checkpoint.step >= config.training.num_steps:
        display.line(f"The run in {run_dir.uri} is complete: step {checkpoint.step} of {config.training.num_steps}.")
    else:
        ledger = Ledger(run_dir, config, display.warn)
        _say_where_weights_come_from(config, checkpoint, display)
        files = find_files(config.data.input_files, "data.input_files")
        held_out = find_files(config.evaluation.input_files, "evaluation.input_files")
        if config.cluster.worker_range()[1] == 0:
            _train(config, run_dir, files, held_out, display, ledger)
        else:
            with cluster.connected(config.cluster, verbose):
                cluster.check_capacity(config.cluster)
                _train(config, run_dir, files, held_out, display, ledger)
    _print_result(run_dir, config, display)
    return 0


def _say_where_weights_come_from(config: Config, checkpoint: Checkpoint | None, display: Display) -> None:
    source = config.training.init_checkpoint
    if source is not None and checkpoint is not None:
        display.line(f"The run in {config.run_dir} goes on from step {checkpoint.step}; init_checkpoint is not used.")
    elif source is not None:
        display.line(f"Initial weights from {source}: {preflight.check_initial_weights(config)}")


def _train(
    config: Config,
    run_dir: Directory,
    files: Sequence[File],
    held_out: Sequence[File],
    display: Display,
    ledger: Ledger,
) -> None:
    """Index, check, and run attempts until the last step."""
    index = _index(files, "data.input_files", config, run_dir, display)
    evaluation = _index(held_out, "evaluation.input_files", config, run_dir, display) if held_out else None
    preflight.check_tokens(config, index)
    preflight.check_window(config, display.warn)
    identity = {**preflight.identity(config), "data": index.digest}
    checkpoint = outlast_blip(lambda: newest_checkpoint(run_dir, lambda _: None))
    if checkpoint is not None:
        preflight.check_identity(checkpoint, identity)
    outlast_blip(lambda: _write_settings(config, run_dir, index, evaluation))

    def tell(event: Event) -> None:
        ledger.show(event)
        display.show(event, ledger.goodput() if event.kind == "train" else None)

    order, remasking = preflight.sample_order(config, index), preflight.remasking(config)
    job = Job(config, run_dir, order, index, evaluation, identity, tell, remasking=remasking)
    try:
        with ledger:
            if config.cluster.worker_range()[1] == 0:
                _fit_here(job)
            else:
                with scratch() as local:
                    _fit(job, display, ledger, local)
    finally:
        if not isinstance(sys.exception(), KeyboardInterrupt):
            _write_report(run_dir, display)


def _write_report(run_dir: Directory, display: Display) -> None:
    """Of a run, however it has ended; whatever goes wrong here, even an import, is no matter of the run's."""
    try:
        from raybert.report import write_report

        if run_dir.exists(CONFIG):
            write_report(run_dir, run_dir)
    except Exception as error:
        display.warn(f"the report is not drawn ({error}); `python run.py report {run_dir.uri}` draws it later.")


def _index(files: Sequence[File], option: str, config: Config, run_dir: Directory, display: Display) -> Index:
    """The index of some files, built where it is not cached, with a progress bar.

    Raises:
        UserError: a file is damaged or does not fit the configuration, or there is no sample.
    """
    _announce_copies(files, option, run_dir, display)
    skip = config.data.on_bad_record == "skip"
    schema, cache = preflight.schema(config), run_dir / INDEX
    build = partial(index_shard, schema=schema, cache=cache, max_bad=None if skip else MAX_BAD_RECORDS)
    shards = sorted(
        display.track(_built(build, files), f"indexing {option}", len(files)), key=lambda shard: shard.file.path
    )
    check_shards(shards, option, config.data.on_bad_record)
    for shard in shards:
        if not shard.page_records[-1] and not shard.bad:
            display.warn(f"{option}: {shard.file.path} holds no record.")
    if skip:
        _list_skipped(shards, option, run_dir, display)
    return Index(shards, schema)


def _built(build: Any, files: Sequence[File]) -> Iterator[Shard]:
    """Shards as they are ready: by Ray tasks, or one after the other without Ray."""
    if not ray.is_initialized():
        yield from map(build, files)
        return
    pending = [ray.remote(build.func).remote(file, **build.keywords) for file in files]
    while pending:
        ready, pending = ray.wait(pending, num_returns=1)
        try:
            yield ray.get(ready[0])
        except RayTaskError as error:
            raise (error.cause if isinstance(error.cause, UserError) else error) from error


def _announce_copies(files: Sequence[File], option: str, run_dir: Directory, display: Display) -> None:
    """Say what will be copied; opening every file for that shows which cannot be read."""

    def is_compressed(file: File) -> bool:
        try:
            with open_input(file.path) as source:
                return bool(compression(source.read(64)))
        except OSError as error:
            raise UserError(
                f"{option}: cannot read {file.path}: {error}; restore the file or correct its permissions."
            ) from error

    with ThreadPoolExecutor(16) as pool:
        sizes = [
            file.size_bytes
            for file, compressed in zip(files, pool.map(is_compressed, files), strict=True)
            if compressed
        ]
    if sizes:
        display.line(
            f"{len(sizes)} compressed files ({sum(sizes) / 1e6:,.1f} MB) have no random access: each is copied once, "
            f"decompressed (3 to 6 times as large), into {(run_dir / INDEX).uri}."
        )


def _list_skipped(shards: Sequence[Shard], option: str, run_dir: Directory, display: Display) -> None:
    """Say and record which records are left out."""
    skipped = {shard.file.path: [str(record) for record in shard.bad] for shard in shards if shard.bad}
    if skipped:
        count = sum(map(len, skipped.values()))
        display.warn(
            f"{option}: {count} bad records in {len(skipped)} files are left out; "
            f"{SKIPPED} in the run directory lists them."
        )
        known = {}
        with suppress(FileNotFoundError, ValueError):  # of the other files; a damaged one is made anew
            known = dict(json.loads(run_dir.read(SKIPPED)))
        run_dir.write(SKIPPED, json.dumps(known | {option: skipped}, indent=1).encode())


def _write_settings(config: Config, run_dir: Directory, index: Index, evaluation: Index | None) -> None:
    """Put beside the run what it was started with."""
    run_dir.write(CONFIG, config_to_yaml(config).encode())
    write_list(index, run_dir / INDEX)
    if config.data.vocab_file is not None:
        with local_file(config.data.vocab_file) as path:
            run_dir.write(VOCABULARY, path.read_bytes())
    if evaluation is not None:
        random_next = evaluation.num_random_next / evaluation.num_samples
        baselines = {
            "unigram_mlm_loss": unigram_loss(index.label_counts, evaluation.label_counts),
            "majority_next_sentence_accuracy": max(random_next, 1 - random_next),
        }
        run_dir.write(BASELINES, json.dumps(baselines).encode())


def _fit_here(job: Job) -> None:
    """Ray Train's local mode: one process, no actors."""
    while True:
        try:
            TorchTrainer(partial(train_worker, job), scaling_config=ScalingConfig(num_workers=0)).fit()
            return
        except RollbackError as error:
            job.tell(Event("failure", text=str(error)))


def _fit(job: Job, display: Display, ledger: Ledger, local: Path) -> None:
    """Run attempts on the cluster and show their events until the last step.

    Args:
        job: of the run.
        display: shows the events.
        ledger: of the run.
        local: a directory of this machine for what Ray Train keeps for itself.

    Raises:
        UserError: what a worker could not do for the user's sake, a crash loop, or the end of Ray Train's controller.
    """
    own_node = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    here: Any = {"num_cpus": 0, "scheduling_strategy": own_node}  # other nodes may go
    inbox: Any = ray.remote(max_restarts=-1, max_task_retries=-1, **here)(Inbox).remote()
    job = replace(job, peers=create_peers() if job.config.checkpoint.snapshot_every_steps else None)
    trainer: Any = _trainer(job, local, Post(inbox), display.warn)
    cluster.replace_request(job.run, trainer.train_run_context.run_id)
    outcome: list[BaseException | None] = []
    ended = threading.Event()  # a thread whose join is interrupted passes for ended in Python 3.11

    def fit() -> None:
        try:
            trainer.fit()
            outcome.append(None)
        except BaseException as error:
            outcome.append(error)
        ended.set()

    # Not in the main thread: there Ray Train takes over Ctrl-C.
    threading.Thread(target=fit, name="fit", daemon=True).start()
    try:
        _follow(ended, inbox, job, display, ledger)
    finally:
        cluster.cancel_request(trainer.train_run_context.run_id)
        _end(ended, inbox)
    if isinstance(outcome[0], RayActorError):  # of workers that die, Ray Train makes an error of its own
        raise UserError(
            "Ray Train's controller, a process on the driver's node, has died, perhaps for want of memory; the same "
            f"command resumes the run in {job.run.uri}. {outcome[0]}"
        ) from outcome[0]
    if outcome[0] is not None:
        raise cause_of(outcome[0])


def _end(ended: threading.Event, inbox: Any) -> None:
    """End the controller, and so the call that waits for it, under which Ray's shutdown may crash."""
    until_s = time.monotonic() + END_S
    while not ended.is_set() and time.monotonic() < until_s:
        with suppress(RayError):  # Ctrl-C in a terminal reaches the inbox, too
            controller = ray.get(inbox.controller.remote(), timeout=POLL_S)
            if controller is not None:  # else it is about to start
                ray.kill(controller)
        ended.wait(POLL_S)


def _follow(ended: threading.Event, inbox: Any, job: Job, display: Display, ledger: Ledger) -> None:
    """Show the run's events until it has ended."""
    gauges, is_last = Gauges(job.run, job.config), False
    look_at_s = time.monotonic() + SHORTAGE_S
    while not is_last:
        is_last = ended.wait(POLL_S)  # asked before the events are taken, so that none is left behind
        for event in ray.get(inbox.take.remote()):
            job.tell(event)
            gauges.show(event)
        gauges.refresh()
        ledger.refresh()
        if time.monotonic() >= look_at_s:
            look_at_s += SHORTAGE_S
            shortage = cluster.shortage(job.config.cluster)
            if shortage:
                display.line(shortage)


def _trainer(job: Job, local: Path, post: Post, warn: Callable[[str], None]) -> TorchTrainer:
    config = job.config
    index = ray.put(job.index.for_reading())
    evaluation = None if job.evaluation is None else ray.put(job.evaluation.for_reading())
    remote = replace(job, index=index, evaluation=evaluation, tell=post)
    resources = {"CPU": config.cluster.cpus_per_worker, **({"GPU": 1} if config.cluster.use_gpu else {})}
    scaling: Any = ScalingConfig(
        num_workers=config.cluster.worker_range(),
        use_gpu=config.cluster.use_gpu,
        resources_per_worker=resources,
        elastic_resize_monitor_interval_s=config.cluster.resize_check_s,
    )
    # Checkpoints are not reported to Ray: our manifests are the truth, and no state of Ray's outlives the driver.
    run: Any = RunConfig(
        name="ray",
        storage_path=str(local),
        failure_config=FailureConfig(max_failures=-1),
        callbacks=[StopRetrying(job.run, post)],
    )
    return _trainer_class(config.cluster, post, warn)(
        partial(train_ray_worker, remote),
        torch_config=PatientTorchConfig(timeout_s=int(config.cluster.collective_timeout_s), tell=post),
        scaling_config=scaling,
        run_config=run,
        datasets={ingest.TRAIN: ingest.placeholder()},
        dataset_config=ingest.AttemptConfig(
            job.order, index, config.training.num_steps, Begin(job.run, post, job.peers), job.remasking
        ),
    )


def _trainer_class(config: ClusterConfig, post: Post, warn: Callable[[str], None]) -> Callable[..., TorchTrainer]:
    """Ray's trainer with our scaling policy; with Ray's own where that does not fit the installed Ray."""
    try:
        from raybert import scaling

        lacking = scaling.missing()
    except ImportError as error:
        lacking = [str(error)]
    if lacking:
        warn(
            f"Ray {ray.__version__} is not built as raybert expects ({', '.join(lacking)}): Ray's own scaling policy "
            "is used, with which every resize and every node that leaves costs the steps since the last checkpoint; "
            "install Ray 2.60."
        )
        return TorchTrainer
    # Ray's watcher would take a node's notice out of the policy's hands, and wait until the node is gone.
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    keeps_spares = config.keep_spares and not cluster.is_local()  # where this machine has other things to do
    return partial(scaling.ElasticTrainer, tell=post, hang_timeout_s=config.hang_timeout_s, keeps_spares=keeps_spares)


def _print_result(run_dir: Directory, config: Config, display: Display) -> None:
    """Where the run stands: held-out metrics beside what guessing reaches, what it cost, and how to open it."""
    display.freeze()
    checkpoint = outlast_blip(lambda: newest_checkpoint(run_dir, display.warn))
    assert checkpoint is not None
    evaluations = [row for row in read_metrics(run_dir) if row["kind"] == EVAL]
    if evaluations and run_dir.exists(BASELINES):
        display.held_out(evaluations[-1], json.loads(run_dir.read(BASELINES)))
    _print_cost(run_dir, config, display)
    with suppress(OSError):
        if run_dir.exists(REPORT):
            display.line(f"Report: {(run_dir / REPORT).uri}")
    display.line(f"Checkpoint: {checkpoint.directory.uri}")
    display.line("Open it with transformers:")
    model = f'BertForPreTraining.from_pretrained("{checkpoint.directory.uri}")'
    display.line(f"  from transformers import BertForPreTraining; model = {model}")


def _print_cost(run_dir: Directory, config: Config, display: Display) -> None:
    """What the attempts of the run came to, if that is known."""
    try:
        entries = read_ledger(run_dir)
    except (OSError, ValueError) as error:
        display.warn(f"what the run cost is not known: {error}")
        return
    for line in lines(summarize(entries, config.cluster.price_per_worker_hour)) if entries else ():
        display.line(line)
