"""What a run shows to Prometheus, scraped from a real cluster; and that dashboard and alerts ask for what there is."""

import json
import os
import signal
import time
import urllib.request
from itertools import combinations
from pathlib import Path

import promql_parser
import pytest
import yaml
from helpers import SAMPLE_FILE, tiny_config
from nodes import attempts, cluster, finish, logged_steps, running, wait_until
from prometheus_client.parser import text_string_to_metric_families
from ray.dashboard.modules.reporter.reporter_agent import METRICS_GAUGES

from raybert import gauges
from raybert.events import Event
from raybert.gauges import COUNTERS, GAUGES
from raybert.storage import Directory
from raybert.telemetry import read_metrics

FOLDER = Path(__file__).parents[1] / "cluster"
DASHBOARD = json.loads((FOLDER / "grafana.json").read_text())
RULES = [rule for group in yaml.safe_load((FOLDER / "alerts.yaml").read_text())["groups"] for rule in group["rules"]]
ALERTS = [rule for rule in RULES if "alert" in rule]
NUM_STEPS = 60
RUN = {
    "data.input_files": SAMPLE_FILE,
    "data.window_size": 128,
    "model.hidden_size": 32,
    "model.num_hidden_layers": 1,
    "model.num_attention_heads": 2,
    "model.intermediate_size": 64,
    "training.num_steps": NUM_STEPS,
    "training.global_batch_size": 32,
    "training.micro_batch_size": 32,
    "training.log_every_steps": 1,
    "checkpoint.every_steps": 5,
    "evaluation.input_files": SAMPLE_FILE,
    "evaluation.every_steps": 10,
    "evaluation.num_steps": 1,
    "cluster.num_workers": "1,2",
    "cluster.cpus_per_worker": 2,
    "cluster.start_timeout_s": 5,
}
OURS = {f"ray_raybert_{name}" for name in GAUGES} | {f"ray_raybert_{name}_total" for name in COUNTERS}
NO_PEAK = {"ray_raybert_mfu"}  # absent on a CPU
RAYS = {"ray_node_disk_io_write_speed", "ray_cluster_active_nodes", "ray_object_store_used_memory"}  # late ones


# --- A run on a cluster ----------------------------------------------------------------------------------------------


def scrape(nodes):
    """All that the nodes export: name to (labels, value) pairs."""
    found = {}
    for node in nodes.global_state.node_table():
        url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        with urllib.request.urlopen(url, timeout=10) as answer:
            for family in text_string_to_metric_families(answer.read().decode()):
                for sample in family.samples:
                    found.setdefault(sample.name, []).append((sample.labels, sample.value))
    return found


def values(samples, name):
    return [value for _, value in samples.get(f"ray_raybert_{name}", [])]


def kill_worker(node):
    """End the worker process of a node, as a fault would."""
    raylet = node.all_processes["raylet"][0].process.pid
    for process in Path("/proc").glob("[0-9]*"):
        status, command = (process / "stat").read_text(), (process / "cmdline").read_bytes()
        if int(status.rpartition(")")[2].split()[1]) == raylet and b"RayTrainWorker" in command:
            os.kill(int(process.name), signal.SIGKILL)
            return
    raise AssertionError("no worker process")


@pytest.fixture(scope="module")
def scraped(tmp_path_factory):
    """What was exported while a run trained, after its worker died once, and after its end."""
    directory = tmp_path_factory.mktemp("observed")
    run_dir, pace = directory / "räume 1", directory / "pace"
    pace.write_text("0.3")
    flags = [f"--run_dir={run_dir}", *(f"--{name}={value}" for name, value in RUN.items())]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_metrics_report_interval_ms", "1000")  # default: 10 s
        with cluster(1) as nodes, running(nodes.address, *flags, pace=pace) as process:
            wait_until(lambda: logged_steps(run_dir)[-1:] >= [8], process)
            kill_worker(nodes.list_all_nodes()[-1])
            wait_until(lambda: len(attempts(run_dir)) == 2, process)
            found = {"names": set(), "steps": set()}

            def shows_all():
                found["training"] = scrape(nodes)
                found["names"].update(found["training"])
                return found["training"].keys() >= OURS - NO_PEAK and found["names"] >= RAYS

            wait_until(shows_all, process)
            pace.write_text("0")

            def shows_none():
                found["ended"] = scrape(nodes)
                found["names"].update(found["ended"])
                found["steps"].update(values(found["ended"], "step"))
                return process.poll() is not None and not any(
                    f"ray_raybert_{name}" in found["ended"] for name in GAUGES
                )

            deadline_s = time.monotonic() + 120
            while not shows_none():
                assert time.monotonic() < deadline_s, process.read_output()
            finish(process)
            found["rows"] = read_metrics(Directory(str(run_dir)))
            yield found


def test_a_run_shows_what_it_declares(scraped):
    """All of it, under the run's name alone, with values that can be."""
    samples = scraped["training"]
    shown = {name for name in samples if name.startswith("ray_raybert_")}
    assert shown == OURS - NO_PEAK
    for name in shown:
        for labels, value in samples[name]:
            assert labels["run"] == "r_ume 1" and value >= 0, (name, labels, value)
    assert values(samples, "num_steps") == [NUM_STEPS] and 5 <= values(samples, "step")[0] < NUM_STEPS
    assert values(samples, "world_size") == [1] and values(samples, "max_world_size") == [2]
    assert values(samples, "attempt") == [2] and values(samples, "restarts_total") == [1]
    assert values(samples, "checkpoints_total")[0] >= 1 and values(samples, "warnings_total")[0] >= 1
    assert 0 < values(samples, "seconds_since_commit")[0] < 60 and values(samples, "seconds_since_step")[0] < 60
    for name in ("training_loss", "lm_example_loss", "held_out_lm_example_loss"):
        assert 5 < values(samples, name)[0] < 15
    for name in ("samples_per_s", "tokens_per_s", "flops_per_s", "learning_rate", "grad_norm"):
        assert values(samples, name)[0] > 0
    for name in ("data_wait", "masked_lm_accuracy", "next_sentence_accuracy", "held_out_next_sentence_accuracy"):
        assert values(samples, name)[0] <= 1


def test_all_that_a_run_logs_is_shown(scraped):
    """But the held-out sum of both losses, which says nothing that they do not."""
    logged = {("held_out_" if row["kind"] == "eval" else "") + name for row in scraped["rows"] for name in row}
    assert logged - {"kind", "held_out_kind", "held_out_step", "held_out_loss"} <= GAUGES.keys()


def test_the_last_step_is_shown(scraped):
    """Or nobody could tell a run that is complete from one that was lost."""
    assert max(scraped["steps"]) == NUM_STEPS


def test_nothing_is_shown_of_a_run_that_ended(scraped):
    """But the counters, which do not grow."""
    shown = {name for name in scraped["ended"] if name.startswith("ray_raybert_")}
    assert shown == {f"ray_raybert_{name}_total" for name in COUNTERS}


# --- What holds when --------------------------------------------------------------------------------------------------


class Clock:
    """A time that a test sets."""

    now_s = 0.0

    def monotonic(self):
        return self.now_s


TRAINED = {"training_loss": 9.0, "samples_per_s": 7.0, "tokens_per_s": 700.0, "flops_per_s": 1e9, "data_wait": 0.0}
BEGUN = Event("attempt", 4, "", {"number": 3, "world_size": 2})


def after(monkeypatch, events, now_s):
    """What gauges hold at a time, after events at theirs."""
    clock = Clock()
    monkeypatch.setattr(gauges, "time", clock)
    found = gauges.Gauges(Directory("/runs/first"), tiny_config("/runs/first", ""))
    for clock.now_s, event in events:
        found.show(event)
    clock.now_s = now_s
    found.refresh()
    return found.values


@pytest.mark.parametrize(
    ("events", "now_s", "are_shown"),
    [
        ([], 1, False),
        ([(1, BEGUN)], 2, False),
        ([(1, BEGUN), (2, Event("train", 6, metrics=TRAINED))], 3, True),
        ([(1, BEGUN), (2, Event("train", 6, metrics=TRAINED))], 61, True),
        ([(1, BEGUN), (2, Event("train", 6, metrics=TRAINED))], 63, False),
        # Lines that are 100 s apart are waited for three times as long.
        ([(1, BEGUN), (101, Event("train", 6, metrics=TRAINED))], 400, True),
        ([(1, BEGUN), (101, Event("train", 6, metrics=TRAINED))], 402, False),
        ([(1, BEGUN), (2, Event("train", 6, metrics=TRAINED)), (3, BEGUN)], 4, False),
        ([(1, BEGUN), (2, Event("train", 6, metrics=TRAINED)), (3, Event("warning", text="late"))], 4, True),
    ],
)
def test_rates_hold_while_steps_are_trained(monkeypatch, events, now_s, are_shown):
    values = after(monkeypatch, events, now_s)
    assert {name for name in gauges.RATES if name in values} == (gauges.RATES.keys() - {"mfu"} if are_shown else set())


def test_what_a_run_is_holds_while_it_waits(monkeypatch):
    """Its step, loss and workers, and for how long it has waited."""
    trained = [(1, BEGUN), (2, Event("train", 6, metrics=TRAINED)), (5, Event("checkpoint", text="step-6"))]
    values = after(monkeypatch, trained, 1000)
    assert values == {
        "num_steps": 8,
        "max_world_size": 0,
        "step": 6,
        "attempt": 3,
        "world_size": 2,
        "training_loss": 9.0,
        "seconds_since_step": 998,
        "seconds_since_commit": 995,
    }
    assert after(monkeypatch, [*trained, (7, BEGUN)], 8)["step"] == 4  # it goes back with an attempt


# --- Dashboard and alerts --------------------------------------------------------------------------------------------


def metrics_of(expression):
    """The names of what an expression of PromQL asks for."""
    if isinstance(expression, promql_parser.VectorSelector):
        return {expression.name}
    parts = [getattr(expression, part, None) for part in ("expr", "lhs", "rhs", "vector_selector")]
    parts += getattr(expression, "args", None) or []
    return set().union(*(metrics_of(part) for part in parts if part is not None))


def expressions():
    for panel in DASHBOARD["panels"]:
        for target in panel["targets"]:
            yield f"{panel['title']} {target['refId']}", target["expr"]
    for rule in RULES:
        yield rule.get("alert") or rule["record"], rule["expr"]


EXPRESSIONS = dict(expressions())


@pytest.mark.parametrize("title", EXPRESSIONS)
def test_what_is_asked_for_exists(title, scraped):
    """Exported by a run, by Ray on this cluster, by Ray on nodes with GPUs, by Prometheus itself, or made by a rule."""
    recorded = {rule["record"] for rule in RULES if "record" in rule}
    names = metrics_of(promql_parser.parse(EXPRESSIONS[title]))
    assert names
    for name in names:
        known = name in OURS or name in recorded or name == "up" or name in scraped["names"]
        assert known or (("gpu" in name or "gram" in name) and name.removeprefix("ray_") in METRICS_GAUGES), name


def test_a_name_that_does_not_exist_is_seen():
    asked = "sum by (a) (rate(b[5m])) / on (c) d offset 2h > 1 and quantile(0.5, e:f) > -max_over_time(g[1h:1m])"
    assert metrics_of(promql_parser.parse(asked)) == {"b", "d", "e:f", "g"}


def test_all_that_a_run_shows_is_on_the_dashboard():
    asked = set().union(*(metrics_of(promql_parser.parse(expression)) for expression in EXPRESSIONS.values()))
    assert asked >= OURS


def test_the_dashboard_is_one_that_grafana_can_lay_out():
    panels = DASHBOARD["panels"]
    assert [panel["id"] for panel in panels] == list(range(1, len(panels) + 1))
    assert len({panel["title"] for panel in panels}) == len(panels)
    places = [panel["gridPos"] for panel in panels]
    for place in places:
        assert place["x"] >= 0 and place["x"] + place["w"] <= 24
    for a, b in combinations(places, 2):
        beside = a["x"] + a["w"] <= b["x"] or b["x"] + b["w"] <= a["x"]
        assert beside or a["y"] + a["h"] <= b["y"] or b["y"] + b["h"] <= a["y"]
    assert {variable["name"] for variable in DASHBOARD["templating"]["list"]} == {"datasource", "run"}
    for panel in panels:
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        refs = [target["refId"] for target in panel["targets"]]
        assert refs == sorted(set(refs)) and all(target["legendFormat"] for target in panel["targets"])
        for target in panel["targets"]:
            # A single number is that of now, or none; not the last that was.
            assert target.get("instant", False) == (panel["type"] == "stat")


def test_panels_of_a_run_are_of_the_chosen_one():
    for panel in DASHBOARD["panels"]:
        for target in panel["targets"]:
            assert target["expr"].count("raybert_") == target["expr"].count('{run=~"$run"}')


@pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: alert["alert"])
def test_an_alert_says_what_is_so_and_what_to_do(alert):
    assert alert.keys() == {"alert", "expr", "for", "labels", "annotations"}
    assert alert["labels"]["severity"] in ("critical", "warning", "info")
    assert alert["annotations"].keys() == {"summary", "description"}
    assert "{{ $labels." in alert["annotations"]["summary"] and len(alert["annotations"]["description"]) > 80


def test_alerts_have_names_of_their_own():
    assert len({alert["alert"] for alert in ALERTS}) == len(ALERTS)
