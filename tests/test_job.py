"""Jobs as the README submits them, to a real head that asks for a token."""

import json
import secrets
import shutil
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from helpers import SAMPLE_FILE
from nodes import ray_head

from raybert.history import read_attempts, read_history
from raybert.manifest import newest_checkpoint
from raybert.storage import Directory

ROOT = Path(__file__).parents[1]
MAX_UPLOAD_BYTES = 12_000_000  # unpacked, of which the bundled sample is 8.5 MB
SETTINGS = {
    "data.input_files": SAMPLE_FILE,
    "model.hidden_size": 32,
    "training.num_steps": 20_000,
    "training.global_batch_size": 8,
    "optimizer.warmup_steps": 5,
    "training.log_every_steps": 5,
    "checkpoint.every_steps": 20,
    "evaluation.input_files": "",
}


OF_THE_USER = {"env_vars": {"MALLOC_TOP_PAD_": "1048576"}}  # raybert sets this too: Ray takes no second value


@pytest.fixture(scope="module")
def head():
    secret = {"AWS_SECRET_ACCESS_KEY": secrets.token_hex(32)}
    with ray_head(num_cpus=4, prepare=lambda head: head.environment.update(secret)) as head:
        yield head


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A user's checkout, with what lies about in one; its code says where it runs."""
    path = tmp_path_factory.mktemp("checkout") / "raybert"
    shutil.copytree(ROOT, path, ignore=shutil.ignore_patterns(".git", ".venv", "runs", "__pycache__", ".*_cache"))
    for ballast in (".venv/lib/torch", "runs/sample/checkpoints/weights", ".git/objects/pack"):
        (path / ballast).parent.mkdir(parents=True)
        (path / ballast).write_bytes(bytes(1 << 20))
    with (path / "raybert" / "launch.py").open("a") as launch:
        launch.write("\nprint('from', __file__)\n")
    return path


class Job:
    """`ray job submit --working-dir . -- python run.py train --config sample ...`"""

    def __init__(self, head, checkout, name, **settings):
        self.head, self.name = head, name
        flags = [f"--{key}={value}" for key, value in (SETTINGS | settings).items()]
        entrypoint = ["python", "run.py", "train", "--config", "sample", *flags]
        submit = ["job", "submit", "--no-wait", "--submission-id", name, "--working-dir", checkout]
        submitted = head.ray(*submit, "--runtime-env-json", json.dumps(OF_THE_USER), "--", *entrypoint)
        assert submitted.returncode == 0, submitted.stdout + submitted.stderr

    def _ask(self, path=""):
        with ask(self.head, f"/api/jobs/{self.name}{path}", token(self.head)) as answer:
            return json.load(answer)

    def logs(self):
        """What the job has printed, as `ray job logs` asks for it."""
        return self._ask("/logs")["logs"]

    def status(self):
        """PENDING, RUNNING, STOPPED, SUCCEEDED or FAILED, and what is said of it."""
        details = self._ask()
        return details["status"], details["message"]

    def wait(self, text="", timeout_s=150):
        """Wait until the log has a text, or for the end; gives the log."""
        deadline_s = time.monotonic() + timeout_s
        while time.monotonic() < deadline_s:
            status, logs = self.status()[0], self.logs()
            if (text and text in logs) or status in ("STOPPED", "SUCCEEDED", "FAILED"):
                return logs
            time.sleep(0.5)
        raise AssertionError(f"timed out:\n{self.logs()}")


def token(head):
    return Path(head.environment["RAY_AUTH_TOKEN_PATH"]).read_text()


def ask(head, path, token=None, content=None, place=None):
    """An HTTP request, as anybody who reaches the port may send it."""
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {token}"} if token else {})
    body = None if content is None else json.dumps(content).encode()
    request = urllib.request.Request(f"http://{place or head.dashboard}{path}", body, headers)
    return urllib.request.urlopen(request, timeout=20)


# Closed doors


@pytest.mark.parametrize("given, code", [(None, 401), ("a" * 64, 403)], ids=["no token", "a wrong one"])
@pytest.mark.parametrize("door", ["dashboard", "agent"])
def test_a_job_without_the_token_is_refused(head, tmp_path, given, code, door):
    path, place = {
        "dashboard": ("/api/jobs/", head.dashboard),
        "agent": ("/api/job_agent/jobs/", head.agent),
    }[door]
    job = {"entrypoint": f"touch {tmp_path}/entered", "submission_id": f"intruder-{door}-{code}"}
    with pytest.raises(urllib.error.HTTPError) as refused:
        ask(head, path, given, job, place)
    with refused.value as answer:
        assert answer.code == code
    assert b"intruder" not in ask(head, "/api/jobs/", token(head)).read()
    assert not (tmp_path / "entered").exists()


def test_the_job_client_without_the_token_is_refused(head, checkout):
    submitted = head.ray("job", "submit", "--", "true", environment=head.open_environment)
    assert submitted.returncode != 0
    assert "Missing authentication token" in submitted.stderr


# Jobs


def test_a_stopped_job_is_resumed_by_the_same_command_and_no_secret_is_written(head, checkout, tmp_path):
    run = Directory(str(tmp_path / "run"))
    job = Job(head, checkout, "stopped", run_dir=run.path)
    job.wait("checkpoint step-")
    assert head.ray("job", "stop", "stopped").returncode == 0
    logs = job.wait()
    assert job.status()[0] == "STOPPED"
    assert f"Interrupted; the same command resumes the run in {run.path}." in logs
    (stopped,) = read_attempts(run)

    reached = newest_checkpoint(run, print).step
    num_steps = reached + 50
    logs = Job(head, checkout, "resumed", run_dir=run.path, **{"training.num_steps": num_steps}).wait()
    assert f"attempt 2: 2 workers, from step {reached}" in logs
    assert f"step {num_steps}/{num_steps}  loss " in logs
    first, second = read_attempts(run)
    assert first == stopped and 0 < second.start_step == reached
    newest = (run / "checkpoints").names()[-1]
    assert [record.step for record in read_history(run, newest)] == list(range(num_steps))
    for place in (Path(run.path), head.directory / "ray" / "session_latest" / "logs"):
        contents = [path.read_bytes() for path in place.rglob("*") if path.is_file()]
        assert len(contents) > 5
        for secret in (token(head), head.environment["AWS_SECRET_ACCESS_KEY"]):
            assert not any(secret.encode() in content for content in contents)


UPLOADED = {"run.py", "raybert", "pyproject.toml", "constraints.txt", "LICENSE", ".gitignore", ".rayignore", "runs"}


def test_what_is_uploaded_is_what_runs_and_is_small(head, checkout):
    logs = Job(head, checkout, "uploaded", run_dir="runs/lost", **{"data.input_files": "none"}).wait()
    (package,) = {Path(line.split()[1]).parents[1] for line in logs.splitlines() if line.startswith("from ")}
    assert package.name.startswith("_ray_pkg_")
    assert {path.name for path in package.iterdir() if path.suffix != ".md"} <= UPLOADED
    files = [path for path in package.rglob("*") if path.suffix not in (".pyc", ".nbi", ".nbc")]
    assert sum(path.stat().st_size for path in files if path.is_file()) < MAX_UPLOAD_BYTES
    assert f"warning: run_dir {package}/runs/lost lies in the job's own copy of its working directory" in logs


@pytest.mark.parametrize(
    "settings, message",
    [
        (
            {"data.input_files": "none-*.tfrecord"},
            "raybert: error: data.input_files: 'none-*.tfrecord' matches no",
        ),
        ({"optimizer.learning_rate": 1e30}, "rollbacks (guard.max_rollbacks is 3): training has diverged; lower"),
    ],
    ids=["in the driver", "in a worker"],
)
def test_a_failed_run_fails_the_job_with_its_message_last(head, checkout, tmp_path, settings, message):
    settings = {"cluster.num_workers": 1, "run_dir": tmp_path / "run", **settings}
    job = Job(head, checkout, f"failed-{list(settings)[-1]}", **settings)
    logs = job.wait()
    status, said = job.status()
    assert status == "FAILED"
    assert message in logs.rstrip().splitlines()[-1]
    assert message in said.rstrip().splitlines()[-1]
