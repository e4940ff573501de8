"""The ledger: what is known of every attempt, and what a run's time went into."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
from drivers import Driver, a_driver
from helpers import tiny_config, write_samples

from raybert.cli import main
from raybert.config_file import config_to_yaml
from raybert.entry import DRIVER_LOST, FINISHED, INTERRUPTED, LEDGER, Entry, read_ledger
from raybert.events import Event
from raybert.goodput import lines, summarize
from raybert.history import begin_attempt, newest_attempt, read_attempts
from raybert.ledger import SUMMARY, WRITE_EVERY_S

ROOT = Path(__file__).parents[1]


def test_an_entry_says_what_became_of_an_attempt(run):
    driver = a_driver(run)
    first, second = read_ledger(run)
    assert first == Entry(
        attempt=1,
        world_size=2,
        start_step=0,
        driver_began_at_s=1000,
        began_at_s=1010,
        seen_at_s=1040,
        last_step=10,
        committed_step=8,
        first_step_at_s=1015,
        last_step_at_s=1035,
        timed_steps=10,
        training_s=20,
        ended_at_s=1040,
        reason="a worker died",
    )
    assert (second.start_step, second.last_step, second.reason) == (8, 20, FINISHED)
    assert first.is_failed and not second.is_failed
    assert driver.warnings == []


def test_seconds_by_state_add_up_to_the_wall_time(run):
    a_driver(run)
    summary = summarize(read_ledger(run))
    assert asdict(summary.seconds) == pytest.approx(
        {
            "useful": 16 + 48,
            "redone": 4,
            "starting": 5 + 10,
            "preparing": 10,
            "waiting": 20,
            "other": 5 + 2,  # from step 10 to the failure; from step 20 to the end
        }
    )
    assert summary.seconds.total == pytest.approx(summary.wall_s) == 120
    assert summary.goodput == pytest.approx(64 / 120)
    assert (summary.useful_steps, summary.redone_steps, summary.restarts) == (20, 2, 1)
    assert summary.stopped_s == 0
    first, second = summary.attempts
    assert (first.useful_steps, first.redone_steps, first.lost_s) == (8, 2, None)
    assert (second.useful_steps, second.redone_steps, second.lost_s) == (12, 0, 35)


def test_worker_seconds_are_what_a_price_is_for(run):
    a_driver(run)
    summary = summarize(read_ledger(run), price_per_worker_hour=36)
    # 20 s between the attempts: one worker was there before and after.
    assert asdict(summary.worker_seconds) == pytest.approx(
        {
            "useful": 2 * 16 + 48,
            "redone": 2 * 4,
            "starting": 2 * 5 + 10,
            "preparing": 2 * 10,
            "waiting": 20,
            "other": 2 * 5 + 2,
        }
    )
    assert summary.cost == pytest.approx(0.01 * summary.worker_seconds.total) == pytest.approx(1.6)
    assert summary.useful_cost == pytest.approx(0.8)
    assert summarize(read_ledger(run)).cost is None


def test_three_lines_for_a_person(run):
    a_driver(run)
    entries = read_ledger(run)
    first, second = lines(summarize(entries))
    assert first == "Goodput 53.3 %: 64 s of 120 s; 1 restart, 2 steps done again"
    rest = "10 s preparing (Ray, index), 15 s starting workers, 20 s waiting, 4 s done again, 7 s evaluation and other"
    assert second == f"  the rest: {rest}"
    *_, third = lines(summarize(entries, 36))
    assert third == "  cost 1.60 (0.04 worker hours at 36), of it 0.80 useful"


def test_the_summary_is_written_when_the_driver_ends(run):
    a_driver(run)
    assert json.loads(run.read(SUMMARY)) == json.loads(json.dumps(asdict(summarize(read_ledger(run)))))


def test_time_between_drivers_is_apart(run):
    a_driver(run)
    before = summarize(read_ledger(run))
    driver = Driver(run, 5000, number=2)
    driver.at(5010).begin(1, 20)
    driver.at(5020).train(25, 2.0)
    driver.at(5020).checkpoint(25)
    driver.ledger.end(FINISHED)
    summary = summarize(read_ledger(run))
    assert summary.stopped_s == 5000 - 1120
    assert summary.wall_s == pytest.approx(before.wall_s + 20)
    assert summary.seconds.useful == pytest.approx(before.seconds.useful + 10)
    assert summary.attempts[-1].lost_s is None
    assert "3,880 s between drivers (apart)" in "\n".join(lines(summary))


def test_a_driver_that_was_lost_is_found_by_the_next(run):
    driver = Driver(run)
    driver.at(1010).begin(1)
    driver.at(1020).train(10, 1.0)
    driver.at(1021).checkpoint(10)
    driver.at(1025).train(15, 1.0)  # not written: ten seconds have not passed
    assert read_ledger(run)[0].last_step == 10 and read_ledger(run)[0].reason is None
    driver.at(1032).train(22, 1.0)
    assert read_ledger(run)[0].last_step == 22
    Driver(run, 2000)
    (entry,) = read_ledger(run)
    assert (entry.reason, entry.ended_at_s) == (DRIVER_LOST, 1032)
    summary = summarize([entry])
    assert (summary.wall_s, summary.redone_steps) == (32, 12)


@pytest.mark.parametrize(("lost_at_s", "seen_at_s"), [(1015, 1010), (1020, 1020), (1029, 1020), (1031, 1030)])
def test_a_driver_is_seen_every_ten_seconds(run, lost_at_s, seen_at_s):
    driver = Driver(run)
    driver.at(1010).begin(1)
    for now_s in range(1010, lost_at_s + 1):
        driver.at(now_s).ledger.refresh()
    assert read_ledger(run)[0].seen_at_s == seen_at_s
    assert WRITE_EVERY_S == 10


def test_a_driver_that_waits_for_nodes_is_seen_too(run):
    driver = Driver(run)
    driver.at(1010).begin(4)
    driver.at(1020).ledger.show(Event("failure", text="a worker died"))
    driver.at(1500).ledger.refresh()
    driver.at(1600).ledger.end(INTERRUPTED)
    (entry,) = read_ledger(run)
    assert (entry.reason, entry.ended_at_s, entry.seen_at_s) == ("a worker died", 1020, 1600)
    seconds = summarize([entry]).seconds
    assert (seconds.preparing, seconds.waiting) == (10, 580)


@pytest.mark.parametrize("text", ["drain", "grow", "there are more nodes: from 2 to 3 workers"])
def test_a_resize_ends_an_attempt_by_its_text(run, text):
    """The hold saved step 7, which no report of progress came to: its step counts at the speed of the others."""
    driver = Driver(run)
    driver.at(1000).begin(2)
    driver.at(1005).train(5, 1.0)
    driver.at(1008).checkpoint(7)
    driver.at(1009).ledger.show(Event("resize", text=text))
    driver.at(1012).begin(3, 7)
    first, _ = read_ledger(run)
    assert (first.reason, first.ended_at_s, first.last_step) == (text, 1009, 7)
    assert first.is_planned and not first.is_failed
    summary = summarize(read_ledger(run))
    assert (summary.useful_steps, summary.redone_steps) == (7, 0)
    assert summary.seconds.useful == pytest.approx(7)


@pytest.mark.parametrize(("world_size", "reason"), [(3, "resize: from 2 to 3 workers"), (2, "restart")])
def test_an_end_that_nobody_told_is_the_next_begin(run, world_size, reason):
    driver = Driver(run)
    driver.at(1000).begin(2)
    driver.at(1030).begin(world_size)
    (first, _) = read_ledger(run)
    assert (first.reason, first.ended_at_s, first.is_failed) == (reason, 1030, world_size == 2)


def test_an_attempt_that_was_cut_off_is_not_listened_to(run):
    driver = Driver(run)
    driver.at(1000).begin(2)
    driver.at(1030).begin(1)
    before = read_ledger(run)
    driver.at(1050).train(99, 1.0, attempt=1)
    driver.at(1050).checkpoint(99, attempt=1)
    assert read_ledger(run) == before


def test_the_wait_for_the_first_batch_is_starting(run):
    driver = Driver(run)
    driver.at(1000).begin(1)
    driver.at(1020).train(2, 10.0, data_wait=0.8)
    driver.at(1040).train(4, 10.0, data_wait=0.8)
    driver.ledger.end(FINISHED)
    seconds = summarize(read_ledger(run)).seconds
    assert (seconds.starting, seconds.useful + seconds.redone) == (16, pytest.approx(24))


def test_steps_that_a_damaged_checkpoint_costs_are_not_useful(run):
    """Attempt 3 fell back behind attempt 2's start: of what attempt 1 did only steps 0 to 3 are in the result."""
    driver = Driver(run)
    for at_s, start, stop in ((1000, 0, 10), (1100, 8, 20), (1200, 4, 12)):
        driver.at(at_s).begin(1, start)
        driver.at(at_s + 50).train(stop, 1.0)
        driver.checkpoint(stop)
    driver.ledger.end(FINISHED)
    summary = summarize(read_ledger(run))
    assert [attempt.useful_steps for attempt in summary.attempts] == [4, 0, 8]
    assert [attempt.redone_steps for attempt in summary.attempts] == [6, 12, 0]


@pytest.mark.parametrize(("commits", "useful"), [(True, [6, 4]), (False, [4, 0])])
def test_steps_before_a_snapshot_are_useful_once_a_checkpoint_carries_them(run, commits, useful):
    """An attempt that came to step 7, its checkpoint at 4, and one that began from a snapshot at 6."""
    driver = Driver(run)
    driver.at(1010).begin(2, committed_step=0)
    driver.at(1020).checkpoint(4)
    driver.at(1030).train(7, 2.0)
    driver.at(1040).begin(2, 6, committed_step=4)
    driver.at(1060).train(10, 2.0)
    if commits:
        driver.at(1061).checkpoint(10)
    driver.at(1062).ledger.end(FINISHED)
    summary = summarize(read_ledger(run))
    assert [attempt.useful_steps for attempt in summary.attempts] == useful
    assert (summary.useful_steps, summary.redone_steps) == (sum(useful), 11 - sum(useful))


def test_a_later_start_shows_what_a_lost_driver_did_not_write(run):
    driver = Driver(run)
    driver.at(1000).begin(1)
    driver.at(1010).train(5, 2.0)
    after = Driver(run, 2000, number=1)
    after.at(2000).begin(1, 8)
    after.at(2002).train(10, 1.0)
    after.checkpoint(10)
    after.ledger.end(FINISHED)
    summary = summarize(read_ledger(run))
    assert [attempt.useful_steps for attempt in summary.attempts] == [8, 2]


def test_clocks_that_disagree_make_no_negative_seconds(run):
    """Workers report more seconds in steps than the driver saw pass."""
    driver = Driver(run)
    driver.at(1000).begin(1)
    driver.at(1001).train(5, 1.0)
    driver.at(1001).checkpoint(5)
    driver.ledger.end(FINISHED)
    summary = summarize(read_ledger(run))
    assert min(asdict(summary.seconds).values()) == 0 and summary.seconds.total == summary.wall_s == 1
    assert summary.goodput <= 1


def test_a_step_that_never_came(run):
    driver = Driver(run)
    driver.at(1000).begin(1)
    driver.at(1100).ledger.end("no room")
    summary = summarize(read_ledger(run))
    assert (summary.seconds.starting, summary.goodput) == (100, 0)
    assert next(lines(summary)) == "Goodput 0.0 %: 0 s of 100 s; 0 restarts, 0 steps done again"
    assert summarize([]).goodput == 0 and math.isfinite(summarize([]).wall_s)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (None, FINISHED),
        (KeyboardInterrupt(), INTERRUPTED),
        (ValueError("no room\nat all"), "no room"),
        (RuntimeError(), "RuntimeError"),
    ],
)
def test_the_context_ends_by_what_it_is_left_with(run, error, reason):
    driver = Driver(run)
    try:
        with driver.ledger:
            driver.begin(1)
            if error:
                raise error
    except type(error):
        pass
    assert read_ledger(run)[0].reason == reason


def test_a_driver_without_an_attempt_writes_nothing(run):
    with Driver(run).ledger as ledger:
        ledger.refresh()
    assert run.names() == []


def test_a_storage_that_fails_is_warned_of_once(run, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / LEDGER).write_text("in the way")
    driver = Driver(run)
    driver.begin(1)
    driver.at(1020).train(5, 1.0)
    driver.at(1040).checkpoint(5)
    driver.ledger.end(FINISHED)
    (warning,) = driver.warnings
    assert warning.startswith("the ledger of attempts is not complete, the run itself goes on: ")


def test_a_damaged_entry_is_named(run):
    a_driver(run)
    (run / LEDGER).write("0001.json", b'{"attempt": 1')
    with pytest.raises(ValueError, match=r"^ledger/0001.json is damaged: "):
        read_ledger(run)
    assert len(Driver(run).warnings) == 1


def test_attempts_that_fence_are_left_alone(run):
    begin_attempt(run, 1, 0, None)
    before = read_attempts(run)
    a_driver(run)
    assert read_attempts(run) == before and newest_attempt(run) == 1


# Real runs, in one process


SETTINGS = {"training.log_every_steps": 5, "checkpoint.every_steps": 10, "cluster.price_per_worker_hour": 3.6}


def write_config(folder, **overrides):
    write_samples(folder / "samples.tfrecord", 500, seed=1)
    config = tiny_config(folder / "run", folder / "samples.tfrecord", **SETTINGS | overrides)
    (folder / "config.yaml").write_text(config_to_yaml(config))
    return str(folder / "config.yaml")


def start(config_file):
    """The command in a process of its own."""
    command = [sys.executable, str(ROOT / "run.py"), "train", "--config", config_file]
    known = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "PYTEST_"))}
    known |= {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(command, env=known, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def interrupted(config_file, number):
    """A run that is sent a signal after its first checkpoint; its exit code."""
    with start(config_file) as process:
        for line in process.stdout:
            if line.startswith("checkpoint step-"):
                break
        process.send_signal(number)
        process.stdout.read()
    return process.returncode


@pytest.mark.parametrize(
    ("number", "reason"), [(signal.SIGTERM, INTERRUPTED), (signal.SIGKILL, DRIVER_LOST)], ids=["interrupted", "killed"]
)
def test_a_run_that_is_resumed_adds_up(tmp_path, run, capsys, number, reason):
    config_file = write_config(tmp_path, **{"training.num_steps": 100_000})
    assert interrupted(config_file, number) == (128 + number if number == signal.SIGTERM else -number)
    reached = read_ledger(run)[0].last_step
    num_steps = reached + 100
    assert main(["train", "--config", config_file, f"--training.num_steps={num_steps}"]) == 0
    said = capsys.readouterr().out
    first, second = read_ledger(run)
    starts = [attempt.start_step for attempt in read_attempts(run)]
    assert (first.reason, second.reason) == (reason, FINISHED)
    assert [first.start_step, second.start_step] == starts and starts[1] >= 10
    assert (second.last_step, second.committed_step) == (num_steps, num_steps)
    summary = json.loads(run.read(SUMMARY))
    assert summary == json.loads(json.dumps(asdict(summarize([first, second], 3.6))))
    assert summary["useful_steps"] == num_steps
    assert summary["redone_steps"] == max(0, first.last_step - starts[1])
    assert sum(summary["seconds"].values()) == pytest.approx(summary["wall_s"])
    assert 0 < summary["goodput"] < 1 and summary["stopped_s"] > 0
    assert summary["cost"] == pytest.approx(summary["wall_s"] / 1000)
    (goodput,) = (line for line in said.splitlines() if line.startswith("Goodput "))
    assert f" s; 1 restart, {summary['redone_steps']} step" in goodput
    assert main(["verify", run.path]) == 0
    assert goodput in capsys.readouterr().out.splitlines()
    assert main(["verify", run.path, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["summary"] == summary


def test_a_finished_run_shows_its_goodput_again_and_writes_nothing(tmp_path, run, capsys):
    config_file = write_config(tmp_path)
    assert main(["train", "--config", config_file]) == 0
    (first,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("Goodput "))
    before = {path: path.stat().st_mtime_ns for path in Path(run.path).rglob("*")}
    assert main(["train", "--config", config_file]) == 0
    assert first in capsys.readouterr().out.splitlines()
    assert {path: path.stat().st_mtime_ns for path in Path(run.path).rglob("*")} == before


def test_a_failed_run_ends_with_its_error(tmp_path, run):
    with start(write_config(tmp_path, **{"training.num_steps": 200, "optimizer.learning_rate": 1e30})) as process:
        _, errors = process.communicate(timeout=150)
    assert process.returncode == 1
    assert read_ledger(run)[-1].reason == errors.removeprefix("raybert: error: ").strip()
    assert "training has diverged" in read_ledger(run)[-1].reason


def test_a_damaged_ledger_stops_neither_a_run_nor_its_verification(tmp_path, run, capsys):
    config_file = write_config(tmp_path)
    assert main(["train", "--config", config_file]) == 0
    (run / LEDGER).write("0001.json", b"{")
    assert main(["train", "--config", config_file, "--training.num_steps=12"]) == 0
    said = capsys.readouterr().out
    assert "warning: the ledger of attempts is not complete, the run itself goes on: ledger/0001.json" in said
    assert "warning: what the run cost is not known: ledger/0001.json is damaged" in said
    assert main(["verify", run.path]) == 1
    assert "ledger/0001.json is damaged" in capsys.readouterr().out
    shutil.rmtree(Path(run.path) / LEDGER)
    assert main(["verify", run.path]) == 0
