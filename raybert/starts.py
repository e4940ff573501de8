"""Starts: a group of workers that could not be started, as when one dies on the way, is ended and tried again.

Ray Train does so only until the workers' processes are there. Where the process group cannot be set up it ends the run,
or tries again beside the workers that it has forgotten, whose places never become free.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend
from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError

from raybert.events import Event, Tell


class PatientBackend(_TorchBackend):
    """Ray's set-up of the process group, that cleans up where it fails."""

    def __init__(self) -> None:
        self._num_failed = 0

    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        """Set up the process group of a new group of workers.

        Raises:
            WorkerGroupStartupFailedError: to be tried again.
            Exception: what it failed of, if it has failed too often.
        """
        try:
            super().on_start(worker_group, backend_config)
        except Exception as error:
            worker_group.abort()
            self._num_failed += 1
            if self._num_failed >= backend_config.limit:
                raise
            line = str(error).strip().splitlines()[-1:] or [type(error).__name__]
            backend_config.tell(Event("warning", text=f"The workers could not be started, another try: {line[0]}"))
            raise WorkerGroupStartupFailedError(str(error)) from error
        self._num_failed = 0


@dataclass
class PatientTorchConfig(TorchConfig):
    """Ray's settings of the process group, for `PatientBackend`.

    Args:
        tell: takes events to the driver.
        limit: failed starts in a row that end a run.
    """

    tell: Tell = print
    limit: int = 10

    @property
    def backend_cls(self) -> Callable[[], PatientBackend]:
        return PatientBackend
