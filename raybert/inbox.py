"""The inbox: events on their way from the workers to the driver."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from raybert.events import Event


class Inbox:
    """An actor beside the driver, which empties it."""

    def __init__(self) -> None:
        self._events: list[Event] = []

    def put(self, event: Event) -> None:
        self._events.append(event)

    def take(self) -> list[Event]:
        events, self._events = self._events, []
        return events


@dataclass(frozen=True)
class Post:
    """Sends events to an inbox, without waiting."""

    inbox: Any

    def __call__(self, event: Event) -> None:
        self.inbox.put.remote(event)
