"""`doctor` says go where a run would go, and else names what is to be mended, with the remedy."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from helpers import tiny_config, write_samples
from nodes import cluster

from raybert.cli import main, parse_train
from raybert.config_file import config_to_yaml
from raybert.display import duration
from raybert.finding import (
    FIX,
    OK,
    WARNING,
    Node,
    Trial,
    of_checkpoints,
    of_nodes,
    of_run,
    of_trial,
    offset_s,
)
from raybert.tuning import Candidate, gets_worse

ROOT = Path(__file__).parents[1]
NODE = Node("a", {"torch": "2.13.0"}, 4, ("H100",), True, (), ((10.0, 10.0, 10.0),))
TRIAL = Trial(4, (0.5, 0.4, 0.6), 2000.0, 10**8, "H100", 64 << 20, 0.01, 10 << 30, 40 << 30, 80 << 30)


def found(findings):
    """Status and text by check."""
    return [(finding.check, finding.status, finding.text) for finding in findings]


# Decisions


@pytest.mark.parametrize(
    ("clock", "offset"),
    [
        ([(10.0, 10.2, 10.5)], 0.0),
        ([(10.0, 13.0, 10.5)], 2.5),
        ([(10.0, 7.0, 10.5)], -3.0),
        ([(10.0, 12.0, 14.0), (20.0, 25.0, 20.5)], 4.5),  # the answer that came soonest counts
    ],
)
def test_a_clock_is_wrong_by_what_the_way_does_not_explain(clock, offset):
    assert offset_s(clock) == pytest.approx(offset)


@pytest.mark.parametrize(("skew", "status"), [(0.5, OK), (-0.5, OK), (2.0, WARNING), (-400.0, FIX), (4000.0, FIX)])
def test_a_skewed_clock_is_named_with_its_node(skew, status):
    other = replace(NODE, name="b", clock=((10.0, 10.0 + skew, 10.0),))
    (clocks,) = [finding for finding in of_nodes([NODE, other], "/run") if finding.check == "clocks"]
    assert clocks.status == status and clocks.values["offsets_s"] == {"a": 0, "b": skew}
    if status != OK:
        side = "ahead of" if skew > 0 else "behind"
        assert f"node b is {abs(skew):,.0f} s {side} the driver's; run a time service" in clocks.text


DIFFERING = [
    (
        {"versions": {"torch": "2.12.0"}},
        "versions",
        "node b has torch 2.12.0, not 2.13.0, which is the driver's; install",
    ),
    ({"sees_run_dir": False}, "sharing", "/run is another directory on b; give s3://"),
    ({"missing": ("/d/1", "/d/2")}, "sharing", "node b does not see /d/1 and 1 more; put the files where every node"),
]


@pytest.mark.parametrize(("differing", "check", "text"), DIFFERING)
def test_a_node_that_differs_is_named(differing, check, text):
    findings = found(of_nodes([NODE, replace(NODE, name="b", **differing)], "/run"))
    (fix,) = [finding for finding in findings if finding[1] == FIX]
    assert fix[0] == check and text in fix[2]


def test_nodes_that_are_alike_are_fine():
    findings = found(of_nodes([NODE, replace(NODE, name="b", gpus=("L4", "L4"))], "/run"))
    assert [status for _, status, _ in findings] == [OK] * 4
    assert findings[0][2] == "2 nodes, 8 CPUs, 1 x H100, 2 x L4"


def test_a_trial_tells_network_speed_and_memory():
    texts = {check: (status, text) for check, status, text in found(of_trial(TRIAL))}
    assert texts["all-reduce"] == (OK, "67 MB in 10 ms (6.71 GB/s), between 4 workers")
    assert texts["step"] == (OK, "0.5 s on 4 workers (H100), 4,000 tokens/s; median of 3")
    assert texts["memory"][0] == OK
    (memory,) = [each for each in of_trial(replace(TRIAL, free_bytes=1 << 30)) if each.check == "memory"]
    assert memory.status == WARNING and "lower training.micro_batch_size" in memory.text


def test_time_and_cost_follow_from_the_step():
    finding = of_run(0.5, 7200, 4, 2.5, duration)
    assert finding.values["seconds"] == 3600 and finding.values["cost"] == 10 and "1h00m" in finding.text


@pytest.mark.parametrize(
    ("keep", "every_steps", "rate", "free", "status", "text"),
    [
        (3, 1000, 1e9, 10e9, OK, "1.2 GB each, written in about 1.2 s; up to 4 of them, 4.8 GB"),
        (3, 1000, 1e9, 4e9, FIX, "up to 4 of them, 4.8 GB, where 4 GB are free; free some"),
        (0, 1000, 1e9, 10e9, FIX, "up to 11 of them, 13.2 GB"),  # all of 10,000 steps are kept
        (3, 10, 1e8, 10e9, WARNING, "longer than the 5 s between two; raise checkpoint.every_steps, or use auto"),
        (3, "auto", 1e8, None, OK, "written in about 12 s"),
    ],
)
def test_checkpoints_must_fit_the_storage_and_the_steps_between_them(keep, every_steps, rate, free, status, text):
    finding = of_checkpoints(10**8, keep, every_steps, 10_000, 0.5, rate, free)
    assert finding.status == status and text in finding.text


# The command


@pytest.fixture
def config_file(tmp_path):
    def write(**overrides):
        write_samples(tmp_path / "samples.tfrecord", 500, seed=1)
        config = tiny_config(overrides.pop("run_dir", tmp_path / "run"), tmp_path / "samples.tfrecord", **overrides)
        (tmp_path / "config.yaml").write_text(config_to_yaml(config))
        return str(tmp_path / "config.yaml")

    return write


def statuses(text):
    """Status by check, of the lines that are shown."""
    lines = [line.split(":")[0].split() for line in text.splitlines()[:-1]]
    return {check: status for status, check in lines}


def test_a_good_sample_may_go_and_nothing_is_left_but_the_index(config_file, tmp_path, capsys):
    assert main(["doctor", "--config", config_file(), "--cluster.price_per_worker_hour", "2"]) == 0
    shown = capsys.readouterr().out
    assert shown.splitlines()[-1] == "go"
    checks = [
        "configuration",
        "files",
        "run_dir",
        "cluster",
        "versions",
        "data",
        "step",
        "memory",
        "run",
        "checkpoints",
    ]
    assert list(statuses(shown)) == checks and FIX not in statuses(shown).values()
    assert "8 steps take" in shown and "at 2 a worker hour" in shown
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["index"]
    assert main(["train", "--config", str(tmp_path / "config.yaml")]) == 0
    capsys.readouterr()
    assert main(["doctor", "--json", "--config", str(tmp_path / "config.yaml")]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["go"]
    values = {finding["check"]: finding["values"] for finding in content["findings"]}
    assert values["step"]["step_s"] > 0 and values["run"]["num_steps"] == 0  # what is left of it


def broken(config_file, tmp_path, name):
    """Arguments of a command line with one thing wrong, and what is to be said of it."""
    path, samples = config_file(), tmp_path / "samples.tfrecord"
    if name == "run_dir":
        return ["--run_dir", f"{samples}/run"], "fix      run_dir: run_dir: cannot write to"
    if name == "damaged":
        content = bytearray(samples.read_bytes())
        content[len(content) // 2] ^= 255
        samples.write_bytes(content)
        return [], f"fix      data: data.input_files: bad records:\n  {samples}: record "
    if name == "held-out":
        (tmp_path / "held-out").write_bytes(b"no records")
        arguments = ["--evaluation.input_files", str(tmp_path / "held-out")]
        return arguments, f"fix      data: evaluation.input_files: bad records:\n  {tmp_path}/held-out: record 0"
    if name == "no file":
        return [
            "--data.input_files",
            f"{path}.none",
        ], f"fix      files: data.input_files: '{path}.none' matches no file"
    if name == "setting":
        return ["--training.num_steps", "0"], "fix      configuration: training.num_steps must be at least 1"
    assert name == "gpu"
    return ["--cluster.use_gpu", "true"], "fix      configuration: cluster.use_gpu is true, but torch"


@pytest.mark.parametrize("name", ["run_dir", "damaged", "held-out", "no file", "setting", "gpu"])
def test_what_is_wrong_is_named_and_what_depends_on_it_is_not_looked_at(config_file, tmp_path, capsys, name):
    import torch

    if name == "gpu" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    arguments, said = broken(config_file, tmp_path, name)
    assert main(["doctor", "--config", str(tmp_path / "config.yaml"), *arguments]) == 1
    shown = capsys.readouterr().out
    check = said.split(":")[0].split()[1]
    assert said in shown and shown.splitlines()[-1] == f"fix these first: {check}"
    assert "warning  steps: not looked at, before this is mended: " in shown


# On a cluster


def doctor(address, *arguments):
    known = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "PYTEST_"))}
    known |= {"RAY_ADDRESS": address, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "run.py"), "doctor", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=known, timeout=300)


def test_on_a_cluster_every_node_is_asked_and_workers_train_together(config_file):
    workers = {"cluster.num_workers": 2, "cluster.cpus_per_worker": 2}
    with cluster(2) as nodes:
        done = doctor(nodes.address, "--json", "--config", config_file(**workers))
        assert done.returncode == 0, done.stdout + done.stderr
        findings = {finding["check"]: finding for finding in json.loads(done.stdout)["findings"]}
        assert len(findings["cluster"]["values"]["nodes"]) == 3
        assert abs(max(findings["clocks"]["values"]["offsets_s"].values())) < 1
        assert findings["sharing"]["status"] == findings["versions"]["status"] == OK
        assert findings["all-reduce"]["values"]["bytes_per_s"] > 0
        assert findings["step"]["values"]["world_size"] == 2
        small = doctor(nodes.address, "--config", config_file(**workers), "--cluster.num_workers", "7")
    assert small.returncode == 1 and small.stdout.splitlines()[-1] == "fix these first: cluster"
    assert (
        "fix      cluster: cluster.num_workers=7 needs at least 7 workers of 2 CPU each, but the cluster has"
        in small.stdout
    )


# Micro-batches


def test_the_fastest_micro_batch_is_printed_as_flags_that_train_takes(config_file, capsys):
    path = config_file(**{"training.global_batch_size": 64})
    assert main(["tune-batch", "--json", "--config", path]) == 0
    content = json.loads(capsys.readouterr().out)
    sizes = [each["micro_batch_size"] for each in content["candidates"]]
    assert sizes == [4, 8, 16, 32, 64][: len(sizes)] and len(sizes) > 2
    assert content["best"] == min(content["candidates"], key=lambda each: each["step_s"])
    best = Candidate(**content["best"])
    training = parse_train(["--config", path, *best.flags().split()]).config.training
    assert (training.micro_batch_size, training.micro_batch_tokens) == (best.micro_batch_size, 0)


def test_tuning_prints_the_flags_last(config_file, capsys, monkeypatch):
    monkeypatch.setattr("raybert.tuning.ALL_S", 0.0)  # one candidate is always tried
    assert main(["tune-batch", "--config", config_file()]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "use: --training.micro_batch_size 4 --training.micro_batch_tokens 0"


@pytest.mark.parametrize(("times", "ends"), [((3, 2, 1), False), ((1, 1.2, 1.05), False), ((1, 1.2, 1.3), True)])
def test_the_search_ends_where_it_only_gets_worse(times, ends):
    assert gets_worse([Candidate(8, 0, step_s, 1.0) for step_s in times]) == ends
