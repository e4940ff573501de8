"""What a person sees: a block that is kept up to date on a terminal, plain lines in a log."""

import math
import re
from dataclasses import replace
from io import StringIO

import pytest
from rich.console import Console

from raybert.display import Display, attempt_line, broken_lines, evaluation_line, progress_line
from raybert.events import Event
from raybert.view import View, block, duration, sparkline

METRICS = {
    "training_loss": 9.87654,
    "masked_lm_accuracy": 0.12345,
    "next_sentence_accuracy": 0.5,
    "learning_rate": 0.00012,
    "samples_per_s": 12345.6,
    "tokens_per_s": 1234567.8,
    "data_wait": 0.0123,
    "world_size": 3,
}
HELD_OUT = {
    "lm_example_loss": 6.54321,
    "masked_lm_accuracy": 0.1,
    "next_sentence_loss": 0.7,
    "next_sentence_accuracy": 0.6,
}
EVENTS = [
    Event("attempt", 0, "", {"number": 1, "world_size": 3}),
    Event("train", 10, metrics=METRICS),
    Event("train", 20, metrics=METRICS),
    Event("eval", 20, metrics=HELD_OUT),
    Event("checkpoint", 20, "step-00000020-attempt-0001"),
    Event("warning", text="checkpoint [bold]x[/bold] is damaged"),
    Event("train", 30, metrics=METRICS),
]


def without(metrics, *names):
    return {name: value for name, value in metrics.items() if name not in names}


def shown(events, **console):
    output = StringIO()
    with Display(100, Console(file=output, **console)) as display:
        for event in events:
            display.show(event)
    return output.getvalue()


def test_a_progress_line():
    line = "step 10/100  loss 9.877  mlm acc 0.123  nsp acc 0.500  lr 1.20e-04  12,346 samples/s  1,234,568 tokens/s"
    assert progress_line(10, 100, METRICS, None) == f"{line}  wait 1.2%  3 workers"
    assert progress_line(10, 100, METRICS | {"world_size": 1}, 75) == f"{line}  wait 1.2%  1 worker  1m15s left"
    on_gpus = progress_line(10, 100, METRICS | {"mfu": 0.4512}, None)
    assert on_gpus == f"{line}  mfu 45.1%  wait 1.2%  3 workers"
    masked_only = progress_line(10, 100, without(METRICS, "next_sentence_accuracy"), None)
    assert masked_only == f"{line}  wait 1.2%  3 workers".replace("nsp acc 0.500  ", "")


def test_a_commit_that_is_overdue_is_shown_with_its_age():
    """Once two checkpoints are missing, until one is complete; an attempt is as old as what it begins from."""
    output = StringIO()
    with Display(100, Console(file=output, width=200), save_every_steps=10) as display:
        for event in [Event("attempt", 0, metrics={"number": 1, "world_size": 1}), train(19), train(20), train(30),
                      Event("checkpoint", 20, "step-00000020-attempt-0001"), train(39), train(40),
                      Event("attempt", 20, metrics={"number": 2, "world_size": 1}), train(40),
                      Event("attempt", 30, metrics={"number": 3, "world_size": 1}), train(40), train(50)]:  # fmt: skip
            display.show(event)
    lines = [line for line in output.getvalue().splitlines() if line.startswith("step ")]
    assert ["last commit 0s ago" in line for line in lines] == [False, True, True, False, True, True, False, True]
    assert progress_line(20, 100, METRICS, 5, 725).endswith("5s left  last commit 12m05s ago")


def test_an_overdue_commit_is_told_from_those_before_where_their_distance_changes():
    """The median of the last five: one that came late, or was asked for, does not count for more."""
    output = StringIO()
    with Display(999, Console(file=output, width=200)) as display:
        display.show(train(500))  # nothing is known yet
        for step in (500, 510, 520, 525):  # the distances are 500, 10, 10 and 5
            display.show(Event("checkpoint", step, "name"))
        for step in (544, 545):
            display.show(train(step))
    lines = [line for line in output.getvalue().splitlines() if line.startswith("step ")]
    assert ["last commit 0s ago" in line for line in lines] == [False, False, True]


def train(step):
    return Event("train", step, metrics=METRICS)


def test_an_evaluation_line():
    line = "held-out at step 20: mlm loss 6.543  mlm acc 0.100"
    assert evaluation_line(20, HELD_OUT) == f"{line}  nsp loss 0.700  nsp acc 0.600"
    assert evaluation_line(20, without(HELD_OUT, "next_sentence_loss", "next_sentence_accuracy")) == line


@pytest.mark.parametrize(
    ("event", "line"),
    [
        (Event("attempt", 0, "", {"number": 1, "world_size": 1}), "attempt 1: 1 worker, from step 0"),
        (Event("attempt", 8, "name", {"number": 12, "world_size": 3}), "attempt 12: 3 workers, from step 8 (name)"),
    ],
)
def test_an_attempt_line(event, line):
    assert attempt_line(event) == line


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"),
        (59.4, "59s"),
        (59.6, "1m00s"),
        (185, "3m05s"),
        (3599.6, "1h00m"),
        (7620, "2h07m"),
        (360000, "100h00m"),
    ],
)
def test_a_duration(seconds, text):
    assert duration(seconds) == text


def test_why_an_attempt_ends():
    lines = shown([Event("failure", text="a worker died"), Event("resize", text="there are more nodes")]).splitlines()
    failed = "warning: attempt failed, a worker died; another one begins."
    assert lines == [failed, "there are more nodes"]


def test_a_log_has_plain_lines():
    """Whole ones, however long, and nothing but text."""
    lines = shown(EVENTS, width=20).splitlines()
    assert lines[0] == "attempt 1: 3 workers, from step 0"
    steps = [line for line in lines if line.startswith("step ")]
    assert [line.partition("  ")[0] for line in steps] == ["step 10/100", "step 20/100", "step 30/100"]
    assert lines[3] == evaluation_line(20, HELD_OUT)
    assert lines[4:6] == ["checkpoint step-00000020-attempt-0001", "warning: checkpoint [bold]x[/bold] is damaged"]
    assert len(lines) == len(EVENTS) and all(line.endswith(" left") for line in steps)
    assert "\x1b" not in "".join(lines)


def test_a_terminal_has_a_block_that_is_kept_up_to_date():
    """It is written over; what stays is printed above it, but checkpoints, which it shows; the cursor is given back."""
    text = shown(EVENTS, force_terminal=True, width=80)
    assert "\x1b[2K" in text
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") == 1
    lines = screen(text)
    assert lines[:3] == [
        "attempt 1: 3 workers, from step 0",
        evaluation_line(20, HELD_OUT),
        "warning: checkpoint [bold]x[/bold] is damaged",
    ]
    assert re.fullmatch(r"━+  30/100  30%  \d+s left", lines[3]) and len(lines[3]) == 80
    assert [line.rstrip() for line in lines[4:]] == [
        "loss      9.877   ▁▁▁",
        "mlm acc   0.123   0.100 held-out",
        "nsp acc   0.500   0.600 held-out",
        "speed     12,346 samples/s   1,234,568 tokens/s   1.2% waiting for data",
        "run       3 workers   1.20e-04 lr",
        "saved     step 20   0s ago",
    ]


def test_a_run_that_is_done_has_no_time_left():
    last = replace(FULL, step=FULL.num_steps)
    assert block(last, 80, 1000.0)[1].plain.endswith("  1,000,000/1,000,000  100%")


def test_what_comes_after_a_block_that_is_frozen_stands_below_it():
    output = StringIO()
    with Display(100, Console(file=output, force_terminal=True, width=80)) as display:
        display.show(EVENTS[0])
        display.show(EVENTS[1])
        display.freeze()
        display.line("done")
    assert screen(output.getvalue())[-2:] == ["run       3 workers   1.20e-04 lr", "done"]


@pytest.mark.parametrize(
    ("event", "status"),
    [
        (Event("attempt", 8, "", {"number": 2, "world_size": 1}), "starting 1 worker"),
        (Event("failure", text="a worker died"), "restarting"),
        (Event("resize", text="there are more nodes"), "resizing"),
    ],
)
def test_a_block_says_what_a_run_waits_for(event, status):
    text = shown([*EVENTS[:3], event], force_terminal=True, width=80)
    assert any(line.endswith(f"%  {status}") for line in screen(text))
    after = screen(shown([*EVENTS[:3], event, EVENTS[-1]], force_terminal=True, width=80))
    assert not any(status in line for line in after if line.startswith("━"))


FULL = View(
    step=123_456,
    num_steps=1_000_000,
    metrics=METRICS | {"mfu": 0.4512},
    held_out=HELD_OUT | {"loss": 7.24},
    losses=[9.0 - i / 100 for i in range(300)],
    end_at_s=9000.0,
    committed_step=123_000,
    committed_at_s=900.0,
    goodput=0.9123,
)


@pytest.mark.parametrize("width", range(1, 200, 7))
@pytest.mark.parametrize("view", [FULL, View(0, 100, "starting 3 workers"), View(0, 0)])
def test_a_block_fits_every_terminal(view, width):
    """And where there is some room, nothing is cut off."""
    lines = block(view, width, 1000.0)
    assert max(line.cell_len for line in lines) <= width
    if width >= 44:
        assert " ".join(" ".join(line.plain for line in lines).replace("━", "").split()) == " ".join(
            " ".join(line.plain for line in block(view, 1000, 1000.0)).replace("━", "").split()
        )


def test_a_block_at_sixty_columns():
    assert [line.plain.rstrip() for line in block(FULL, 60, 1000.0)] == [
        "",
        "━━━━━━━━━━━━━━━━━━━━━━━━  123,456/1,000,000  12%  2h13m left",
        "loss      9.877   █████▇▇▇▇▇▇▇▆▆▆▆▅▅▅▄▄▃▂▁   7.240 held-out",
        "mlm acc   0.123   0.100 held-out",
        "nsp acc   0.500   0.600 held-out",
        "speed     12,346 samples/s   1,234,568 tokens/s   45.1% mfu",
        "          1.2% waiting for data",
        "run       3 workers   1.20e-04 lr   91.2% goodput",
        "saved     step 123,000   1m40s ago",
    ]
    assert all(line.plain.isascii() for line in block(FULL, 60, 1000.0, is_ascii=True))


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ([], ""),
        ([5.0], "▁"),
        ([1.0, 2.0, 3.0], "▁▇█"),
        ([math.nan, 1.0, math.inf, 2.0], " ▁ █"),
        ([math.nan], " "),
        (list(range(16)), "▁▄▅▆▇▇██"),
    ],
)
def test_a_sparkline(values, line):
    assert sparkline(values, 8) == line


def test_a_terminal_that_becomes_narrow_is_written_over_whole():
    """It has broken the lines of the block, so that there are more of them than were drawn."""
    assert [broken_lines([80, 60, 0, 20], width) for width in (80, 79, 40, 20, 19)] == [0, 1, 2, 5, 8]
    console = Console(file=StringIO(), force_terminal=True, width=80, height=40)
    with Display(100, console) as display:
        display.show(EVENTS[0])
        display.show(EVENTS[1])
        display._live.refresh()
        lengths = list(display._drawn)
        console.width = 60
        begin = len(console.file.getvalue())
        display._live.refresh()
        written = console.file.getvalue()[begin:]
    assert written.count("\x1b[1A") == len(lengths) - 1 + broken_lines(lengths, 60) > len(lengths) - 1


def test_a_dumb_terminal_has_plain_lines(monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    text = shown(EVENTS, force_terminal=True, width=200)
    assert "\x1b[?25l" not in text and text.count("step 30/100  loss") == 1


def screen(text):
    """What stands on a terminal in the end, but for blank lines."""
    lines, row = [""], 0
    for part in re.split(r"(\x1b\[[?\d;]*[A-Za-z]|\r|\n)", text):
        if part == "\n":
            row += 1
            lines += [""] * (row == len(lines))
        elif part == "\x1b[2K":
            lines[row] = ""
        elif part == "\x1b[1A":
            row -= 1
        elif not part.startswith(("\x1b", "\r")):
            lines[row] += part
    return [line.rstrip() for line in lines if line.strip()]


@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_failure_gives_the_terminal_back(is_terminal):
    output = StringIO()
    with (
        pytest.raises(RuntimeError, match="failed"),
        Display(100, Console(file=output, force_terminal=is_terminal, width=100)) as display,
    ):
        display.show(EVENTS[1])
        raise RuntimeError("failed")
    assert output.getvalue().endswith("\x1b[?25h") or not is_terminal


@pytest.mark.parametrize(("total", "line"), [(1, "Reading: 1 file"), (3, "Reading: 3 files")])
def test_tracking_gives_the_items_on(total, line):
    for is_terminal in (True, False):
        output = StringIO()
        with Display(100, Console(file=output, force_terminal=is_terminal, width=100)) as display:
            given = []
            for item in display.track(iter(range(total)), "Reading", total):
                given.append(item)
                if is_terminal:
                    display._live.refresh()
        assert given == list(range(total))
        assert (f"  {total}/{total}\x1b[0m  100%" if is_terminal else line) in output.getvalue()


def test_held_out_results_stand_beside_guessing():
    output = StringIO()
    baselines = {"unigram_mlm_loss": 7.0, "majority_next_sentence_accuracy": 0.55}
    Display(100, Console(file=output, width=200)).held_out(HELD_OUT, baselines)
    Display(100, Console(file=output, width=200)).held_out(without(HELD_OUT, "next_sentence_accuracy"), baselines)
    first, second, third = output.getvalue().splitlines()
    assert first == third
    assert first == "Held-out masked LM loss 6.543 (guessing by token frequency: 7.000), accuracy 0.100"
    assert second == "Held-out next sentence accuracy 0.600 (always guessing the majority: 0.550)"
