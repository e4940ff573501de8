"""The history: who owns a run, and which steps the newest checkpoint was trained on."""

import json
from dataclasses import asdict

import numpy as np
import pytest

from raybert.history import (
    ATTEMPTS,
    CHECKSUM_LIMIT,
    Arrival,
    Attempt,
    FencedError,
    StepRecord,
    begin_attempt,
    check_newest,
    checksum,
    newest_attempt,
    read_attempts,
    read_history,
    write_records,
)


def records(steps, attempt, world_size=2, skipped=None):
    arrivals = [[Arrival(32 * step + rank, 32 * step + 16, 2**32 - 1 - step) for rank in range(world_size)]
                for step in steps]  # fmt: skip
    return [StepRecord(step, attempt, tuple(mine), skipped) for step, mine in zip(steps, arrivals, strict=True)]


def test_attempts_count_from_one(run):
    assert newest_attempt(run) == 0 and read_attempts(run) == []
    attempts = [begin_attempt(run, world_size, 4 * world_size, None) for world_size in (2, 3)]
    attempts.append(begin_attempt(run, 1, 12, "step-00000012-attempt-0002"))
    assert [attempt.number for attempt in attempts] == [1, 2, 3]
    assert read_attempts(run) == attempts
    assert newest_attempt(run) == 3


@pytest.mark.parametrize("number", [9, 99, 9999, 12345])
def test_attempts_are_in_order_however_many_there_were(run, number):
    before = Attempt(number, 1, 0, None, "2026-01-01T00:00:00+00:00")
    (run / ATTEMPTS).write(f"{number:04d}.json", json.dumps(asdict(before)).encode())
    after = begin_attempt(run, 1, 0, None)
    assert after.number == newest_attempt(run) == number + 1
    assert read_attempts(run) == [before, after]


def test_only_the_newest_attempt_may_write(run):
    first = begin_attempt(run, 2, 0, None)
    check_newest(run, first.number)
    second = begin_attempt(run, 2, 0, None)
    check_newest(run, second.number)
    with pytest.raises(FencedError, match=r"attempt 1 may not write .* since attempt 2 .*another run_dir"):
        check_newest(run, first.number)


def test_a_write_that_was_cut_off_is_no_attempt(run):
    begin_attempt(run, 1, 0, None)
    (run / ATTEMPTS).write(".0002.json.0123abcd", b"{")
    assert newest_attempt(run) == len(read_attempts(run)) == 1


@pytest.mark.parametrize("skipped", [None, "non-finite gradient"])
@pytest.mark.parametrize("world_size", [1, 7])
def test_records_come_back_as_they_were(run, skipped, world_size):
    written = records(range(3), 1, world_size, skipped)
    write_records(run, "a", None, written)
    assert read_history(run, "a") == written


def test_history_follows_parents_and_nothing_else(run):
    """Attempt 1 saved a (steps 0-3) and b (4-7); b was damaged, so attempt 2 went on from a to c and d."""
    a, b = records(range(4), 1), records(range(4, 8), 1)
    c, d = records(range(4, 6), 2, world_size=3), records(range(6, 9), 2, world_size=3)
    for name, parent, content in (("a", None, a), ("b", "a", b), ("c", "a", c), ("d", "c", d), ("e", "d", [])):
        write_records(run, name, parent, content)
    assert read_history(run, None) == []
    assert read_history(run, "a") == a
    assert read_history(run, "b") == a + b
    assert read_history(run, "e") == read_history(run, "d") == a + c + d
    assert [record.step for record in read_history(run, "d")] == list(range(9))


def test_a_missing_link_is_an_error(run):
    write_records(run, "b", "a", records(range(4, 8), 1))
    with pytest.raises(FileNotFoundError):
        read_history(run, "b")


def test_checksum_is_of_samples_at_positions_in_any_order():
    batches = [
        [(0, 1), (1, 2)],
        [(0, 2), (1, 1)],
        [(0, 1)],
        [(1, 0)],
        [(0, 2)],
        [(1, 1)],
        [],
        [(0, 1), (1, 2), (1, 2)],
        [(0, 1), (1, 2 + 2**40)],
    ]
    found = {checksum(*np.array(batch, np.int64).reshape(-1, 2).T) for batch in batches}
    assert len(found) == len(batches) and all(0 <= value < CHECKSUM_LIMIT for value in found)
    assert checksum(np.array([0, 1]), np.array([1, 2])) == checksum(np.array([1, 0]), np.array([2, 1], ">i4"))


def test_checksums_of_parts_add_up():
    positions, samples = np.arange(10**12, 10**12 + 1000), np.random.default_rng(1).permutation(1000)
    parts = [checksum(positions[rank::7], samples[rank::7]) for rank in range(7)]
    assert sum(parts) % CHECKSUM_LIMIT == checksum(positions, samples) != checksum(positions, samples[::-1])


def test_no_bit_of_a_checksum_is_idle():
    """One sample or position that is another by one changes each bit in half of the cases."""
    changed = np.zeros(63)
    for k in range(1000):
        before = checksum(np.array([k]), np.array([k]))
        for after in (checksum(np.array([k + 1]), np.array([k])), checksum(np.array([k]), np.array([k + 1]))):
            changed += [(before ^ after) >> bit & 1 for bit in range(63)]
    assert (changed / 2000).min() > 0.4 and (changed / 2000).max() < 0.6
