"""Guards: what is not finite, or spikes, costs no weights and no position; the run goes back and leaves it out."""

import json
import math
import os
import pickle
import re
import signal
import sys
from pathlib import Path

import pytest
import torch
from helpers import tiny_config, write_samples
from nodes import attempts, cluster, finish, logged_steps, running, wait_until
from poisoned import poisoned
from ranks import run_ranks
from runs import assert_exactly_once, flags, last_weights
from test_loop import Observed

from raybert import begin, loop, worker
from raybert.cli import main
from raybert.config import GuardConfig
from raybert.config_file import config_to_yaml
from raybert.errors import UserError
from raybert.feed import Layout, local_batches
from raybert.guard import GUARDS, Guard, Judged, RollbackError, bar, check_rollbacks, is_spike, read_barred, reasons
from raybert.history import FencedError, begin_attempt, read_attempts, read_history
from raybert.lookout import awaited
from raybert.manifest import newest_checkpoint
from raybert.order import SampleOrder
from raybert.progress import described
from raybert.step import create_state, settle_buckets
from raybert.storage import Directory

POISONED = Path(__file__).parent / "poisoned.py"
SPIKES = {"guard.spike_sigma": 50.0, "guard.spike_window": 4}  # nothing that is not poisoned stands out so far

# --- Rules ----------------------------------------------------------------------------------------------------------


def steps(pattern, first=0):
    """One a character: . is ordinary, x not finite, ! a spike, b barred."""
    for step, kind in enumerate(pattern, first):
        loss = {"b": None, "!": 50.0, "x": math.nan}.get(kind, 5.0 + 0.1 * (step % 2))
        yield Judged(step, loss, is_finite=kind not in "xb")


def alarm(blocks, patience=0, **config):
    """Steps and reason of the alarm that blocks of steps give one after the other; None if they give none."""
    guard, first = Guard(GuardConfig(**config), patience), 0
    for block in blocks.split():
        try:
            guard.judge(steps(block, first))
        except RollbackError as error:
            return error.first, error.stop, error.reason
        first += len(block)
    return None


@pytest.mark.parametrize(
    ("blocks", "found"),
    [
        ("xx.xx.xx", None),
        ("..xxx", (2, 5)),
        ("xxx", (0, 3)),
        ("..xxxxx..", (2, 7)),  # the whole row, where it is seen whole
        (".x x x", (1, 4)),  # over several looks
        (".xx .x xx", (4, 7)),
        ("xx b x", None),
        ("xbxbxbx", None),
        (".xxx.xxx", (1, 4)),  # the first
    ],
)
def test_non_finite_gradients_in_a_row_give_an_alarm(blocks, found):
    result = alarm(blocks, max_non_finite=3)
    assert (result and result[:2]) == found
    if found:
        first, stop = found
        assert result[2] == f"non-finite gradient {stop - first} times in a row from step {first}"


def test_overflows_that_lower_the_loss_scale_are_ordinary():
    assert alarm("x" * 18, patience=16) is None
    assert alarm("x" * 19, patience=16)[:2] == (0, 19)


@pytest.mark.parametrize(
    ("blocks", "found"),
    [
        ("........!..", (8, 9)),
        ("........ !!!. .", (8, 11)),
        ("...!", None),  # no window yet
        ("....!", (4, 5)),
        ("..xx..!", (6, 7)),  # what is not finite is in no window
        ("....b!", (5, 6)),
    ],
)
def test_a_spike_gives_an_alarm(blocks, found):
    result = alarm(blocks, spike_sigma=6.0, spike_window=4)
    assert (result and result[:2]) == found
    if found:
        assert result[2] == f"loss spike at step {found[0]}"
    assert alarm(blocks) is None  # the default looks for none


def test_a_spike_is_so_many_deviations_above_the_mean():
    config, before = GuardConfig(spike_sigma=6.0, spike_window=4), [4.0, 6.0, 4.0, 6.0]
    assert not is_spike(11.0, before, config) and is_spike(11.01, before, config)
    assert not is_spike(-100.0, before, config)
    assert not is_spike(100.0, before[:3], config)


@pytest.mark.parametrize(
    ("blocks", "is_calm"), [("..", True), (".x", False), ("x.", True), ("xb", True), ("x .", True), (". x", False)]
)
def test_no_checkpoint_is_made_where_an_alarm_may_come(blocks, is_calm):
    guard, first = Guard(GuardConfig()), 0
    for block in blocks.split():
        guard.judge(steps(block, first))
        first += len(block)
    assert guard.is_calm == is_calm


def test_what_was_barred_stays_barred(run):
    for number, (first, stop) in enumerate([(5, 7), (6, 9)], 1):
        begin_attempt(run, 2, 0, None, read_barred(run))
        bar(run, number, RollbackError(first, stop, f"reason {number}"))
    barred = read_barred(run)
    assert barred == ((5, 7, "reason 1"), (6, 9, "reason 2"))
    assert reasons(barred) == {5: "reason 1", 6: "reason 1", 7: "reason 2", 8: "reason 2"}
    assert json.loads((run / GUARDS).read("0002.json")) == {"attempt": 2, "first": 6, "stop": 9, "reason": "reason 2"}


def test_an_attempt_that_another_has_followed_bars_nothing(run):
    for _ in range(2):
        begin_attempt(run, 2, 0, None)
    with pytest.raises(FencedError):
        bar(run, 1, RollbackError(5, 7, "late"))
    assert read_barred(run) == ()


@pytest.mark.parametrize(("num_before", "limit", "ends"), [(0, 0, True), (0, 1, False), (2, 3, False), (3, 3, True)])
def test_a_run_is_rolled_back_only_so_often(num_before, limit, ends):
    arguments = [(1, 2, "")] * num_before, GuardConfig(max_rollbacks=limit), RollbackError(3, 4, "loss spike at step 3")
    if not ends:
        check_rollbacks(*arguments)
        return
    with pytest.raises(UserError, match=rf"Loss spike at step 3 after {num_before} rollbacks .*guard\.max_rollbacks"):
        check_rollbacks(*arguments)


def test_the_error_crosses_processes():
    error = pickle.loads(pickle.dumps(RollbackError(3, 5, "loss spike at step 3")))
    assert (error.first, error.stop, error.reason) == (3, 5, "loss spike at step 3")
    assert str(error) == "rolled back: loss spike at step 3; steps 3 to 4 will make no update"


# --- Ranks ----------------------------------------------------------------------------------------------------------


def looped(world, index, barred=(), spikes=(), nans=(), **overrides):
    """Train with poisoned steps: every rank's last weights and alarm, what was recorded, and what rank 0 was told."""
    config = tiny_config("", "", **{"training.num_steps": 12, **overrides})
    state = create_state(config.model, config.training, config.optimizer, world)
    settle_buckets(state, 16, config.training, world)
    order = SampleOrder(index.page_sizes, 1, config.training.global_batch_size, 4)
    batches = local_batches(Layout(order, world.size, 0, config.training.num_steps), index, world.rank)
    observed = Observed() if world.is_first else None
    real_step, loop.train_step = loop.train_step, poisoned(loop.train_step, spikes, nans)
    result, alarm = loop.Result(), None
    try:
        result = loop.train(state, batches, config, world, 1, dict.fromkeys(barred, "barred"), None, observed)
    except RollbackError as error:
        alarm = (error.first, error.stop)
    finally:
        loop.train_step = real_step
    weights = torch.cat([parameter.detach().ravel() for parameter in state.model.parameters()])
    mine = torch.tensor(alarm or (-1, -1))
    saved = [record for _, records in observed.saved for record in records] if observed else []
    return {
        "weights": world.gather(weights),
        "skipped": {record.step: record.skipped for record in [*saved, *result.records] if record.skipped},
        "alarms": world.gather(mine).tolist(),
        "step": state.step,
        "num_skipped": int(state.num_skipped),
        "warnings": observed.warnings if observed else [],
        "saved": [step for step, _ in observed.saved] if observed else [],
        "metrics": observed.train if observed else [],
    }


@pytest.fixture(scope="module")
def ranks(index):
    """Results of `looped` on real gloo ranks, by name."""
    cases = {
        "nan": (2, {"nans": (5,)}),
        "barred": (2, {"barred": (5,)}),
        "clean": (2, {}),
        "row": (3, {"nans": (5, 6, 7)}),
        "spike": (2, {"spikes": (7,), **SPIKES}),
        "late": (2, {"spikes": (7,), **SPIKES, "training.log_every_steps": 100, "checkpoint.every_steps": 5}),
    }
    tasks = [(size, Looped(settings), (index,)) for size, settings in cases.values()]
    return dict(zip(cases, run_ranks(tasks), strict=True))


class Looped:
    """`looped` with its settings, for another process."""

    def __init__(self, settings):
        self.settings = settings

    def __call__(self, world, index):
        return looped(world, index, **self.settings)


def test_nan_on_one_rank_makes_no_update_on_any(ranks):
    nan, barred, clean = ranks["nan"], ranks["barred"], ranks["clean"]
    assert torch.equal(*nan["weights"]) and torch.equal(nan["weights"], barred["weights"])
    assert torch.isfinite(nan["weights"]).all() and not torch.equal(nan["weights"], clean["weights"])
    assert (nan["skipped"], barred["skipped"]) == ({5: "non-finite gradient"}, {5: "barred"})
    for result in (nan, barred):
        assert (result["step"], result["num_skipped"]) == (12, 1)
        losses = [metrics["training_loss"] for _, metrics in result["metrics"]]
        assert len(losses) == 6 and all(map(math.isfinite, losses))
    assert nan["warnings"] == ["step 5 made no update: non-finite gradient."] and barred["warnings"] == []
    assert clean["skipped"] == {} and clean["warnings"] == []


def test_all_ranks_give_the_same_alarm_at_the_same_step(ranks):
    assert ranks["row"]["alarms"] == [[5, 8]] * 3 and ranks["row"]["step"] == 8
    assert ranks["spike"]["alarms"] == [[7, 8]] * 2 and ranks["spike"]["step"] == 8


def test_a_due_checkpoint_judges_first(ranks):
    """The spike of step 7 is found at step 10, where a checkpoint was due though no line was; 5 is the newest."""
    assert ranks["late"]["step"] == 10 and ranks["late"]["saved"] == [5]
    assert ranks["late"]["alarms"][0][0] == 7 and ranks["late"]["alarms"][0] == ranks["late"]["alarms"][1]


# --- Whole runs -----------------------------------------------------------------------------------------------------


@pytest.fixture
def train(tmp_path, monkeypatch):
    """Runs the command in this process in a directory of its own, with poisoned steps; its exit code."""
    write_samples(tmp_path / "samples.tfrecord", 500, seed=1)
    real_step = loop.train_step

    def command(name, spikes=(), nans=(), **overrides):
        settings = {"training.num_steps": 16, **SPIKES, **overrides}
        config = tiny_config(tmp_path / name, tmp_path / "samples.tfrecord", **settings)
        (tmp_path / "config.yaml").write_text(config_to_yaml(config))
        monkeypatch.setattr(loop, "train_step", poisoned(real_step, spikes, nans))
        return main(["train", "--config", str(tmp_path / "config.yaml")]), Directory(str(tmp_path / name))

    return command


def skipped_steps(run):
    history = read_history(run, newest_checkpoint(run, print).name)
    assert [record.step for record in history] == list(range(len(history)))
    return {record.step: record.skipped for record in history if record.skipped}


def test_a_spike_is_left_out_as_if_from_the_beginning(train, monkeypatch, capsys):
    code, run = train("spiked", spikes=(9,))
    said = capsys.readouterr().out
    assert code == 0
    ((first, stop, reason),) = read_barred(run)
    assert first == 9 and reason == "loss spike at step 9"
    assert skipped_steps(run) == dict.fromkeys(range(9, stop), reason)
    assert [(attempt.number, attempt.start_step) for attempt in read_attempts(run)] == [(1, 0), (2, 8)]
    assert "warning: attempt failed, rolled back: loss spike at step 9; step 9 will make no update" in said
    assert "warning: step 9 will make no update: loss spike at step 9." in said
    monkeypatch.setattr(begin, "read_barred", lambda run: ((first, stop, reason),))
    code, whole = train("whole")
    assert code == 0 and len(read_attempts(whole)) == 1
    assert torch.equal(last_weights(run.path), last_weights(whole.path))
    assert main(["verify", run.path]) == 0
    assert "loss spike at step 9" in capsys.readouterr().out


@pytest.mark.parametrize("stop_at", [8, 9, 10, 11, 12])
def test_a_resume_amid_barred_steps(train, monkeypatch, stop_at):
    """The run ends and goes on before, between and after the steps 9 to 11; learning rates are those of 16 steps."""
    barred = ((9, 12, "barred"),)
    monkeypatch.setattr(begin, "read_barred", lambda run: barred)
    _, whole = train("whole")

    real = worker.train

    def interrupted(state, batches, *arguments):
        if state.step >= stop_at:
            return real(state, batches, *arguments)
        batches = (batch for batch in batches if batch.step < stop_at or stop(batch.step))
        return real(state, batches, *arguments)

    def stop(step):
        raise RollbackError(step, step, "a pause")

    monkeypatch.setattr(worker, "train", interrupted)
    code, run = train("paused", **{"checkpoint.every_steps": 1})
    assert code == 0
    assert [attempt.start_step for attempt in read_attempts(run)][-1] == stop_at
    assert skipped_steps(run) == skipped_steps(whole) == dict.fromkeys((9, 10, 11), "barred")
    assert torch.equal(last_weights(run.path), last_weights(whole.path))


def test_where_rollbacks_do_not_help_the_run_ends_with_an_error(train, capsys):
    code, run = train("absurd", **{"optimizer.learning_rate": 1e30, "training.num_steps": 200})
    assert code == 1
    error = capsys.readouterr().err
    assert "Weights that are not finite at step 4 after 3 rollbacks (guard.max_rollbacks is 3): training has" in error
    assert "optimizer.learning_rate" in error and "The checkpoints before are intact." in error
    assert newest_checkpoint(run, print) is None
    assert [attempt.start_step for attempt in read_attempts(run)] == [0] * 4
    assert [barred[:2] for barred in read_barred(run)] == [(1, 4), (4, 4), (4, 4)]


# --- Lookout --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("places", "found"),
    [
        ([(7, 1), (7, 1)], []),
        ([(7, 1), (7, 0), (7, 2)], [1]),
        ([(8, 0), (7, 2), (7, 2)], [1, 2]),
        ([(-1, 0), (0, 1)], [0]),
        ([(7, 1)], []),
    ],
)
def test_ranks_wait_for_those_that_are_behind(places, found):
    assert awaited(dict(enumerate(places))) == found


def test_places_in_words():
    assert [described(place) for place in ((-1, 0), (3, 0), (3, 1), (3, 2))] == [
        "is not ready for its first step",
        "waits for the batch of step 3",
        "computes step 3",
        "has computed step 3",
    ]


# --- Through Ray ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_nodes():
    with cluster(2) as nodes:
        yield nodes


def test_a_stopped_worker_is_named_and_replaced(tmp_path, pace, sample_index, two_nodes):
    """SIGSTOP: the process is there, and answers nothing."""
    run_dir = tmp_path / "run"
    settings = {"training__num_steps": 40, "cluster__num_workers": 2, "cluster__cpus_per_worker": 2}
    arguments = flags(run_dir, **settings, cluster__hang_timeout_s=12)
    with running(two_nodes.address, *arguments, pace=pace) as process:
        wait_until(lambda: logged_steps(run_dir)[-1:] >= [7], process)
        pid = int(pace.with_name("rank-1").read_text())
        os.kill(pid, signal.SIGSTOP)
        wait_until(lambda: len(attempts(run_dir)) == 2, process)
        pace.write_text("0")
        said = finish(process)
    assert "does not answer since" in said
    assert f"warning: rank 1 (process {pid} on " in said and ") is killed and replaced." in said
    assert set(assert_exactly_once(run_dir, 40, sample_index)) == {2}
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


@pytest.mark.nightly
def test_a_worker_that_stands_still_is_named(tmp_path, sample_index, two_nodes):
    """Its process answers, its training does not go on: the others' collective ends by its timeout."""
    run_dir, gate = tmp_path / "run", tmp_path / "gate"
    settings = {"training__num_steps": 60, "cluster__num_workers": 2, "cluster__cpus_per_worker": 2}
    settings |= {"cluster__hang_timeout_s": 12, "cluster__collective_timeout_s": 15}
    program = [sys.executable, str(POISONED), "", "", str(gate)]
    with running(two_nodes.address, *flags(run_dir, **settings), within=program) as process:
        wait_until(lambda: logged_steps(run_dir), process)
        gate.touch()
        wait_until(lambda: len(attempts(run_dir)) == 2, process)
        gate.unlink()
        said = finish(process)
    place = r"warning: rank 1 \(process \d+ on .*\) computes step \d+, for which the others wait, since \d+ s"
    assert re.search(place, said)
    assert "rank 0 (" not in said
    assert set(assert_exactly_once(run_dir, 60, sample_index)) == {2}


def test_a_run_on_a_cluster_is_rolled_back(tmp_path, sample_index, two_nodes):
    """A spike, and a row of gradients that are not finite on the second of two ranks."""
    settings = {"training__num_steps": 30, "cluster__num_workers": 2, "cluster__cpus_per_worker": 2}
    settings |= {"guard__spike_sigma": 50, "guard__spike_window": 4}
    program = [sys.executable, str(POISONED), "7", "17,18,19", "no gate"]
    with running(two_nodes.address, *flags(tmp_path / "run", **settings), within=program) as process:
        said = finish(process)
    run = Directory(str(tmp_path / "run"))
    assert read_barred(run) == (
        (7, 8, "loss spike at step 7"),
        (17, 20, "non-finite gradient 3 times in a row from step 17"),
    )
    assert [start for _, start in attempts(run.path)] == [0, 5, 15]
    assert set(assert_exactly_once(run.path, 30, sample_index)) == {2}
    assert skipped_steps(run) == reasons(read_barred(run))
    assert said.count("attempt failed, rolled back: ") == 2
