"""Failures of attempts: what was raised, out of Ray's wrappers, and whether another attempt would fail alike.

Ray Train alone retries for ever. A lost node is to be retried, a defect is not.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from ray.exceptions import RayActorError, RayTaskError
from ray.train import ControllerError
from ray.train.v2.api.callback import UserCallback

from raybert.errors import UserError
from raybert.events import Event, Tell
from raybert.guard import RollbackError
from raybert.history import read_attempts
from raybert.retry import outlast_blip
from raybert.storage import Directory

SILENT = "WorkerHealthCheckTimeoutError"  # Ray Train's, of a process that hangs
AT_STEP = "at step "  # begins a note of an error
ALIKE_LIMIT = 3  # failures in a row with one error at one step that end a run
STUCK_LIMIT = 10  # failures in a row of any kind, no checkpoint between them, that end a run


@dataclass
class StopRetrying(UserCallback):
    """Ends the run where another attempt would fail alike: our own errors at once, others in a crash loop.

    Runs in Ray Train's controller, which ends a run when a callback raises.

    Args:
        run: the run directory.
        tell: takes events to the driver.
    """

    run: Directory
    tell: Tell
    failures: list[tuple[int, str]] = field(default_factory=list)  # of attempts from the same step: it, and the error

    def after_exception(self, run_context: object, worker_exceptions: dict[int, Exception]) -> None:
        """Raises:
        UserError: the run is not to be retried.
        """
        errors = [error for _, error in sorted(worker_exceptions.items())]
        causes = [cause_of(error) for error in errors]
        for cause in causes:
            if isinstance(cause, UserError):
                raise cause
        for cause in causes:
            if isinstance(cause, RollbackError):  # no failure: the run counts these itself
                self.tell(Event("failure", text=str(cause)))
                return
        # What the others say of a worker that died is no reason.
        silent = [rank for rank, error in worker_exceptions.items() if type(cause_of(error)).__name__ == SILENT]
        died = bool(silent) or any(isinstance(cause, RayActorError) for cause in causes)
        notes = [] if died else _notes(errors[0])
        failure = f"rank {silent[0]} did not answer" if silent else "a worker died"
        failure = failure if died else _described(causes[0], notes)
        self._note(failure)
        if not died and self.failures[-ALIKE_LIMIT:].count(self.failures[-1]) == ALIKE_LIMIT:
            details = [note for note in notes if not note.startswith(AT_STEP)]
            raise UserError("\n".join([self._ending(f"{ALIKE_LIMIT} times alike, {failure}"), *details]).rstrip())
        if len(self.failures) == STUCK_LIMIT:
            raise UserError(self._ending(f"{STUCK_LIMIT} times without a new checkpoint, at last: {failure}"))
        self.tell(Event("failure", text=failure))

    def _note(self, failure: str) -> None:
        """Add a failure to those of attempts that began at the same step."""
        attempts = outlast_blip(lambda: read_attempts(self.run))
        step = max((attempt.start_step for attempt in attempts), default=0)
        self.failures = [*(known for known in self.failures if known[0] == step), (step, failure)]

    def _ending(self, how: str) -> str:
        return (
            f"The run failed {how}. Its checkpoints are intact: mend the cause, then the same command resumes the run "
            f"in {self.run.uri}."
        )


def cause_of(error: BaseException) -> BaseException:
    """What was raised, out of the wrappers of Ray and Ray Train."""
    return list(_unwrapped(error))[-1]


def _unwrapped(error: BaseException) -> Iterator[BaseException]:
    """The error, and what it wraps, outermost first."""
    inner: object = error
    while isinstance(inner, BaseException):
        yield inner
        if isinstance(inner, RayTaskError):
            inner = inner.cause
        elif isinstance(inner, ControllerError):
            inner = inner.controller_failure
        else:
            inner = getattr(inner, "health_check_failure", None)  # Ray Train's name for why a worker does not answer


def _notes(error: BaseException) -> list[str]:
    return [note for each in _unwrapped(error) for note in getattr(each, "__notes__", [])]


def _described(error: BaseException, notes: Sequence[str]) -> str:
    """The step, if a note knows it, and the error in one line."""
    step = next((note for note in notes if note.startswith(AT_STEP)), "")
    line = (str(error).strip().splitlines() or [""])[0]
    return f"{step} with {type(error).__name__}: {line}".removeprefix(" with ")
