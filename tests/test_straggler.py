"""Stragglers: a slow rank is named, one whose data is late is told apart, and those who wait for them are neither."""

import math
import re
import socket
import time

import pytest
from faults import scene
from helpers import tiny_config
from nodes import wait_until
from ranks import run_ranks
from test_loop import Observed

from raybert import loop, straggler
from raybert.feed import Layout, local_batches
from raybert.order import SampleOrder
from raybert.step import create_state, settle_buckets
from raybert.straggler import LASTS_S, NUM_WINDOWS, Pace, Stragglers

# --- The rule -------------------------------------------------------------------------------------------------------


def told(windows, window_s=LASTS_S):
    """What is told window by window, of paces (compute_s, wait_s) by rank."""
    stragglers = Stragglers([f"host-{rank}" for rank in range(len(windows[0]))])
    ends = enumerate([[Pace(*pace) for pace in paces] for paces in windows])
    return [list(stragglers.judge(paces, number * window_s)) for number, paces in ends]


FINE = (0.10, 0.0)


@pytest.mark.parametrize(
    ("paces", "words"),
    [
        ([FINE], None),
        ([FINE, FINE, FINE], None),
        ([FINE, (0.14, 0.0), FINE], None),
        ([FINE, (0.16, 0.0), FINE], "rank 1 (host-1) is slow: it computes 0.160 s a step, the median of all ranks is"),
        ([(0.3, 0.0), FINE], "rank 0 (host-0) is slow: it computes 0.300 s a step, the median of all ranks is 0.100 s"),
        ([(0.3, 0.0), (0.3, 0.0), (0.3, 0.0)], None),  # nobody waits for anybody
        (
            [FINE, FINE, (0.1, 0.06)],
            "rank 2 (host-2) waits for data: 0.060 s a step, the median of all ranks is 0.000 s",
        ),
        ([FINE, FINE, (0.1, 0.04)], None),
        ([(0.1, 0.5), (0.1, 0.52), (0.1, 0.5)], None),  # all wait: that is the feed, as `data_wait` says
        ([(0.001, 0.0), (0.009, 0.0), (0.001, 0.0)], None),  # noise of the machine
    ],
)
def test_who_is_named(paces, words):
    *before, last, after = told([paces] * (NUM_WINDOWS + 2))
    assert before == [[]] * NUM_WINDOWS and after == []
    if words is None:
        assert last == []
    else:
        assert len(last) == 1 and last[0].startswith(words) and last[0].endswith("; the others wait for it.")


def test_a_rank_is_named_once_and_when_it_is_over():
    slow, fine = [FINE, (0.3, 0.0), FINE], [FINE, FINE, FINE]
    said = [(number, text) for number, texts in enumerate(told([slow] * 9 + [fine] * 9 + [slow] * 9)) for text in texts]
    assert [number for number, _ in said] == [5, 11, 21]
    assert said[1][1].startswith("rank 1 (host-1) no longer is slow: it computes 0.100 s a step")
    assert said[2][1] == said[0][1]


def test_a_rank_is_named_after_half_a_minute():
    said = told([[FINE, (0.3, 0.0), FINE]] * 15, window_s=LASTS_S / 10)
    assert said[:-1] == [[]] * 14 and len(said[-1]) == 1


def test_one_long_window_names_nobody():
    slow, fine = [FINE, (9.0, 0.0), FINE], [FINE, FINE, FINE]
    assert told(([fine] * 4 + [slow]) * 4) == [[]] * 20


def test_a_window_that_tells_nothing_is_left_out():
    slow, none = [FINE, (0.3, 0.0), FINE], [FINE, (math.nan, 0.0), FINE]
    said = told([none, slow, slow, none, slow, slow, slow, slow])
    assert said[:-1] == [[]] * 7 and len(said[-1]) == 1


# --- Ranks ----------------------------------------------------------------------------------------------------------

NUM_STEPS, STEP_S, LATE_S, UNTIL = 36, 0.05, 0.1, 16


def looped(world, index, slow, late):
    """Train with a rank that is slow in its steps, one whose batches come late, until a step; what rank 0 is told."""
    straggler.LASTS_S = 0.0
    config = tiny_config("", "", **{"training.num_steps": NUM_STEPS, "checkpoint.every_steps": 1000})
    state = create_state(config.model, config.training, config.optimizer, world)
    settle_buckets(state, 16, config.training, world)
    order = SampleOrder(index.page_sizes, 1, config.training.global_batch_size, 4)
    observed, real_step = Observed() if world.is_first else None, loop.train_step

    def step(state, batch, *arguments):
        time.sleep(STEP_S + (LATE_S if world.rank == slow and batch.step < UNTIL else 0))
        return real_step(state, batch, *arguments)

    def batches():
        for batch in local_batches(Layout(order, world.size, 0, NUM_STEPS), index, world.rank):
            if world.rank == late and batch.step < UNTIL:
                time.sleep(STEP_S + 2 * LATE_S)  # while the step before is computed, of which one may be slow
            yield batch

    loop.train_step = step
    try:
        loop.train(state, batches(), config, world, 1, {}, None, observed)
    finally:
        loop.train_step = real_step
    return observed and observed.warnings


@pytest.fixture(scope="module")
def ranks(index):
    """Results of `looped` on real gloo ranks, by (world size, slow rank, late rank)."""
    cases = [(3, 1, None), (3, None, 2), (3, 2, 0), (2, 0, None), (2, None, 1), (3, None, None)]
    return dict(zip(cases, run_ranks([(size, looped, (index, *who)) for size, *who in cases]), strict=True))


def assert_told(texts, rank, what):
    """Said once that it began and once that it ended, with figures that differ by what the rank was late, then not."""
    figures = r"([\d.]+) s a step, the median of all ranks is ([\d.]+) s"
    who = re.escape(f"rank {rank} ({socket.gethostname()})")
    began, ended = texts
    mine_s, median_s = map(float, re.match(f"{who} {what} {figures}; the others wait for it", began).groups())
    assert mine_s - median_s > LATE_S / 2
    mine_s, median_s = map(float, re.match(f"{who} no longer {what} {figures}", ended).groups())
    assert mine_s - median_s < LATE_S / 2


@pytest.mark.parametrize(("size", "rank"), [(3, 1), (2, 0)])
def test_a_slow_rank_is_named(ranks, size, rank):
    assert_told(ranks[size, rank, None], rank, "is slow: it computes")


@pytest.mark.parametrize(("size", "rank"), [(3, 2), (2, 1)])
def test_a_rank_whose_data_is_late_is_not_slow(ranks, size, rank):
    assert_told(ranks[size, None, rank], rank, "waits for data:")


def test_both_are_told_apart(ranks):
    texts = [text for text in ranks[3, 2, 0] if "no longer" not in text]
    assert [text[:7] + text[text.index(")") + 1 :].split(":")[0] for text in texts] == [
        "rank 2  is slow",
        "rank 0  waits for data",
    ]


def test_ranks_that_are_alike_are_not_named(ranks):
    assert ranks[3, None, None] == []


# --- On a cluster ---------------------------------------------------------------------------------------------------


@pytest.mark.nightly
def test_a_run_names_the_slow_rank_and_says_when_it_is_over(tmp_path):
    with scene(tmp_path, 2, training__num_steps=10_000, cluster__num_workers=2) as stage:

        def said(text):
            return lambda: text in stage.process.read_output()

        own = stage.pace.with_name("pace-1")
        own.write_text("0.8")
        wait_until(said("is slow: it computes"), stage.process)
        own.write_text(stage.pace.read_text())
        wait_until(said("no longer is slow"), stage.process)
        lines = [line for line in stage.process.read_output().splitlines() if "is slow" in line]
        assert [line[:15] for line in lines] == ["warning: rank 1"] * 2
        assert stage.process.poll() is None
