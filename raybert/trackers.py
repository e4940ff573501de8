"""Trackers: a run's settings, metrics and events for Weights & Biases and MLflow, through their own libraries.

Each is a callable that hears the run's events in the driver (see `listener`). A run that is continued is the same run
there: its id is kept in the run directory. A step that is done again, after a failure or a rollback, is not logged
again: what was logged first stays. Secrets are the libraries' affair, by their own environment variables.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import secrets
import time
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from logging import WARNING, getLogger
from typing import Any

from raybert.config import Config, LoggingConfig
from raybert.display import attempt_line
from raybert.errors import UserError
from raybert.events import Event, Tell
from raybert.listener import FINISHED, INTERRUPTED
from raybert.retry import outlast_blip
from raybert.storage import Directory
from raybert.telemetry import read_metrics

TRACKING = "tracking"  # in a run directory: which run this is at each tracker
START_S, FINISH_S = 30, 60  # that Weights & Biases may take
BATCH, MAX_PENDING = 100, 50_000  # of what MLflow takes at once; metrics kept while it cannot be reached


def check_trackers(config: LoggingConfig) -> None:
    """Refuse trackers whose library, address or key is missing, before a worker starts.

    Raises:
        UserError: naming the setting and the remedy.
    """
    if config.wandb_project is not None:
        _check_wandb(_library("wandb", "logging.wandb_project"))
    if config.mlflow_experiment is not None:
        mlflow = _library("mlflow", "logging.mlflow_experiment")
        try:
            mlflow.MlflowClient(config.mlflow_tracking_uri)
        except Exception as error:
            raise UserError(f"logging.mlflow_tracking_uri: MLflow refuses it: {_first_line(error)}") from error


def _library(name: str, option: str) -> Any:
    if importlib.util.find_spec(name) is None:
        raise UserError(f"{option} needs {name}, which is not installed; run `pip install 'raybert[{name}]'`.")
    return importlib.import_module(name)


def _check_wandb(wandb: Any) -> None:
    if wandb.setup(wandb.Settings(silent=True)).settings.mode not in (None, "online"):
        return
    try:
        has_key = wandb.login(prompt=False, verify=False)
    except wandb.errors.Error as error:
        raise UserError(f"logging.wandb_project: Weights & Biases refuses to log in: {_first_line(error)}") from error
    if not has_key:
        raise UserError(
            "logging.wandb_project needs a key of Weights & Biases, and there is none; run `wandb login`, set "
            "WANDB_API_KEY, or set WANDB_MODE=offline to log to files, which `wandb sync` uploads."
        )


def trackers(config: Config, run: Directory) -> dict[str, Tell]:
    """The trackers that the configuration asks for, by name."""
    logging, found = config.logging, dict[str, Tell]()
    if logging.wandb_project is not None:
        found["Weights & Biases"] = WandbTracker(config, run, _logged(run))
    if logging.mlflow_experiment is not None:
        found["MLflow"] = MlflowTracker(config, run, _logged(run))
    return found


def _logged(run: Directory) -> dict[str, int]:
    """The last step that the run has logged, by kind; to be read before an attempt takes back what it does again."""
    rows = outlast_blip(lambda: read_metrics(run))
    return {row["kind"]: row["step"] for row in sorted(rows, key=lambda row: int(row["step"]))}


@dataclass
class WandbTracker:
    """Logs to a project of Weights & Biases; to files where its server cannot be reached at the beginning.

    Args:
        config: resolved.
        run: the run directory.
        logged: last step that was logged, by kind.
    """

    config: Config
    run: Directory
    logged: dict[str, int]
    _run: Any = None

    def __call__(self, event: Event) -> None:
        """Log an event.

        Raises:
            Exception: what the library raises.
        """
        if event.kind == "attempt" and self._run is None:
            self._start()
        if self._run is None:
            return
        if event.kind in ("train", "eval"):
            if event.step > self.logged.get(event.kind, 0) and event.step >= self._run.step:
                self._run.log(_named(event), step=event.step)
                self.logged[event.kind] = event.step
        elif event.kind == "end":
            self._run.finish(exit_code=0 if event.text == FINISHED else 1)
        else:
            self._run.summary.update(dict(_notes(event)))

    def _start(self) -> None:
        wandb = importlib.import_module("wandb")
        project = self.config.logging.wandb_project
        assert project is not None
        known = _read_id(self.run, "wandb", project)
        name = known or secrets.token_hex(8)
        if known is None:
            self.logged = {}
            _write_id(self.run, "wandb", project, name)
        settings = {"console": "off", "silent": True, "init_timeout": START_S, "finish_timeout": FINISH_S}
        arguments = {
            "project": project,
            "id": name,
            "name": _run_name(self.config),
            "resume": "allow",
            "reinit": "create_new",  # a run of the user's own in this process is another one
            "config": asdict(self.config),
            "allow_val_change": True,
            "dir": os.environ.get("WANDB_DIR") or (self.run.path if self.run.is_local else None),
        }
        try:
            self._run = wandb.init(**arguments, settings=wandb.Settings(**settings))
        except wandb.errors.Error as error:
            if wandb.run is not None:
                raise
            wandb.teardown()  # else the run counts as in use; it would end a run of the user's own in this process
            self._run = wandb.init(**arguments, mode="offline", settings=wandb.Settings(**settings))
            raise ConnectionError(f"{_first_line(error)}; it is logged to files in {self._run.dir}") from error


@dataclass
class MlflowTracker:
    """Logs to an experiment of MLflow; metrics that cannot be sent wait for the next event.

    Args:
        config: resolved.
        run: the run directory.
        logged: last step that was logged, by kind.
    """

    config: Config
    run: Directory
    logged: dict[str, int]
    _client: Any = None
    _id: str | None = None
    _pending: deque[Any] = field(default_factory=lambda: deque(maxlen=MAX_PENDING))

    def __call__(self, event: Event) -> None:
        """Log an event.

        Raises:
            Exception: what the library raises.
        """
        entities = importlib.import_module("mlflow.entities")
        now_ms = int(time.time() * 1000)
        if event.kind in ("train", "eval") and event.step > self.logged.get(event.kind, 0):
            self._pending += [entities.Metric(*item, now_ms, event.step) for item in _named(event).items()]
            self.logged[event.kind] = event.step
        self._pending += [entities.RunTag(*item) for item in _notes(event)]
        if event.kind in ("attempt", "train", "eval") and self._id is None:
            self._start()
        if self._id is None:
            return
        self._send(entities)
        if event.kind == "end":
            status = {FINISHED: "FINISHED", INTERRUPTED: "KILLED"}.get(event.text, "FAILED")
            self._client.set_terminated(self._id, status)

    def _send(self, entities: Any) -> None:
        while self._pending:
            some = [self._pending[k] for k in range(min(BATCH, len(self._pending)))]
            tags = [item for item in some if isinstance(item, entities.RunTag)]
            self._client.log_batch(self._id, metrics=[item for item in some if item not in tags], tags=tags)
            for _ in some:
                self._pending.popleft()

    def _start(self) -> None:
        getLogger("mlflow").setLevel(WARNING)
        mlflow = importlib.import_module("mlflow")
        experiment, uri = self.config.logging.mlflow_experiment, self.config.logging.mlflow_tracking_uri
        client, place = mlflow.MlflowClient(uri), f"{uri or ''} {experiment}".strip()
        known = _read_id(self.run, "mlflow", place)
        settings = {name: str(value) for name, value in _flat(asdict(self.config))}
        if known is None:
            found = client.get_experiment_by_name(experiment)
            number = client.create_experiment(experiment) if found is None else found.experiment_id
            known = client.create_run(number, run_name=_run_name(self.config)).info.run_id
            _write_id(self.run, "mlflow", place, known)
            for name, value in settings.items():
                client.log_param(known, name, value)
        else:
            client.update_run(known, status="RUNNING")
            before = client.get_run(known).data.params  # which MLflow lets nobody change
            for name, value in settings.items():
                if before.get(name, value) != value:
                    client.set_tag(known, f"now {name}", value)
        self._client, self._id = client, known


def _named(event: Event) -> dict[str, float]:
    return {f"{event.kind}/{name}": float(value) for name, value in event.metrics.items()}


def _notes(event: Event) -> Iterator[tuple[str, str]]:
    """What a person should know of an event, by a name that no other has."""
    if event.kind == "attempt":
        yield f"attempt {int(event.metrics['number'])}", attempt_line(event).partition(": ")[2]
    elif event.kind in ("failure", "resize", "warning"):
        yield f"{event.kind} {datetime.now(UTC):%Y-%m-%d %H:%M:%S.%f}", event.text[:4000]
    elif event.kind == "checkpoint":
        yield "checkpoint", event.text


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted names, and values."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _run_name(config: Config) -> str:
    return config.logging.run_name or config.run_dir.rstrip("/").rpartition("/")[2]


def _read_id(run: Directory, tracker: str, place: str) -> str | None:
    """The run that this one is at a tracker; None if it is none at that place."""
    folder, name = run / TRACKING, f"{tracker}.json"
    if not folder.exists(name):
        return None
    row = json.loads(folder.read(name))
    return str(row["id"]) if row["place"] == place else None


def _write_id(run: Directory, tracker: str, place: str, name: str) -> None:
    (run / TRACKING).write(f"{tracker}.json", json.dumps({"place": place, "id": name}).encode())


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
