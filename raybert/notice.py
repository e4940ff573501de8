"""Notices: what AWS, Google Cloud and Azure tell a machine of its end, by their metadata services.

What a reply means is decided by pure functions, `of_...`; a cloud's class asks. No Ray here: `agent` acts.
"""

from __future__ import annotations

import json
import re
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from email.message import Message
from email.utils import parsedate_to_datetime
from http.client import HTTPException
from typing import Protocol
from urllib.error import HTTPError

HOST = "http://169.254.169.254"  # of all three; as a number, because asking for Google's name could hang in DNS
TIMEOUT_S = 2.0  # of each request
AWS_TOKEN_TTL_S = 21_600  # the longest that AWS gives
PREEMPTION_NOTICE = timedelta(seconds=30)  # Google's, which names no time
MAINTENANCE_NOTICE = timedelta(hours=1)  # Google's to machines with GPUs; others have 60 s
ENDING = {"Preempt", "Terminate", "Redeploy", "Reboot"}  # Azure's events that end processes; Freeze only pauses them
AZURE_VERSION = "2020-07-01"

_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # whatever the environment's proxies are


class MetadataError(Exception):
    """The metadata service did not answer, or not as documented; it may do so the next time."""


@dataclass(frozen=True)
class Notice:
    """The cloud will take this machine.

    Args:
        what: the cloud's own words.
        deadline: in UTC; from then on the machine may be gone.
    """

    what: str
    deadline: datetime


@dataclass(frozen=True)
class Reply:
    """Of a metadata service; of errors the text is left out."""

    status: int
    text: str
    headers: Message

    def content(self) -> str:
        """Raises:
        MetadataError: the status is not 200.
        """
        if self.status != 200:
            raise MetadataError(f"the metadata service answers with status {self.status}")
        return self.text


class Cloud(Protocol):
    """Whose metadata service it is."""

    name: str

    def read(self) -> Notice | None:
        """Ask once.

        Raises:
            MetadataError: there is no answer, or none that can be read.
        """


def of_aws(text: str) -> Notice:
    """A notice of `spot/instance-action`: terminate, stop or hibernate, and when, about.

    https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/spot-instance-termination-notices.html: two minutes ahead, but
    hibernation begins at once.

    Raises:
        MetadataError: the text is not such a notice.
    """
    with _reading(text):
        found = json.loads(text)
        time_ = datetime.fromisoformat(found["time"])
        return Notice(f"AWS: {found['action']}", time_.replace(tzinfo=time_.tzinfo or UTC).astimezone(UTC))


def of_google(preempted: str, maintenance: str, seen_at: datetime) -> Notice | None:
    """What `instance/preempted` and `instance/maintenance-event` say; neither names a time: it counts from `seen_at`.

    https://cloud.google.com/compute/docs/instances/create-use-spot#handle-preemption: 30 s.
    https://cloud.google.com/compute/docs/gpus/gpu-host-maintenance: an hour for machines with GPUs, which cannot be
    moved while they run.

    Raises:
        MetadataError: a text is not what Google documents.
    """
    known = {"NONE", "MIGRATE_ON_HOST_MAINTENANCE", "TERMINATE_ON_HOST_MAINTENANCE"}
    if preempted not in ("TRUE", "FALSE") or maintenance not in known:
        raise MetadataError(f"the metadata service says {preempted[:200]!r} and {maintenance[:200]!r}")
    if preempted == "TRUE":
        return Notice("Google Cloud: preempted", seen_at + PREEMPTION_NOTICE)
    if maintenance == "TERMINATE_ON_HOST_MAINTENANCE":
        return Notice(f"Google Cloud: {maintenance}", seen_at + MAINTENANCE_NOTICE)
    return None


def of_azure(text: str, machine: str, seen_at: datetime) -> Notice | None:
    """The first end that `scheduledevents` announces for a machine; the document also has other machines' events.

    https://learn.microsoft.com/azure/virtual-machines/linux/scheduled-events: Preempt comes 30 s ahead or more, the
    others minutes. An event that has started has no time, and is taken as due at `seen_at`.

    Raises:
        MetadataError: the text is no document of scheduled events.
    """
    with _reading(text):
        events = [event for event in json.loads(text)["Events"] if _ends(event, machine)]
        notices = [Notice(f"Azure: {event['EventType']}", _not_before(event) or seen_at) for event in events]
        return min(notices, key=lambda notice: notice.deadline, default=None)


def _ends(event: dict[str, str], machine: str) -> bool:
    if event["EventType"] not in ENDING or machine.casefold() not in {name.casefold() for name in event["Resources"]}:
        return False
    # A reboot or a move stays listed as started while the machine comes back.
    return event["EventStatus"] != "Started" or event["EventType"] in ("Preempt", "Terminate")


def _not_before(event: dict[str, str]) -> datetime | None:
    text = event["NotBefore"]
    return parsedate_to_datetime(text).astimezone(UTC) if text else None


@contextmanager
def _reading(text: str) -> Iterator[None]:
    """What fails in the context does so because of the text."""
    try:
        yield
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise MetadataError(f"the metadata service says {text[:200]!r}, which cannot be read: {error!r}") from error


def _word(text: str) -> str:
    """The text, which is kept and so must be what it should: a token or a name.

    Raises:
        MetadataError: it is neither.
    """
    if not re.fullmatch(r"[\w.=+/-]+", text, re.ASCII):
        raise MetadataError(f"the metadata service says {text[:200]!r}, which is neither a token nor a name")
    return text


def ask(url: str, headers: dict[str, str], method: str = "GET") -> Reply:
    """One request, without proxies, within `TIMEOUT_S` for each wait.

    Raises:
        MetadataError: there is no reply; one of any status is returned.
    """
    try:
        request = urllib.request.Request(url, headers=headers, method=method)
        with _OPENER.open(request, timeout=TIMEOUT_S) as reply:
            return Reply(reply.status, reply.read().decode().strip(), reply.headers)
    except HTTPError as error:
        error.close()
        return Reply(error.code, "", error.headers)
    except (OSError, HTTPException, ValueError) as error:
        raise MetadataError(f"the metadata service does not answer at {url}: {error}") from error


class Aws:
    """AWS: `spot/instance-action`, behind a token (IMDSv2) that is renewed when it is refused.

    https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/instance-metadata-v2-how-it-works.html. A rebalance
    recommendation (`events/recommendations/rebalance`) is not acted on: it announces a risk, and no end.
    """

    name = "AWS"

    def __init__(self, endpoint: str) -> None:
        self.endpoint = endpoint
        self._token = ""

    def read(self) -> Notice | None:
        reply = self._action()
        if reply.status == 401:
            self._token = ""
            reply = self._action()
        return None if reply.status == 404 else of_aws(reply.content())

    def _action(self) -> Reply:
        if not self._token:
            ttl = {"X-aws-ec2-metadata-token-ttl-seconds": str(AWS_TOKEN_TTL_S)}
            self._token = _word(ask(f"{self.endpoint}/latest/api/token", ttl, "PUT").content())
        headers = {"X-aws-ec2-metadata-token": self._token}
        return ask(f"{self.endpoint}/latest/meta-data/spot/instance-action", headers)


class Google:
    """Google Cloud: `instance/preempted` and `instance/maintenance-event`.

    https://cloud.google.com/compute/docs/metadata/querying-metadata. Asked for again and again like the others, not
    with `wait_for_change`, which would tell nothing of a service that has died.
    """

    name = "Google Cloud"

    def __init__(self, endpoint: str) -> None:
        self.endpoint = endpoint

    def read(self) -> Notice | None:
        preempted, maintenance = self._value("preempted"), self._value("maintenance-event")
        return of_google(preempted, maintenance, datetime.now(UTC))

    def _value(self, key: str) -> str:
        reply = ask(f"{self.endpoint}/computeMetadata/v1/instance/{key}", {"Metadata-Flavor": "Google"})
        if reply.headers.get("Metadata-Flavor") != "Google":
            raise MetadataError("what answers is not Google's metadata service")
        return reply.content()


class Azure:
    """Azure: `scheduledevents` for this machine's name; nothing is approved, which would only hasten the end.

    https://learn.microsoft.com/azure/virtual-machines/linux/scheduled-events: asks to be polled once a second. The
    first answer on a machine may take two minutes.
    """

    name = "Azure"

    def __init__(self, endpoint: str) -> None:
        self.endpoint = endpoint
        self._machine = ""

    def read(self) -> Notice | None:
        if not self._machine:
            self._machine = _word(self._get(f"instance/compute/name?api-version={AZURE_VERSION}&format=text"))
        return of_azure(self._get(f"scheduledevents?api-version={AZURE_VERSION}"), self._machine, datetime.now(UTC))

    def _get(self, path: str) -> str:
        return ask(f"{self.endpoint}/metadata/{path}", {"Metadata": "true"}).content()


class Auto:
    """The cloud that answers as itself, from then on that one."""

    name = "a cloud"

    def __init__(self, endpoint: str) -> None:
        self._candidates: list[Cloud] = [Aws(endpoint), Google(endpoint), Azure(endpoint)]

    def read(self) -> Notice | None:
        if len(self._candidates) == 1:
            return self._candidates[0].read()
        for cloud in self._candidates:
            with suppress(MetadataError):
                notice = cloud.read()
                self._candidates, self.name = [cloud], cloud.name
                return notice
        names = ", ".join(cloud.name for cloud in self._candidates)
        raise MetadataError(f"no metadata service of {names} answers; on a machine of one, name it with --cloud")


CLOUDS: dict[str, Callable[[str], Cloud]] = {"auto": Auto, "aws": Aws, "gcp": Google, "azure": Azure}


def watch(cloud: Cloud, interval_s: float, tell: Callable[[str], None]) -> Notice:
    """Ask until there is a notice, however long the metadata service fails meanwhile.

    Args:
        cloud: to ask.
        interval_s: seconds between two answers.
        tell: takes a line when the service begins to answer, and when it ceases to.
    """
    answers = None
    while True:
        try:
            notice = cloud.read()
        except MetadataError as error:
            if answers is not False:
                tell(f"warning: {error}. Asking on, every {interval_s:g} s.")
            answers = False
        else:
            if answers is not True:
                tell(f"the metadata service of {cloud.name} answers")
            answers = True
            if notice is not None:
                return notice
        time.sleep(interval_s)
