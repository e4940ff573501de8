"""Checkpoints: all that a run is, at a step, written behind the next steps and read back; no pickle.

A checkpoint opens with transformers as it is (config.json, model.safetensors, the vocabulary). Beside these lie
optimizer.safetensors and state.json; `manifest` says what makes a directory a checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from raybert.config import ModelConfig
from raybert.errors import UserError
from raybert.history import StepRecord, check_newest, write_records
from raybert.manifest import (
    CHECKPOINTS,
    FORMAT_VERSION,
    MANIFEST,
    MODEL,
    OPTIMIZER,
    STATE,
    Checkpoint,
    checkpoint_name,
    find_checkpoints,
    place,
)
from raybert.pretrained import load_tensors, save_pretrained
from raybert.retry import Wait, give_up, retry
from raybert.scratch import scratch
from raybert.step import TrainState
from raybert.storage import Directory


@dataclass(frozen=True)
class HostCopy:
    """The state of a run in host memory, so that training may go on while it is written."""

    step: int
    num_updates: int
    model: Mapping[str, torch.Tensor]
    optimizer: Mapping[str, torch.Tensor]
    scaler: Mapping[str, Any]


def host_copy(state: TrainState, into: HostCopy | None = None) -> HostCopy:
    """Copy the state to host memory.

    Args:
        state: to be copied.
        into: a copy that nobody needs any more, whose memory is used again: new memory takes longer than the copying.
    """
    names = {id(parameter): name for name, parameter in state.model.named_parameters()}
    moments = {
        f"{key}.{names[id(parameter)]}": value
        for parameter, values in state.optimizer.state.items()
        for key, value in values.items()
    }
    return HostCopy(
        step=state.step,
        num_updates=state.step - int(state.num_skipped),
        model=_to_host(state.model.state_dict(), into.model if into else {}),
        optimizer=_to_host(moments, into.optimizer if into else {}),
        scaler=state.scaler.state_dict(),
    )


def room_for(state: TrainState) -> HostCopy:
    """A copy of nothing yet, whose memory `host_copy` can use: every page of it is there, which takes the time."""
    tensors = state.model.state_dict()
    kinds = {name: p for name, p in state.model.named_parameters() if p.requires_grad}
    moments = {f"{key}.{name}": tensor for key in ("exp_avg", "exp_avg_sq") for name, tensor in kinds.items()}
    model, optimizer = ({name: _room(tensor).zero_() for name, tensor in part.items()} for part in (tensors, moments))
    return HostCopy(state.step, 0, model, optimizer, {})


def _room(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)


def _to_host(tensors: Mapping[str, torch.Tensor], into: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    copies = {}
    for name, tensor in tensors.items():
        copy = into.get(name)
        if copy is None or (copy.shape, copy.dtype) != (tensor.shape, tensor.dtype):
            copy = _room(tensor)
        copies[name] = copy.copy_(tensor.detach(), non_blocking=True)
    if any(tensor.is_cuda for tensor in tensors.values()):
        torch.cuda.synchronize()
    return copies


def _digest(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def restore(checkpoint: Checkpoint, state: TrainState) -> None:
    """Bring the state to where the checkpoint is.

    Raises:
        UserError: the checkpoint is of another model or optimizer; nothing was changed.
    """
    with checkpoint.directory.local() as path:
        model, moments = load_file(path / MODEL), load_file(path / OPTIMIZER)
    num_updates, scaler = int(checkpoint.state["num_updates"]), dict(checkpoint.state["scaler"])
    bring(HostCopy(checkpoint.step, num_updates, model, moments, scaler), state, checkpoint.directory.uri)


def bring(copy: HostCopy, state: TrainState, source: str) -> None:
    """Bring the state to where a copy is, which then belongs to the state.

    Args:
        copy: of a state.
        state: to be changed.
        source: of the copy, for a person.

    Raises:
        UserError: the copy is of another model or optimizer; nothing was changed.
    """
    ours = {name: tuple(tensor.shape) for name, tensor in state.model.state_dict().items()}
    theirs = {name: tuple(tensor.shape) for name, tensor in copy.model.items()}
    _check_same("model weights", ours, theirs, source)
    _restore_moments(copy.optimizer, state, source)
    state.model.load_state_dict(dict(copy.model))
    if copy.scaler and state.scaler.is_enabled():
        state.scaler.load_state_dict(dict(copy.scaler))
    state.step = copy.step
    state.num_skipped.fill_(copy.step - copy.num_updates)


def read_moments(directory: Path, model: nn.Module) -> dict[str, torch.Tensor]:
    """The optimizer's moments in a directory, of what is trained of a model.

    Raises:
        UserError: there are none, or they are another model's.
    """
    if not (directory / OPTIMIZER).is_file():
        raise UserError(f"{directory} has no {OPTIMIZER}, so no moments; leave training.init_optimizer out.")
    trained = {name: tuple(parameter.shape) for name, parameter in model.named_parameters() if parameter.requires_grad}
    moments = {key: tensor for key, tensor in load_tensors(directory / OPTIMIZER).items() if _name_of(key) in trained}
    theirs = {_name_of(key): tuple(tensor.shape) for key, tensor in moments.items() if key.startswith("exp_avg.")}
    _check_same("optimizer moments", trained, theirs, str(directory))
    return moments


def load_moments(directory: Path, state: TrainState) -> None:
    """Give a state's optimizer the moments in a directory.

    Raises:
        UserError: there are none, or they are another model's; nothing was changed.
    """
    _restore_moments(read_moments(directory, state.model), state, str(directory))


def _name_of(key: str) -> str:
    """The parameter that a moment is of."""
    return key.partition(".")[2]


def _restore_moments(moments: Mapping[str, torch.Tensor], state: TrainState, source: str) -> None:
    by_name: dict[str, dict[str, torch.Tensor]] = {}
    for key, value in moments.items():
        by_name.setdefault(_name_of(key), {})[key.partition(".")[0]] = value
    names = {id(parameter): name for name, parameter in state.model.named_parameters()}
    parameters = [parameter for group in state.optimizer.param_groups for parameter in group["params"]]
    if by_name:
        ours = {names[id(parameter)]: tuple(parameter.shape) for parameter in parameters}
        theirs = {name: tuple(values["exp_avg"].shape) for name, values in by_name.items()}
        _check_same("optimizer moments", ours, theirs, source)
    states = {number: by_name[names[id(parameter)]] for number, parameter in enumerate(parameters) if by_name}
    state.optimizer.load_state_dict({"state": states, "param_groups": state.optimizer.state_dict()["param_groups"]})


def _check_same(what: str, ours: Mapping[str, object], theirs: Mapping[str, object], source: str) -> None:
    if ours == theirs:
        return
    name = next(name for name in sorted({*ours, *theirs}) if ours.get(name) != theirs.get(name))
    raise UserError(
        f"{source}: {what} of another configuration: {name} is {theirs.get(name, 'absent')} there "
        f"and {ours.get(name, 'absent')} in this run; train with the checkpoint's configuration or in another run_dir."
    )


@dataclass(frozen=True)
class Writer:
    """Writes checkpoints of one attempt into a run directory.

    Args:
        run: the run directory.
        attempt: number of the attempt; a newer one fences it.
        model: architecture, for config.json.
        vocab_file: local path of the vocabulary, if there is one.
        identity: what a resumed run must agree on, for state.json.
        keep: newest checkpoints to keep; 0 keeps all.
    """

    run: Directory
    attempt: int
    model: ModelConfig
    vocab_file: Path | None
    identity: Mapping[str, Any]
    keep: int

    def write(self, copy: HostCopy, parent: str | None, records: Sequence[StepRecord], wait: Wait = give_up) -> str:
        """Write a checkpoint with the records it commits; returns its name.

        Args:
            copy: what to write.
            parent: checkpoint before it.
            records: of the steps between the two.
            wait: what to do about each error of storage (see `retry`).

        Raises:
            FencedError: a newer attempt owns the run; the checkpoint stays incomplete.
            OSError: the storage failed and `wait` gave up; likewise.
        """
        name = checkpoint_name(copy.step, self.attempt)
        directory = self.run / CHECKPOINTS / name
        with self._staging(directory) as path:
            files = retry(partial(self._stage, path, copy, parent), wait)
            for file in files:
                retry(partial(directory.upload, file, path / file), wait)
            retry(partial(write_records, self.run, name, parent, records), wait)
            manifest = {"format_version": FORMAT_VERSION, "step": copy.step, "attempt": self.attempt, "files": files}
            retry(partial(self._commit, directory, json.dumps(manifest, indent=1).encode()), wait)
        return name

    def _commit(self, directory: Directory, manifest: bytes) -> None:
        check_newest(self.run, self.attempt)
        directory.write(MANIFEST, manifest)

    @contextmanager
    def _staging(self, directory: Directory) -> Iterator[Path]:
        """Where files are made before they count: in place on a local run directory, else a temporary directory."""
        if not directory.is_local:
            with scratch() as path:
                yield path
            return
        try:
            yield Path(directory.path)
        except OSError:
            shutil.rmtree(directory.path, ignore_errors=True)
            raise

    def _stage(self, path: Path, copy: HostCopy, parent: str | None) -> dict[str, str]:
        """Make all files but the manifest; returns their digests. What fails leaves nothing: a full disk needs room."""
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._write_files(path, copy, parent)
            return {file.name: _digest(file) for file in sorted(path.iterdir())}
        except OSError:
            shutil.rmtree(path, ignore_errors=True)
            raise

    def _write_files(self, path: Path, copy: HostCopy, parent: str | None) -> None:
        try:
            save_pretrained(path, dict(copy.model), self.model, self.vocab_file)
            save_file(dict(copy.optimizer), path / OPTIMIZER)
        except SafetensorError as error:  # a full disk, too
            raise OSError(str(error)) from error
        state = {
            "format_version": FORMAT_VERSION,
            "step": copy.step,
            "num_updates": copy.num_updates,
            "attempt": self.attempt,
            "parent": parent,
            "scaler": dict(copy.scaler),
            "identity": dict(self.identity),
        }
        (path / STATE).write_text(json.dumps(state, indent=1))
        for file in path.iterdir():
            with file.open("rb") as opened:
                os.fsync(opened.fileno())

    def prune(self, newest: str) -> None:
        """Delete what lies behind the newest checkpoint: complete ones beyond `keep`, and incomplete ones."""
        names = [name for name in find_checkpoints(self.run) if place(name) <= place(newest)]
        complete = [name for name in names if (self.run / CHECKPOINTS / name).exists(MANIFEST)]
        doomed = complete[self.keep :] if self.keep else []
        for name in [*doomed, *(name for name in names if name not in complete)]:
            directory = self.run / CHECKPOINTS / name
            if directory.exists(MANIFEST):  # the manifest goes first: half a deletion must not look like a checkpoint
                directory.remove(MANIFEST)
            directory.delete()


class Saver:
    """Saves in the background: a save costs the host copy, and training never waits for storage.

    One checkpoint is being written, and tried again for as long as its attempt lives; at most one more, the newest,
    waits and takes its place once storage refuses it again. Records wait for the next checkpoint that is complete.
    """

    def __init__(
        self,
        writer: Writer,
        parent: str | None,
        committed: Callable[[str], None],
        warn: Callable[[str], None],
        outage_limit_s: float,
        records: Sequence[StepRecord] = (),
    ) -> None:
        """Args:
        writer: of this attempt.
        parent: checkpoint that the attempt began from, or that its snapshot stands on.
        committed: told each new checkpoint's name, from the background thread.
        warn: told what delays a commit.
        outage_limit_s: an outage that lasts longer is warned of again; the end of a run does not wait longer.
        records: of the steps between the parent and the attempt's beginning.
        """
        self._writer, self._parent = writer, parent
        self._committed, self._warn = committed, warn
        self._records = list(records)
        self._next: HostCopy | None = None
        self._written: HostCopy | None = None  # whose memory the next one takes
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._lock, self._news = threading.Lock(), threading.Event()
        self._outage = Outage(warn, outage_limit_s)
        self._until_s = math.inf  # what storage refuses then is given up

    def prepare(self, state: TrainState) -> None:
        """Get the memory for the first copy, behind the next steps."""

        def work() -> None:
            room = room_for(state)
            with self._lock:
                self._written = self._written or room

        threading.Thread(target=work, name="memory", daemon=True).start()

    def wait(self, limit_s: float | None = None) -> None:
        """Wait until no write is pending, for `limit_s` seconds at most."""
        thread = self._thread
        if thread is not None:
            thread.join(limit_s)

    @property
    def is_failing(self) -> bool:
        """Whether storage has refused a checkpoint and taken none since."""
        return self._outage.is_on

    @property
    def is_writing(self) -> bool:
        """Whether a checkpoint is being written, and storage has not refused it."""
        return self._thread is not None and not self.is_failing

    @property
    def parent(self) -> str | None:
        """The newest complete checkpoint of the history that this attempt writes."""
        return self._parent

    def note(self, records: Sequence[StepRecord]) -> None:
        """Take in records that the next checkpoint commits."""
        self._records += records

    def is_saved(self, step: int) -> bool:
        """Whether the newest complete checkpoint of this attempt is that of a step."""
        return self._parent == checkpoint_name(step, self._writer.attempt)

    def save(self, state: TrainState, records: Sequence[StepRecord]) -> None:
        """Copy the state and write it behind the next steps, or behind the write that is pending.

        Raises:
            FencedError: a newer attempt owns the run.
        """
        self._records += records
        if self._error is not None and not isinstance(self._error, OSError):
            raise self._error
        with self._lock:  # before another copy is made: memory holds two at most
            waiting, self._next = self._next, None
            into, self._written = waiting or self._written, None
        if waiting is not None and not self._outage.is_on:
            self._warn(f"Checkpoint at step {waiting.step} left out: the one before is still being written.")
        copy = host_copy(state, into)
        with self._lock:
            if self._thread is not None:
                self._next = copy
                self._news.set()
            else:
                self._thread = threading.Thread(target=self._write_all, args=([copy],), name="checkpoint")
                self._thread.start()

    def finish(self, state: TrainState, records: Sequence[StepRecord]) -> None:
        """Save once more and wait until the checkpoint is complete.

        Raises:
            FencedError: a newer attempt owns the run.
            UserError: storage did not take it within the limit of an outage.
        """
        self._until_s = time.monotonic() + self._outage.limit_s
        self.save(state, records)
        self.wait()
        if isinstance(self._error, OSError):
            run = self._writer.run.uri
            raise UserError(
                f"run_dir: the last checkpoint (step {state.step}) could not be written to {run} for "
                f"{self._outage.limit_s:.0f} s (checkpoint.outage_limit_s): {self._error}. The run stands at "
                f"{self._parent or 'its beginning'}: mend the storage or make room, then the same command resumes it."
            ) from self._error
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """Wait for the write that is pending, and give it up where storage refuses it."""
        self._until_s = -math.inf
        self._news.set()
        self.wait()

    def _write_all(self, first: list[HostCopy]) -> None:
        copy: HostCopy | None = first.pop()  # a thread keeps its arguments until it has ended
        while copy is not None:
            self._write(copy)
            with self._lock:
                self._written = copy
            copy = self._take()

    def _take(self) -> HostCopy | None:
        with self._lock:
            copy, self._next = self._next, None
            self._news.clear()
            if copy is None:
                self._thread = None
            return copy

    def _write(self, copy: HostCopy) -> None:
        records = [record for record in list(self._records) if record.step < copy.step]
        try:
            name = self._writer.write(copy, self._parent, records, self._wait)
            self._parent, self._error = name, None
            del self._records[: len(records)]
            self._outage.end()
            self._committed(name)
            self._prune(name)
        except OSError as error:
            self._error = OSError(str(error))
            error.__traceback__ = None  # which holds the copy, and is held by a frame of its own
        except Exception as error:
            self._error = error
            self._warn(f"Checkpoint at step {copy.step} could not be written: {error}")

    def _prune(self, newest: str) -> None:
        try:
            self._writer.prune(newest)
        except OSError as error:
            self._warn(f"Old checkpoints could not be deleted, which the next one tries again: {error}")

    def _wait(self, error: OSError, pause_s: float) -> None:
        """Wait for another try, unless something newer is to be written or the time is over."""
        self._outage.note(error)
        self._news.wait(max(0.0, min(pause_s, self._until_s - time.monotonic())))
        if self._next is not None or time.monotonic() >= self._until_s:
            raise error


class Outage:
    """Says when storage fails, when it has failed for too long, and when it is over: each once."""

    def __init__(self, warn: Callable[[str], None], limit_s: float) -> None:
        self._warn, self.limit_s = warn, limit_s
        self._since_s = math.nan
        self._is_long = False

    @property
    def is_on(self) -> bool:
        return not math.isnan(self._since_s)

    def note(self, error: OSError) -> None:
        """Storage has failed."""
        now_s = time.monotonic()
        if not self.is_on:
            self._since_s, self._is_long = now_s, False
            self._warn(f"Checkpoints cannot be written: {error}. Training goes on; so do the tries.")
        elif now_s - self._since_s > self.limit_s and not self._is_long:
            self._is_long = True
            self._warn(
                f"No checkpoint was written for {now_s - self._since_s:.0f} s (checkpoint.outage_limit_s): {error}. "
                "If the run stops, all since the last commit is lost: mend the storage or make room."
            )

    def end(self) -> None:
        """A checkpoint is complete."""
        if self.is_on:
            self._warn(f"Checkpoints are written again, after {time.monotonic() - self._since_s:.0f} s.")
        self._since_s = math.nan
