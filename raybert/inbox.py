"""The inbox: events on their way from the workers to the driver, and a handle of the actor that runs the attempts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from raybert.events import Event


class Inbox:
    """An actor beside the driver, which empties it."""

    def __init__(self) -> None:
        self._events: list[Event] = []
        self._controller: Any = None

    def put(self, event: Event) -> None:
        self._events.append(event)

    def take(self) -> list[Event]:
        events, self._events = self._events, []
        return events

    def greet(self, controller: Any) -> None:
        self._controller = controller

    def controller(self) -> Any:
        """Ray Train's controller, if it has started."""
        return self._controller


@dataclass(frozen=True)
class Post:
    """Sends events to an inbox, without waiting."""

    inbox: Any

    def __call__(self, event: Event) -> None:
        self.inbox.put.remote(event)

    def greet(self, controller: Any) -> None:
        """Give the driver a handle of Ray Train's controller."""
        self.inbox.greet.remote(controller)
