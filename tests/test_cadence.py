"""The cadence of checkpoints: what wastes least, and the same steps on all ranks, whatever the clock says."""

import math
import re

import numpy as np
import pytest
import torch
from faults import leftovers, scene
from helpers import tiny_config, write_samples
from nodes import finish, wait_until
from ranks import run_ranks
from runs import assert_exactly_once, last_weights
from test_loop import Observed

from raybert import cadence, loop
from raybert.cadence import MOST_S, NEWS, WORKER_MTBF_S, Cadence, Past, best_interval_s, past
from raybert.cli import main
from raybert.config_file import config_to_yaml
from raybert.entry import FINISHED, Entry
from raybert.feed import Layout, local_batches
from raybert.history import read_attempts
from raybert.manifest import place
from raybert.order import SampleOrder
from raybert.step import create_state, settle_buckets
from raybert.storage import Directory

# --- The law --------------------------------------------------------------------------------------------------------

STALLS_S, MTBFS_S = (0.01, 0.12, 1.0, 8.0, 60.0), (150.0, 600.0, 3600.0)


def wasted(interval_s, stall_s, uptimes_s):
    """Share of the time that training lost, simulated: each failure undoes what was done since the last checkpoint."""
    useful_s = interval_s * np.floor(uptimes_s / (interval_s + stall_s)).sum()
    return 1 - useful_s / uptimes_s.sum()


@pytest.mark.parametrize("mtbf_s", MTBFS_S)
@pytest.mark.parametrize("stall_s", STALLS_S)
def test_no_other_interval_wastes_less(stall_s, mtbf_s):
    uptimes_s = np.random.default_rng(0).exponential(mtbf_s, 200_000)
    least = min(wasted(interval_s, stall_s, uptimes_s) for interval_s in np.geomspace(stall_s, 3 * mtbf_s, 300))
    assert wasted(best_interval_s(stall_s, mtbf_s), stall_s, uptimes_s) < 1.1 * least


def test_the_interval_grows_in_both():
    table = [
        [best_interval_s(stall_s, mtbf_s) for mtbf_s in np.geomspace(0.1, 1e6, 60)] for stall_s in (*STALLS_S, 1e4)
    ]
    assert np.all(np.diff(table, axis=0) >= 0) and np.all(np.diff(table, axis=1) >= 0)
    assert np.min(table) > 0 and np.max(table) == MOST_S


def test_short_stalls_are_youngs():
    assert best_interval_s(0.12, 3.1 * 3600) == pytest.approx(math.sqrt(2 * 0.12 * 3.1 * 3600), rel=0.01)


# --- What a run has lived through -----------------------------------------------------------------------------------


def entry(attempt, world_size, lived_s, reason, is_planned=False):
    return Entry(attempt, world_size, 0, 0.0, 100.0, 100.0 + lived_s, 9, 5, reason=reason, is_planned=is_planned)


@pytest.mark.parametrize(
    ("reason", "is_planned", "num_failures"),
    [(None, False, 0), (FINISHED, False, 0), ("from 3 to 2", True, 0), ("a worker died", False, 1)],
)
def test_a_planned_end_is_no_failure(reason, is_planned, num_failures):
    assert past([entry(1, 4, 250.0, reason, is_planned)]) == Past(1000.0, num_failures)


def test_failures_are_counted_by_the_time_of_workers():
    lived = past([entry(1, 2, 50.0, "a worker died"), entry(2, 1, 30.0, "a worker died"), entry(3, 2, 10.0, None)])
    assert lived == Past(150.0, 2)
    assert lived.mtbf_s(1) == (WORKER_MTBF_S + 150) / 3 and lived.mtbf_s(4) == lived.mtbf_s(1) / 4
    assert Past().mtbf_s(24) == 3600.0
    many = Past(num_failures=1000, worker_s=1000 * 600.0)
    assert many.mtbf_s(2) == pytest.approx(300, rel=0.15)  # what was seen outweighs what was assumed


# --- When one is due ------------------------------------------------------------------------------------------------


class Trained:
    """Steps of one second each under a cadence; saves take `write_s` behind them."""

    def __init__(self, every_steps, stall_s, write_s, lived):
        self.now_s, self.notes, self.saved, self.stall_s, self.write_s = 0.0, [], [], stall_s, write_s
        self.cadence = Cadence(every_steps, lived, 1, self.notes.append, lambda: self.now_s)

    def steps(self, first, stop):
        for step in range(first, stop):
            is_writing = bool(self.saved) and self.now_s < self.written_at_s
            is_due = self.cadence.is_due(step + 1, is_writing)
            self.now_s += 1.0
            if is_due:
                self.now_s += self.stall_s
                self.cadence.saved(step + 1, self.stall_s)
                self.saved.append(step + 1)
                self.written_at_s = self.now_s + self.write_s
        return self


def test_a_number_of_steps_is_kept():
    trained = Trained(7, 0.5, 100.0, Past()).steps(0, 30)
    assert trained.saved == [7, 14, 21, 28] and trained.notes == []


def test_auto_keeps_the_best_interval_and_says_it_once():
    trained = Trained("auto", stall_s=0.5, write_s=5.0, lived=Past(WORKER_MTBF_S, 399)).steps(0, 2000)
    best_s = best_interval_s(0.5, 2 * WORKER_MTBF_S / 400)
    gaps = np.diff(trained.saved)
    assert np.all(np.abs(gaps - best_s) < 0.1 * best_s) and len(gaps) > 50
    (note,) = trained.notes
    assert note.startswith("checkpoint about every 21 steps (20.5 s): a checkpoint stops training for 0.5 s, a failure")


def test_auto_says_an_interval_that_has_changed():
    trained = Trained("auto", stall_s=0.5, write_s=5.0, lived=Past(WORKER_MTBF_S, 399)).steps(0, 200)
    trained.stall_s = 5.0
    trained.steps(200, 1000)
    assert len(trained.notes) == 2 and "stops training for 5 s" in trained.notes[1]


def test_auto_waits_for_a_slow_write_and_as_long_again():
    trained = Trained("auto", stall_s=0.5, write_s=60.0, lived=Past(WORKER_MTBF_S, 399)).steps(0, 1000)
    assert all(116 <= gap <= 123 for gap in np.diff(trained.saved))


# --- Ranks ----------------------------------------------------------------------------------------------------------

NUM_STEPS = 60
OFTEN = Past(num_failures=10**7)  # an interval of milliseconds


def looped(world, index, every_steps):
    """Train: at which steps each rank made a checkpoint, the records of them, and every rank's weights."""
    config = tiny_config("", "", **{"training.num_steps": NUM_STEPS, "checkpoint.every_steps": every_steps})
    state = create_state(config.model, config.training, config.optimizer, world)
    settle_buckets(state, 16, config.training, world)
    order = SampleOrder(index.page_sizes, 1, config.training.global_batch_size, 4)
    batches = local_batches(Layout(order, world.size, 0, NUM_STEPS), index, world.rank)
    observed = Observed(lived=OFTEN) if world.is_first else None
    checked, real_check = torch.zeros(NUM_STEPS + 1, dtype=torch.int64), loop._check_weights

    def check(state):
        checked[state.step] += 1
        real_check(state)

    loop._check_weights = check
    try:
        result = loop.train(state, batches, config, world, 1, {}, None, observed)
    finally:
        loop._check_weights = real_check
    weights = torch.cat([parameter.detach().ravel() for parameter in state.model.parameters()])
    checked, weights = world.gather(checked), world.gather(weights)
    if observed is None:
        assert result.records == []
        return None
    records = [record for _, records in observed.saved for record in records] + result.records
    saved = [(step, len(records)) for step, records in observed.saved]
    return {"checked": checked, "weights": weights, "records": records, "saved": saved, "notes": observed.notes}


@pytest.fixture(scope="module")
def ranks(index):
    """Results of `looped` by world size and every_steps."""
    cases = [(size, every_steps) for size in (1, 2, 3) for every_steps in ("auto", 1000)]
    return dict(zip(cases, run_ranks([(size, looped, (index, every)) for size, every in cases]), strict=True))


@pytest.mark.parametrize("size", [1, 2, 3])
def test_all_ranks_save_at_the_same_steps(ranks, size):
    auto = ranks[size, "auto"]
    assert all(torch.equal(steps, auto["checked"][0]) for steps in auto["checked"])
    saved = [step for step, _ in auto["saved"]]
    assert auto["checked"][0].nonzero().ravel().tolist() == [*saved, NUM_STEPS] and len(saved) > 2
    assert auto["notes"][0].startswith("checkpoint about every ")
    assert ranks[size, 1000]["saved"] == []


@pytest.mark.parametrize("size", [1, 2, 3])
def test_every_step_once_and_the_same_weights_whenever_it_was_saved(ranks, size):
    auto, never = ranks[size, "auto"], ranks[size, 1000]
    assert [record.step for record in auto["records"]] == list(range(NUM_STEPS))
    assert auto["records"] == never["records"]
    for record in auto["records"]:
        edges = [record.step * 32, *(arrival.stop for arrival in record.arrivals)]
        assert [arrival.first for arrival in record.arrivals] == edges[:-1] and edges[-1] == record.step * 32 + 32
        assert len(record.arrivals) == size
    assert torch.equal(auto["weights"], never["weights"])


# --- Whole runs -----------------------------------------------------------------------------------------------------


def test_a_run_that_was_interrupted_goes_on_exactly(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cadence, "WORKER_MTBF_S", 0.01)  # a checkpoint every few steps
    write_samples(tmp_path / "samples.tfrecord", 500, seed=1)
    real_step = loop.train_step

    def interrupted(state, batch, *arguments):
        if batch.step == 150:
            raise KeyboardInterrupt
        return real_step(state, batch, *arguments)

    def train(name, **overrides):
        settings = {"training.num_steps": 200, "training.log_every_steps": 50, **overrides}
        config = tiny_config(tmp_path / name, tmp_path / "samples.tfrecord", **settings)
        (tmp_path / "config.yaml").write_text(config_to_yaml(config))
        return main(["train", "--config", str(tmp_path / "config.yaml")])

    assert train("whole") == 0
    capsys.readouterr()  # every fourth step may be too often for the disk
    monkeypatch.setattr(loop, "train_step", interrupted)
    assert train("auto", **{"checkpoint.every_steps": "auto"}) == 130
    monkeypatch.setattr(loop, "train_step", real_step)
    assert train("auto", **{"checkpoint.every_steps": "auto"}) == 0
    said = capsys.readouterr().out
    assert "\ncheckpoint about every " in said and "left out" not in said
    first, second = read_attempts(Directory(str(tmp_path / "auto")))
    assert first.start_step == 0 < second.start_step <= 150
    assert main(["verify", str(tmp_path / "auto")]) == 0
    assert torch.equal(last_weights(tmp_path / "auto"), last_weights(tmp_path / "whole"))


# --- On a cluster ---------------------------------------------------------------------------------------------------


@pytest.mark.nightly
def test_a_run_saves_as_often_as_it_says_and_a_loss_costs_no_more(tmp_path, sample_index):
    num_steps = 2500
    settings = {"training__num_steps": num_steps, "checkpoint__every_steps": "auto", "cluster__num_workers": 2}
    with scene(tmp_path, 2, pace="0.1", **settings) as stage:

        def saved():
            return [place(name)[0] for name in stage.complete_checkpoints()]

        wait_until(lambda: len(saved()) >= 3, stage.process, timeout_s=400)
        third, second, first = saved()
        told = re.findall(r"checkpoint about every ([\d,]+) steps", stage.process.read_output())
        every_steps = int(told[-1].replace(",", ""))
        print(first, second, third, told)
        assert 1 / NEWS <= (third - second) / every_steps <= NEWS  # by so much it may change without a word
        assert stage.recover("kill_worker").redone <= NEWS * every_steps
        stage.pace.write_text("0")
        finish(stage.process)
        assert leftovers(stage.nodes) == []
    assert assert_exactly_once(stage.run_dir, num_steps, sample_index) == [2] * num_steps
    assert main(["verify", str(stage.run_dir)]) == 0
