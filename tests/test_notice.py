"""The notice agent, against servers that speak as the clouds' metadata services do, and a real cluster."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import ray
from nodes import RUN, cluster, descendants, ray_head, wait_until
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raybert import notice
from raybert.notice import CLOUDS, Aws, Azure, Google, MetadataError, Notice, of_aws, of_azure, of_google, watch

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
SOON = NOW + timedelta(minutes=2)
EVENT = {
    "EventId": "602d9444-d2cd-49c7-8624-8643e7171297",
    "EventStatus": "Scheduled",
    "EventType": "Preempt",
    "ResourceType": "VirtualMachine",
    "Resources": ["raybert-worker-0"],
    "NotBefore": "Sun, 01 Mar 2026 12:02:00 GMT",
    "Description": "",
    "EventSource": "Platform",
}


def document(*events):
    return json.dumps({"DocumentIncarnation": 2, "Events": list(events)})


# What is announced.


@pytest.mark.parametrize("action", ["terminate", "stop", "hibernate"])
def test_aws_names_what_and_when(action):
    text = json.dumps({"action": action, "time": "2026-03-01T12:02:00Z"})
    assert of_aws(text) == Notice(f"AWS: {action}", SOON)


@pytest.mark.parametrize("written", ["2026-03-01T12:02:00", "2026-03-01T13:02:00+01:00"])
def test_a_deadline_is_in_utc(written):
    found = of_aws(json.dumps({"action": "stop", "time": written})).deadline
    assert found == SOON and found.utcoffset() == timedelta(0)


@pytest.mark.parametrize(
    ("preempted", "maintenance", "left_s"),
    [
        ("FALSE", "NONE", None),
        ("FALSE", "MIGRATE_ON_HOST_MAINTENANCE", None),
        ("FALSE", "TERMINATE_ON_HOST_MAINTENANCE", 3600),
        ("TRUE", "NONE", 30),
        ("TRUE", "TERMINATE_ON_HOST_MAINTENANCE", 30),
    ],
)
def test_google_names_what_and_we_when(preempted, maintenance, left_s):
    found = of_google(preempted, maintenance, NOW)
    assert (found and (found.deadline - NOW).total_seconds()) == left_s


@pytest.mark.parametrize(
    ("changes", "deadline"),
    [
        ({}, SOON),
        ({"EventType": "Terminate"}, SOON),
        ({"EventType": "Redeploy"}, SOON),
        ({"EventType": "Reboot"}, SOON),
        ({"EventType": "Freeze"}, None),
        ({"EventStatus": "Started", "NotBefore": ""}, NOW),
        ({"EventType": "Reboot", "EventStatus": "Started", "NotBefore": ""}, None),
        ({"Resources": ["raybert-worker-1"]}, None),
        ({"Resources": ["raybert-worker-1", "RayBERT-worker-0"]}, SOON),
        ({"Resources": []}, None),
    ],
)
def test_azure_events_that_end_this_machine(changes, deadline):
    found = of_azure(document({**EVENT, **changes}), "raybert-worker-0", NOW)
    assert (found and found.deadline) == deadline


def test_the_first_of_azures_events_counts():
    later = {**EVENT, "EventType": "Redeploy", "NotBefore": "Sun, 01 Mar 2026 12:09:00 GMT"}
    for events in ((EVENT, later), (later, EVENT)):
        assert of_azure(document(*events), "raybert-worker-0", NOW) == Notice("Azure: Preempt", SOON)
    assert of_azure(document(), "raybert-worker-0", NOW) is None


@pytest.mark.parametrize(
    "text", ["", "{", "null", "[]", "7", "{}", '{"action": "stop", "time": null}', '{"action": "stop", "time": "soon"}']
)
def test_malformed_replies_are_named(text):
    with pytest.raises(MetadataError, match="cannot be read"):
        of_aws(text)
    with pytest.raises(MetadataError, match="cannot be read"):
        of_azure(text, "raybert-worker-0", NOW)
    with pytest.raises(MetadataError, match="the metadata service says"):
        of_google(text, "NONE", NOW)


@pytest.mark.parametrize("key", ["EventType", "EventStatus", "Resources", "NotBefore"])
def test_events_that_lack_something_are_named(key):
    event = {name: value for name, value in EVENT.items() if name != key}
    with pytest.raises(MetadataError, match=key):
        of_azure(document(event), "raybert-worker-0", NOW)


@pytest.mark.parametrize(
    ("key", "value"), [("Resources", 7), ("Resources", [None]), ("NotBefore", 7), ("NotBefore", "x")]
)
def test_events_that_say_something_else_are_named(key, value):
    with pytest.raises(MetadataError, match="cannot be read"):
        of_azure(document({**EVENT, key: value}), "raybert-worker-0", NOW)


# How it is asked for.


class Service(ThreadingHTTPServer):
    """A metadata service, as the clouds document theirs; `end` is what it announces, `trouble` what it does instead."""

    def __init__(self, cloud):
        self.cloud, self.end, self.trouble, self.asked, self.tokens, self.released = cloud, None, None, 0, [], None
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"

    def reply(self, method, path, headers):
        """Status, text and headers."""
        return {"aws": self.aws, "gcp": self.google, "azure": self.azure}[self.cloud](method, path, headers)

    def aws(self, method, path, headers):
        if path == "/latest/api/token":
            if method != "PUT":
                return 405, "", {}
            if not 1 <= int(headers.get("X-aws-ec2-metadata-token-ttl-seconds", 0)) <= 21600:
                return 400, "", {}
            self.tokens.append(f"token-{len(self.tokens)}==")
            return 200, self.tokens[-1], {}
        if headers.get("X-aws-ec2-metadata-token") not in self.tokens[-1:]:
            return 401, "", {}
        if path == "/latest/meta-data/events/recommendations/rebalance":
            return 200, '{"noticeTime": "2026-03-01T12:00:00Z"}', {}
        if path != "/latest/meta-data/spot/instance-action" or self.end is None:
            return 404, "", {}
        return 200, json.dumps({"action": "terminate", "time": f"{self.end:%Y-%m-%dT%H:%M:%SZ}"}), {}

    def google(self, method, path, headers):
        values = {"preempted": "TRUE" if self.end else "FALSE", "maintenance-event": "NONE"}
        folder, _, key = path.rpartition("/")
        if headers.get("Metadata-Flavor") != "Google":
            return 403, "", {}
        if method != "GET" or folder != "/computeMetadata/v1/instance" or key not in values:
            return 404, "", {"Metadata-Flavor": "Google"}
        return 200, values[key], {"Metadata-Flavor": "Google"}

    def azure(self, method, path, headers):
        if headers.get("Metadata") != "true" or "X-Forwarded-For" in headers:
            return 400, "", {}
        if path == "/metadata/instance/compute/name?api-version=2020-07-01&format=text":
            return 200, "raybert-worker-0", {}
        if method != "GET" or path != "/metadata/scheduledevents?api-version=2020-07-01":
            return 404, "", {}
        others = {**EVENT, "Resources": ["raybert-worker-1"]}
        ours = {**EVENT, "NotBefore": self.end and format_datetime(self.end, usegmt=True)}
        return 200, document(others, *([ours] if self.end else [])), {}


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.asked += 1
        status, text, headers = self.server.reply(self.command, self.path, self.headers)
        if self.server.trouble == "stall":
            self.server.released.wait()
            return
        if self.server.trouble == "503":
            status, text = 503, ""
        if self.server.trouble == "malformed":
            status, text = 200, '{"Events": {"no'
        if self.server.trouble == "binary":
            status, text = 200, "\udcff"
        body = text.encode("utf-8", "surrogateescape")
        if self.server.trouble == "cut off":
            status, headers = 200, {**headers, "Content-Length": str(len(body) + 10)}
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    do_PUT = do_GET

    def log_message(self, *arguments):
        pass


@contextmanager
def serving(cloud):
    service = Service(cloud)
    service.released = threading.Event()
    thread = threading.Thread(target=service.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield service
    finally:
        service.released.set()
        service.shutdown()
        thread.join()
        service.server_close()


@pytest.fixture(params=["aws", "gcp", "azure"])
def service(request):
    with serving(request.param) as found:
        yield found


@pytest.fixture
def quick(monkeypatch):
    """Stalls are given up soon."""
    monkeypatch.setattr(notice, "TIMEOUT_S", 0.3)


@pytest.mark.parametrize("kind", ["own", "auto"])
def test_a_notice_is_seen_when_it_comes(service, kind):
    cloud = CLOUDS[service.cloud if kind == "own" else kind](service.url)
    assert cloud.read() is None
    assert isinstance(cloud if kind == "own" else cloud._candidates[0], CLOUDS[service.cloud])
    assert cloud.read() is None
    service.end = datetime.now(UTC).replace(microsecond=0) + timedelta(seconds=30)
    found = cloud.read()
    assert abs(found.deadline - service.end) <= timedelta(seconds=1 if service.cloud == "gcp" else 0)


def test_a_notice_that_is_there_at_the_start_is_seen(service):
    service.end = datetime.now(UTC)
    assert CLOUDS["auto"](service.url).read() is not None


def test_another_clouds_service_is_not_taken_for_ones_own(service):
    for name in {"aws", "gcp", "azure"} - {service.cloud}:
        with pytest.raises(MetadataError):
            CLOUDS[name](service.url).read()


def test_proxies_are_not_asked(service, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    assert CLOUDS[service.cloud](service.url).read() is None


def test_a_token_serves_until_it_is_refused():
    with serving("aws") as service:
        cloud = Aws(service.url)
        for _ in range(3):
            cloud.read()
        assert len(service.tokens) == 1
        service.tokens.append("expired: the next is given out anew")
        service.end = NOW
        assert cloud.read() == Notice("AWS: terminate", NOW)
        assert len(service.tokens) == 3


def test_a_token_that_is_never_taken_is_an_error():
    with serving("aws") as service:
        cloud, service.aws = Aws(service.url), lambda *_: (401, "", {})
        with pytest.raises(MetadataError, match="status 401"):
            cloud.read()


@pytest.mark.parametrize("trouble", ["503", "stall", "malformed", "binary", "cut off"])
def test_trouble_is_told_once_and_survived(service, trouble, quick):
    """And that it is over, once; the notice that comes then is seen."""
    service.trouble, lines, found = trouble, [], []
    cloud = CLOUDS[service.cloud](service.url)
    thread = threading.Thread(target=lambda: found.append(watch(cloud, 0.01, lines.append)))
    thread.start()
    wait(lambda: lines and service.asked >= 3)
    asked = service.asked
    service.trouble = None
    wait(lambda: len(lines) > 1 and service.asked > asked + 3)
    service.trouble = trouble
    wait(lambda: len(lines) > 2)
    service.end = datetime.now(UTC)
    service.trouble = None
    thread.join(10)
    assert [line.startswith("warning") for line in lines] == [True, False, True, False] and len(found) == 1


def wait(condition):
    deadline_s = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


@pytest.mark.parametrize("cloud", CLOUDS)
def test_nobody_there_is_an_error(cloud):
    with serving("aws") as service:
        url = service.url
    with pytest.raises(MetadataError, match="answer"):
        CLOUDS[cloud](url).read()


def test_google_is_known_by_its_header():
    with serving("gcp") as service:
        cloud, service.google = Google(service.url), lambda *_: (200, "TRUE", {})
        with pytest.raises(MetadataError, match="not Google's"):
            cloud.read()


def test_azure_asks_for_its_name_once():
    with serving("azure") as service:
        cloud = Azure(service.url)
        for _ in range(3):
            cloud.read()
        assert service.asked == 4


# Who is drained.


@contextmanager
def watching(service, *arguments, environment=None):
    """`run.py notice`, as it is started on a node."""
    command = [sys.executable, str(RUN), "notice", "--endpoint", service.url, "--interval", "0.1", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    process.read_output = lambda: process.stdout.read() if process.poll() is not None else "it runs"
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


@ray.remote(num_cpus=1)
class Busy:
    """Keeps a node alive that drains: an idle one goes at once."""

    def here(self):
        return ray.get_runtime_context().get_node_id()


def test_the_right_node_is_drained_with_the_clouds_deadline():
    with serving("aws") as service, cluster(2) as nodes:
        ray.init(nodes.address, log_to_driver=False)
        try:
            check_refused(service, nodes)
            check_drained(service, nodes)
        finally:
            ray.shutdown()


def check_refused(service, nodes):
    """Three nodes are on this machine, and maybe others' too."""
    with watching(service) as process:
        assert process.wait(60) == 1
        output = process.read_output()
    assert "--node-id" in output and all(node.node_id in output for node in nodes.list_all_nodes())


def check_drained(service, nodes):
    ours, other = (node.node_id for node in nodes.worker_nodes)
    actors = [
        Busy.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote()
        for node in (ours, other)
    ]
    assert ray.get([actor.here.remote() for actor in actors]) == [ours, other]
    state = ray._private.state.state
    with watching(service, "--node-id", ours, "--address", nodes.address) as process:
        wait_until(lambda: service.asked > 4, process)
        assert state.get_draining_nodes() == {}
        service.end = datetime.now(UTC).replace(microsecond=0) + timedelta(seconds=60)
        assert process.wait(30) == 0, process.read_output()
        lines = process.read_output().splitlines()
    wait(state.get_draining_nodes)
    assert state.get_draining_nodes() == {ours: int(service.end.timestamp() * 1000)}
    assert [line for line in lines if f"node {ours} is drained" in line] == lines[-1:] and len(lines) == 3
    assert {node["NodeID"] for node in ray.nodes() if node["Alive"]} >= {ours, other}


def of_kind(head, name):
    """The head's process of a kind: pid and command line."""
    found = [(pid, command.split("\0")) for pid, command in descendants(head.pid).items()]
    return [(pid, command) for pid, command in found if command[0].endswith(f"/{name}")]


def test_a_head_that_is_away_is_told_when_it_is_back_and_sees_the_token():
    with serving("gcp") as service, ray_head(1) as head:
        ((server, _),), ((_, raylet),) = of_kind(head, "gcs_server"), of_kind(head, "raylet")
        (node,) = [word.removeprefix("--node_id=") for word in raylet if word.startswith("--node_id=")]
        arguments = ["--node-id", node, "--address", head.address, "--cloud", "gcp"]
        with watching(service, *arguments, environment=head.environment) as process:
            wait_until(lambda: service.asked > 4, process)
            os.kill(server, signal.SIGSTOP)
            service.end = True
            time.sleep(7)
            assert of_kind(head, "raylet")
            os.kill(server, signal.SIGCONT)
            assert process.wait(30) == 0, process.read_output()
            assert f"node {node} is drained" in process.read_output()
        wait(lambda: not of_kind(head, "raylet"))  # it had nothing to do


@pytest.mark.parametrize(
    ("arguments", "remedy"),
    [
        (["--node-id", "0xfeed"], "ray list nodes"),
        (["--endpoint", "169.254.169.254"], "http://"),
        (["--interval", "0"], "above 0"),
        (["--cloud", "oracle"], "aws"),
    ],
)
def test_refusals_name_the_remedy(arguments, remedy):
    found = subprocess.run([sys.executable, str(RUN), "notice", *arguments], capture_output=True, text=True)
    assert found.returncode and remedy in found.stderr and "Traceback" not in found.stderr
