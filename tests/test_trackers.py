"""What Weights & Biases and MLflow keep of a run, in files: each step once, one run however often it is continued."""

import importlib.util
import json
import os
import struct
from dataclasses import replace
from pathlib import Path

import pytest
from helpers import tiny_config, write_samples
from nodes import free_ports

import raybert
from raybert.checks import check_config
from raybert.config import CheckpointConfig, LoggingConfig
from raybert.errors import UserError
from raybert.events import Event
from raybert.listener import Listeners
from raybert.manifest import newest_checkpoint
from raybert.telemetry import TRAIN
from raybert.trackers import MlflowTracker, WandbTracker, check_trackers, trackers

mlflow = pytest.importorskip("mlflow")
wandb = pytest.importorskip("wandb")
KEY = "a" * 40


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    for name in [name for name in os.environ if name.startswith(("WANDB_", "MLFLOW_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("HOME", str(tmp_path))  # where there is no key
    monkeypatch.chdir(tmp_path)
    wandb.teardown()
    yield
    wandb.teardown()


@pytest.fixture
def config(tmp_path):
    logging = {
        "logging.wandb_project": "bert",
        "logging.mlflow_experiment": "bert",
        "logging.mlflow_tracking_uri": f"sqlite:///{tmp_path}/mlflow.db",
    }
    return tiny_config(tmp_path / "run", tmp_path / "samples.tfrecord", **logging)


def attempt(number, step, world_size=2):
    return Event("attempt", step, "", {"number": number, "world_size": world_size})


def train(step, loss):
    return Event("train", step, metrics={"training_loss": loss})


# An attempt fails after step 30 and the next begins at step 20; then another driver goes on from step 30.
FIRST = [
    attempt(1, 0),
    train(10, 1.0),
    train(20, 2.0),
    Event("eval", 20, metrics={"lm_example_loss": 0.5}),
    train(30, 3.0),
    Event("failure", text="a worker died"),
    Event("resize", text="resize: from 2 to 1 workers"),
    attempt(2, 20, 1),
    Event("eval", 20, metrics={"lm_example_loss": 0.6}),
    train(30, 3.3),
    train(40, 4.0),
    Event("end", text="interrupted"),
]
SECOND = [attempt(3, 30), train(40, 4.4), train(50, 5.0), Event("end", text="finished")]
LOSSES = [(10, 1.0), (20, 2.0), (30, 3.0), (40, 4.0), (50, 5.0)]
NOTES = {
    "attempt 1": "2 workers, from step 0",
    "attempt 2": "1 worker, from step 20",
    "attempt 3": "2 workers, from step 30",
}
TOLD = ["a worker died", "resize: from 2 to 1 workers"]


def heard(run, config, make):
    """What both drivers' trackers are told; the second finds in the run directory what the first has logged."""
    for events, logged in [(FIRST, []), (SECOND, [train(step, 0) for step in (10, 20, 30, 40)])]:
        rows = [json.dumps({"kind": TRAIN, "step": event.step}) + "\n" for event in logged]
        run.write("metrics.jsonl", "".join(rows).encode())
        tracker = make(config, run)
        for event in events:
            tracker(event)


def mlflow_runs(config):
    client = mlflow.MlflowClient(config.logging.mlflow_tracking_uri)
    return client, client.search_runs([client.get_experiment_by_name("bert").experiment_id])


def wandb_records(run):
    """Records of every offline log of a run, oldest first: files of LevelDB's log format behind a header of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    for path in sorted(Path(run.path).glob("wandb/offline-run-*/*.wandb")):
        content, offset, parts = path.read_bytes(), 7, b""
        while offset + 7 <= len(content):
            if 32768 - offset % 32768 < 7:
                offset += 32768 - offset % 32768
                continue
            _, size, kind = struct.unpack("<IHB", content[offset : offset + 7])
            parts += content[offset + 7 : offset + 7 + size]
            offset += 7 + size
            if kind in (1, 4):  # whole, or the last part
                yield Record.FromString(parts)
                parts = b""


def wandb_losses(run, name):
    """(step, value) of a metric, in the order it was logged."""
    rows = []
    for record in wandb_records(run):
        if record.WhichOneof("record_type") == "history":
            row = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            rows += [(row["_step"], row[name])] if name in row else []
    return rows


def test_mlflow_has_each_step_once_and_one_run(run, config):
    heard(run, config, lambda *arguments: trackers(*arguments)["MLflow"])
    client, (found,) = mlflow_runs(config)
    history = client.get_metric_history(found.info.run_id, "train/training_loss")
    assert sorted((metric.step, metric.value) for metric in history) == LOSSES
    (evaluation,) = client.get_metric_history(found.info.run_id, "eval/lm_example_loss")
    assert (evaluation.step, evaluation.value) == (20, 0.5)
    tags = found.data.tags
    assert {name: tags[name] for name in NOTES} == NOTES
    assert [value for name, value in sorted(tags.items()) if name.startswith(("failure", "resize"))] == TOLD
    assert (found.info.status, found.info.run_name) == ("FINISHED", "run")
    assert found.data.params["training.num_steps"] == "8"


def test_wandb_has_each_step_once_and_one_run(run, config):
    heard(run, config, lambda *arguments: trackers(*arguments)["Weights & Biases"])
    assert wandb_losses(run, "train/training_loss") == LOSSES
    assert wandb_losses(run, "eval/lm_example_loss") == [(20, 0.5)]
    records = list(wandb_records(run))
    runs = [record.run for record in records if record.WhichOneof("record_type") == "run"]
    assert len({(each.run_id, each.project, each.display_name) for each in runs}) == 1
    assert (runs[0].project, runs[0].display_name) == ("bert", "run")
    settings = {item.key: json.loads(item.value_json) for item in runs[0].config.update}
    assert settings["training"]["num_steps"] == 8
    codes = [record.exit.exit_code for record in records if record.WhichOneof("record_type") == "exit"]
    assert codes == [1, 0]
    summary = {}
    for record in records:
        if record.WhichOneof("record_type") == "summary":
            for item in record.summary.update:
                summary[item.key or "/".join(item.nested_key)] = json.loads(item.value_json)
    assert {name: summary[name] for name in NOTES} == NOTES
    assert sorted(value for name, value in summary.items() if name.startswith(("failure", "resize"))) == TOLD


def test_a_changed_setting_of_a_continued_run_is_a_tag_of_mlflow(run, config):
    for num_steps in (8, 11):
        changed = raybert.load_config(
            run_dir=config.run_dir,
            data={"input_files": "x"},
            training={"num_steps": num_steps},
            logging={"mlflow_experiment": "bert", "mlflow_tracking_uri": config.logging.mlflow_tracking_uri},
        )
        MlflowTracker(changed, run, {})(attempt(1, 0))
    (found,) = mlflow_runs(config)[1]
    assert found.data.params["training.num_steps"] == "8" and found.data.tags["now training.num_steps"] == "11"
    assert found.info.status == "RUNNING"


def test_another_project_gets_a_run_of_its_own(run, config, tmp_path):
    ids = []
    for experiment in ("bert", "other", "other"):
        settings = {"mlflow_experiment": experiment, "mlflow_tracking_uri": config.logging.mlflow_tracking_uri}
        other = raybert.load_config(run_dir=config.run_dir, logging=settings)
        MlflowTracker(other, run, {})(attempt(1, 0))
        ids.append(json.loads(run.read("tracking/mlflow.json"))["id"])
    assert ids[0] != ids[1] == ids[2]


def test_metrics_wait_while_mlflow_cannot_be_reached(run, config):
    tracker = MlflowTracker(config, run, {})
    for event in FIRST[:2]:
        tracker(event)
    client, tracker._client = tracker._client, mlflow.MlflowClient(f"http://127.0.0.1:{free_ports(1)[0]}")
    for event in FIRST[2:5]:
        with pytest.raises(mlflow.MlflowException):
            tracker(event)
    tracker._client = client
    for event in FIRST[5:] + SECOND:
        tracker(event)
    client, (found,) = mlflow_runs(config)
    history = client.get_metric_history(found.info.run_id, "train/training_loss")
    assert sorted((metric.step, metric.value) for metric in history) == LOSSES


@pytest.mark.parametrize("tracker", [WandbTracker, MlflowTracker])
def test_a_server_that_is_away_costs_a_warning(run, tmp_path, monkeypatch, tracker):
    """Weights & Biases then logs to files."""
    (port,) = free_ports(1)
    monkeypatch.setattr("raybert.trackers.START_S", 2)
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{port}")
    settings = {"wandb_project": "bert", "mlflow_experiment": "bert", "mlflow_tracking_uri": f"http://127.0.0.1:{port}"}
    config = raybert.load_config(run_dir=run.uri, data={"input_files": "x"}, logging=settings)
    check_trackers(config.logging)
    warnings = []
    with Listeners(warnings.append) as listeners:
        listeners.add(tracker(config, run, {}), "the tracker")
        for event in FIRST[:-1]:
            listeners.hear(event)
    assert len(warnings) == 1 and warnings[0].startswith("the tracker failed with ")
    assert "the run goes on, and further errors of it are not shown." in warnings[0]
    if tracker is WandbTracker:
        assert "it is logged to files in " in warnings[0]
        assert wandb_losses(run, "train/training_loss") == LOSSES[:4]


REFUSED = [
    ({"mlflow_tracking_uri": "http://host:5000"}, "but not what to log to; set logging.mlflow_experiment"),
    ({"mlflow_experiment": "a", "mlflow_tracking_uri": "http://me:secret@host"}, "must not hold credentials"),
    ({"wandb_project": " "}, "logging.wandb_project must not be empty"),
]


@pytest.mark.parametrize(("settings", "message"), REFUSED)
def test_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        check_config(raybert.load_config(data={"input_files": "x"}, logging=settings))


def test_an_address_that_mlflow_does_not_know_is_refused():
    with pytest.raises(UserError, match=r"logging.mlflow_tracking_uri: MLflow refuses it: .*bogus://x"):
        check_trackers(LoggingConfig(mlflow_experiment="a", mlflow_tracking_uri="bogus://x"))


@pytest.mark.parametrize(
    ("key", "message"), [(None, "there is none; run `wandb login`"), ("short", "refuses to log in")]
)
def test_weights_and_biases_without_a_good_key_are_refused(monkeypatch, key, message):
    monkeypatch.setenv("WANDB_MODE", "online")
    if key:
        monkeypatch.setenv("WANDB_API_KEY", key)
    wandb.teardown()
    with pytest.raises(UserError, match=message):
        check_trackers(LoggingConfig(wandb_project="a"))


@pytest.mark.parametrize("library", ["wandb", "mlflow"])
def test_a_missing_library_is_named_before_the_run_begins(config, monkeypatch, library):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == library else find_spec(name))
    rule = rf"needs {library}, which is not installed; run `pip install 'raybert\[{library}\]'`"
    with pytest.raises(UserError, match=rule):
        raybert.train(config)
    assert not Path(config.run_dir).exists()


def test_a_run_that_is_interrupted_and_goes_on_is_one_run_at_both(run, config, tmp_path, capfd):
    write_samples(tmp_path / "samples.tfrecord", 500, seed=1)

    def until(num_steps):
        training = replace(config.training, num_steps=num_steps, log_every_steps=10)
        return replace(config, training=training, checkpoint=CheckpointConfig(every_steps=20))

    def stop(event):
        if event.kind == "checkpoint":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        raybert.train(until(100_000), stop)
    num_steps = newest_checkpoint(run, print).step + 40
    raybert.train(until(num_steps))
    assert "failed with" not in capfd.readouterr().out
    client, (found,) = mlflow_runs(config)
    history = client.get_metric_history(found.info.run_id, "train/training_loss")
    steps = sorted(metric.step for metric in history)
    assert steps == list(range(10, steps[-1] + 1, 10)) and steps[-1] >= num_steps
    assert [step for step, _ in wandb_losses(run, "train/training_loss")] == steps
    assert {"attempt 1", "attempt 2", "checkpoint"} < found.data.tags.keys()
