"""Benchmark: every figure comes with its settings, sides do the same work, and decoding and steps need no Ray."""

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import take_step

from raybert import bench
from raybert.allocator import MALLOC
from raybert.bench_data import batches_in_memory
from raybert.bench_ray import steady
from raybert.bench_step import Peer, environment
from raybert.errors import UserError
from raybert.feed import MIN_BLOCK_ROWS
from raybert.figure import measured, ratio
from raybert.step import create_state
from raybert.world import World

TINY = ["--hidden", "16", "--layers", "1", "--batch", "4", "--micro-batch", "2", "--threads", "1", "--rounds", "2"]
HAS_PEER = importlib.util.find_spec("transformers") is not None


def config(*arguments):
    return bench.config_of(bench._parser().parse_args(["step", *TINY, *arguments]))


def figures(tmp_path, *arguments):
    assert bench.main([*arguments, "--json", str(tmp_path / "figures.json")]) == 0
    content = json.loads((tmp_path / "figures.json").read_text())
    assert content["before"]["cores"] and content["after"]["torch"]
    return {(figure["name"], figure["unit"]): figure for figure in content["figures"]}


def test_decode_has_a_peer_and_says_what_was_read(tmp_path):
    found = figures(tmp_path, "decode", "--rounds", "2")
    ours, peer = found["raybert", "records/s"], found["tfrecord package", "records/s"]
    assert len(ours["runs"]) == 2 and min(ours["runs"]) <= ours["value"] <= max(ours["runs"])
    assert found["raybert / tfrecord package", "times"]["value"] == pytest.approx(ours["value"] / peer["value"])
    assert ours["settings"]["threads"] == 1 and ours["settings"]["files"] == "raybert://sample/train-*.tfrecord"


def test_step_runs_under_the_settings_it_names(tmp_path):
    found = figures(tmp_path, "step", *TINY, "--seconds", "0.05", "--dropout", "0.2", "--micro-batch-tokens", "auto")
    for name in ["raybert", "transformers"] if HAS_PEER else ["raybert"]:
        figure = found[name, "samples/s"]
        assert len(figure["runs"]) == 2 and figure["value"] > 0 and found[name, "tokens/s"]["value"] > figure["value"]
        expected = {
            "torch_threads": 1,
            "malloc": MALLOC,
            "hidden": 16,
            "layers": 1,
            "sequence_length": 128,
            "batch": 4,
            "micro_batch": 2,
            "micro_batch_tokens": "auto",
            "precision": "fp32",
            "weights": "float32",
            "dropout": 0.2,
            "attention_dropout": 0.2,
            "compile": False,
        }
        assert {key: figure["settings"][key] for key in expected} == expected


@pytest.mark.skipif(not HAS_PEER, reason="needs transformers")
def test_the_peer_trains_the_same_model_on_the_same_batch():
    tiny = config("--dropout", "0", "--micro-batch", "4")
    tiny = replace(tiny, optimizer=replace(tiny.optimizer, warmup_steps=0))
    world, batch = World(), batches_in_memory(tiny, 1)[0]
    state = create_state(tiny.model, tiny.training, tiny.optimizer, world)
    peer = Peer(tiny, state, world.device)
    take_step(state, batch, tiny.training, tiny.optimizer, world)
    peer.step(peer.prepare(batch))
    theirs = dict(peer.model.named_parameters())
    for name, ours in state.model.named_parameters():
        torch.testing.assert_close(ours, theirs[name], rtol=1e-3, atol=1e-5)


def test_decode_and_step_import_no_ray(tmp_path):
    script = f"""
import sys
from pathlib import Path
from raybert import bench, bench_step
from raybert.config_file import config_to_yaml
arguments = {TINY!r}
assert bench.main(["decode", "--rounds", "1"]) == 0
config = bench.config_of(bench._parser().parse_args(["step", *arguments]))
Path({str(tmp_path / "config.yaml")!r}).write_text(config_to_yaml(config))
paths = [{str(tmp_path / "config.yaml")!r}, {str(tmp_path / "figures.json")!r}]
assert bench_step.main([*paths, "--rounds", "1", "--seconds", "0.01"]) == 0
assert "ray" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(__file__).parents[1])


def test_samples_of_another_length_are_refused_with_the_place():
    with pytest.raises(UserError, match=r"128 values, expected 64 \(data.max_seq_length\)"):
        batches_in_memory(config("--seq", "64"), 1)


def test_steady_state_leaves_out_the_first_steps_and_weighs_by_time():
    rows = [
        {"step": 10, "samples_per_s": 1.0, "data_wait": 0.9},
        {"step": 20, "samples_per_s": 50.0, "data_wait": 0.0},
        {"step": 30, "samples_per_s": 100.0, "data_wait": 0.3},
    ]
    rate, wait = steady(rows, num_skipped=10)
    assert rate == pytest.approx(20 / (10 / 50 + 10 / 100)) and wait == pytest.approx(0.1)


def test_a_ratio_is_of_medians_and_keeps_each_rounds():
    ours = measured("step", "ours", "samples/s", [10.0, 30.0, 20.0], {"torch_threads": 1})
    theirs = measured("step", "theirs", "samples/s", [5.0, 5.0, 20.0], {"torch_threads": 2})
    both = ratio(ours, theirs)
    assert (both.value, both.runs) == (4.0, (2.0, 6.0, 1.0))
    assert both.settings == {"ours": {"torch_threads": 1}, "theirs": {"torch_threads": 2}}


def test_allocator_settings_are_those_asked_for(monkeypatch):
    monkeypatch.setenv("MALLOC_ARENA_MAX", "1")
    for allocator, expected in [("raybert", MALLOC), ("system", {})]:
        found = environment(config(), allocator)
        assert {name: value for name, value in found.items() if name.startswith("MALLOC_")} == expected
        assert found["OMP_NUM_THREADS"] == "1"


def test_scale_measures_what_grows_with_ranks(tmp_path):
    arguments = ["scale", *TINY, "--rounds", "1", "--ranks", "1,2", "--processes", "2", "--shards", "3"]
    with tempfile.TemporaryDirectory(prefix="rb", dir="/tmp") as ray_tmpdir:
        command = [sys.executable, "run.py", "bench", *arguments, "--windows", "2", "--json", str(tmp_path / "f.json")]
        environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        subprocess.run(command, check=True, cwd=Path(__file__).parents[1], env=environment | {"RAY_TMPDIR": ray_tmpdir})
    content = json.loads((tmp_path / "f.json").read_text())
    found = {(figure["name"], figure["unit"]): figure for figure in content["figures"]}
    assert all(min(figure["runs"]) > 0 for figure in found.values())

    def value(name, unit):
        return found[name, unit]["value"]

    for ranks in (1, 2):
        feed = f"feed, {ranks} ranks, blocks of {MIN_BLOCK_ROWS}"
        assert value(feed, "blocks a second") == pytest.approx(value(feed, "samples/s") / MIN_BLOCK_ROWS)
        assert value(feed, "samples/s at most") == pytest.approx(
            MIN_BLOCK_ROWS * 1e3 / value(feed, "ms of coordinator CPU a block")
        )
        assert found[feed, "samples/s"]["settings"]["samples"] == 2 * 32768
    per_rank = value("history, 2 ranks", "bytes a step") - value("history, 1 ranks", "bytes a step")
    assert 20 < per_rank < 60  # two positions and a checksum
    assert value("checkpoint, 1x16", "bytes") > 0
    assert found["index, 3 files", "records/s"]["settings"]["records of a file"] == 2400
    # A run has thousands of read tasks, all in the object store at once: their size must not grow with the data.
    assert value("order, 1e+09 samples", "bytes of a read task") < 10_000
    assert value("order, 1e+09 samples", "s for another window") < value(
        "order, 1e+09 samples", "s for an epoch's first window"
    )
    assert len(found["2 worker processes", "s of all-reduce"]["runs"]) == 1


def test_checkpoint_says_what_training_stops_for_beside_memcpy(tmp_path):
    found = figures(tmp_path, "checkpoint", *TINY)
    stall, memcpy = found["checkpoint, 1x16", "s that training stops"], found["checkpoint, 1x16", "s of memcpy"]
    assert len(stall["runs"]) == 2 and min(stall["runs"]) > 0
    against = found["checkpoint, 1x16, against memcpy", "times"]
    assert against["value"] == pytest.approx(stall["value"] / memcpy["value"])
    size_bytes = found["checkpoint, 1x16", "bytes"]
    parameters = size_bytes["settings"]["parameters"]
    assert 12 * parameters < size_bytes["value"] < 12 * parameters + 50_000


def test_ray_needs_steps_beyond_the_first_ones():
    with pytest.raises(UserError, match="--steps must be at least 20"):
        bench.main(["ray", "--steps", "10"])
