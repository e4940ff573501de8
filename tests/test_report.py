"""The report: what a run's directory has recorded, as a page and pictures; of every kind of run, and of none."""

import itertools
import json
import math
import re
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import browser
import pytest
from drivers import Driver, a_driver
from helpers import tiny_config, write_samples
from PIL import Image

from raybert import cli
from raybert.canvas import COLOURS
from raybert.charts import Clock, blocks, compact, thinned
from raybert.chronicle import REPORT, effective, read_chronicle
from raybert.config_file import config_to_yaml
from raybert.entry import FINISHED, INTERRUPTED
from raybert.errors import UserError
from raybert.events import Event
from raybert.history import begin_attempt, to_lines
from raybert.launch import run as train
from raybert.manifest import CHECKPOINTS, MANIFEST, checkpoint_name
from raybert.report import write_report
from raybert.storage import Directory

TRAIN = {"masked_lm_accuracy": 0.1, "lm_example_loss": 6.0, "next_sentence_accuracy": 0.6, "next_sentence_loss": 0.7,
         "training_loss": 6.7, "grad_norm": 1.5, "samples_per_s": 320.0, "tokens_per_s": 3200.0, "flops_per_s": 1e9,
         "data_wait": 0.01, "world_size": 2, "learning_rate": 1e-4, "num_skipped": 0}  # fmt: skip
HELD_OUT = {"masked_lm_accuracy": 0.12, "lm_example_loss": 6.1, "loss": 6.8, "next_sentence_accuracy": 0.55,
            "next_sentence_loss": 0.69}  # fmt: skip
ALWAYS = {"mlm_accuracy", "loss", "learning_rate", "gradient_norm", "tokens_per_s", "data_wait"}
LEDGERS = {"timeline", "goodput"}


# --- Runs of every kind, as their directories are ---------------------------------------------------------------------


def write_config(run, **overrides):
    config = tiny_config(run.uri, "samples-*.tfrecord", **{"training.num_steps": 20} | overrides)
    run.write("config.yaml", config_to_yaml(config).encode())


def log(run, *steps, kind="train", metrics=TRAIN, **changed):
    """Rows of metrics behind those that are there."""
    before = run.read("metrics.jsonl") if run.exists("metrics.jsonl") else b""
    rows = [json.dumps({"kind": kind, "step": step, **metrics, **changed}) + "\n" for step in steps]
    run.write("metrics.jsonl", before + "".join(rows).encode())


def commit(run, step, attempt):
    """A checkpoint as far as a report looks at it."""
    name = checkpoint_name(step, attempt)
    (run / CHECKPOINTS / name).write(MANIFEST, b"{}")
    (run / "history").write(f"{name}.jsonl", to_lines([], None))


def without(metrics, *names):
    return {name: value for name, value in metrics.items() if name not in names}


def complete(run):
    """Two workers, one dies after step 10 of a checkpoint at 8; one goes on to the end."""
    write_config(run)
    begin_attempt(run, 2, 0, None)
    begin_attempt(run, 1, 8, checkpoint_name(8, 1))
    log(run, 5, 10, 15, 20)
    log(run, 10, 20, kind="eval", metrics=HELD_OUT)
    a_driver(run)
    commit(run, 8, 1)
    commit(run, 20, 2)
    baselines = {"unigram_mlm_loss": 7.0, "majority_next_sentence_accuracy": 0.55}
    run.write("baselines.json", json.dumps(baselines).encode())


def resized_and_interrupted(run):
    write_config(run)
    driver = Driver(run)
    driver.at(1010).begin(1)
    driver.at(1020).train(8, 1.0)
    driver.at(1021).checkpoint(8)
    driver.ledger.show(Event("resize", text="there are more nodes: from 1 to 3 workers"))
    driver.at(1025).begin(3, 8)
    driver.at(1030).train(12, 1.0)
    driver.at(1031).ledger.end(INTERRUPTED)
    begin_attempt(run, 1, 0, None)
    begin_attempt(run, 3, 8, checkpoint_name(8, 1))
    log(run, 4, 8, 12)
    commit(run, 8, 1)


def two_drivers(run):
    """The second an hour after the first was lost."""
    write_config(run)
    first = Driver(run)
    first.at(1010).begin(2)
    first.at(1020).train(8, 1.0)
    second = Driver(run, 4600.0, 1)
    second.at(4610).begin(2)
    second.at(4620).train(8, 1.0)
    second.at(4621).ledger.end(FINISHED)
    log(run, 4, 8)


def still_running(run):
    write_config(run)
    driver = Driver(run)
    driver.at(1010).begin(2)
    driver.at(1020).train(5, 1.0)
    log(run, 5)


def first_step(run):
    write_config(run, **{"training.num_steps": 1})
    driver = Driver(run)
    driver.at(1010).begin(1)
    driver.at(1012).train(1, 1.0)
    driver.checkpoint(1)
    driver.at(1013).ledger.end(FINISHED)
    log(run, 1)
    commit(run, 1, 1)


def masked_lm_only(run):
    write_config(run)
    nsp = ("next_sentence_accuracy", "next_sentence_loss")
    log(run, 5, 10, metrics=without(TRAIN, *nsp))
    log(run, 10, kind="eval", metrics=without(HELD_OUT, *nsp))


def not_finite(run):
    write_config(run)
    log(run, 1, 2)
    log(run, 3, 4, training_loss=math.nan, grad_norm=math.inf, masked_lm_accuracy=math.nan)


def nothing_finite(run):
    write_config(run)
    log(run, *range(1, 400), **{name: math.nan for name in TRAIN if name not in ("samples_per_s", "tokens_per_s")})


def long(run):
    """With a gradient norm over four powers of ten."""
    write_config(run, **{"training.num_steps": 100_000})
    for step in range(100, 50_100, 100):
        log_norm = step / 12_500
        rows = json.dumps({"kind": "train", "step": step, **TRAIN, "grad_norm": 10**log_norm})
        LONG.append(rows)
    run.write("metrics.jsonl", "\n".join(LONG).encode() + b"\n")


LONG = []


def on_gpus(run):
    write_config(run)
    log(run, 5, 10, mfu=0.42)


def done_again(run):
    """As a directory would be that nobody has cleaned."""
    write_config(run)
    log(run, 2, 4, 6, 8, training_loss=9.0)
    log(run, 5, 7, training_loss=3.0)


def just_begun(run):
    write_config(run)


def damaged(run):
    write_config(run)
    log(run, 5, 10)
    run.write("metrics.jsonl", b"{nonsense\n" + run.read("metrics.jsonl") + b'{"kind": "tr')
    (run / "ledger").write("0001.json", b"{")
    (run / "attempts").write("0001.json", b"[]")
    run.write("baselines.json", b"x")
    run.write("skipped_records.json", b"[1]")
    run.write("config.yaml", b"training: {no_such_setting: 1}")


RUNS = {
    complete: (ALWAYS | LEDGERS | {"nsp_accuracy", "flops_per_s"}, ["complete", "a worker died", "held-out 6.800"]),
    resized_and_interrupted: (ALWAYS | LEDGERS | {"nsp_accuracy", "flops_per_s"}, ["interrupted", "1 to 3 workers"]),
    two_drivers: (ALWAYS | LEDGERS | {"nsp_accuracy", "flops_per_s"}, ["Between drivers", "without driver"]),
    still_running: (ALWAYS | LEDGERS | {"nsp_accuracy", "flops_per_s"}, ["cut off", "has not ended"]),
    first_step: (ALWAYS | LEDGERS | {"nsp_accuracy", "flops_per_s"}, ["complete", "of 1"]),
    masked_lm_only: (ALWAYS | {"flops_per_s"}, ["6.800"]),
    not_finite: (ALWAYS | {"nsp_accuracy", "flops_per_s"}, ["train 6.700", "Loss not finite train"]),
    nothing_finite: (ALWAYS | {"nsp_accuracy", "flops_per_s"}, ["train not finite"]),
    long: (ALWAYS | {"nsp_accuracy", "flops_per_s"}, ["50,000", "1,000", "50k"]),
    on_gpus: (ALWAYS | {"nsp_accuracy", "mfu"}, ["train 42.0%"]),
    done_again: (ALWAYS | {"nsp_accuracy", "flops_per_s"}, ["train 3.000"]),
    just_begun: (set(), ["begun", "Nothing is recorded yet"]),
    damaged: (ALWAYS | {"nsp_accuracy", "flops_per_s"}, [
        "metrics.jsonl: 1 lines cannot be read, the first is line 1", "ledger cannot be read",
        "attempts cannot be read",
        "baselines.json cannot be read", "skipped_records.json cannot be read", "no_such_setting"]),
}  # fmt: skip


class Page(HTMLParser):
    """What a page's elements and text are."""

    def __init__(self, html):
        super().__init__()
        self.elements, self.words = [], []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


def read_page(run, name=REPORT):
    return run.read(name).decode()


@pytest.mark.parametrize("kind", RUNS, ids=lambda kind: kind.__name__)
def test_every_kind_of_run_is_drawn(run, kind):
    """The charts that it has something for, each as a picture and in the page, where it is whole and named."""
    kind(run)
    charts, texts = RUNS[kind]
    assert write_report(run, run) == f"{run.uri}/{REPORT}"
    html = read_page(run)
    page = Page(html)
    assert [text for text in texts if text not in page.text] == []
    assert {name.removesuffix(".png") for name in (run / "report").names()} == charts
    for name in charts:
        with Image.open(f"{run.path}/report/{name}.png") as image:
            image.load()
            assert image.width >= 900
    drawings = re.findall(r"<svg.*?</svg>", html, re.DOTALL)
    assert len(drawings) == len(charts) + ("timeline" in charts)
    for drawing in drawings:
        root = ElementTree.fromstring(drawing)
        assert [child.text.strip() != "" for child in root[:2]] == [True, True] and "NaN" not in drawing
        assert not re.search(r"#[0-9a-f]{6}", drawing), "every colour is the page's"
    names = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(names) == len(set(names))


def test_a_page_needs_nothing_else(run):
    complete(run)
    write_report(run, run)
    page = Page(read_page(run))
    assert {"script", "img", "iframe", "object"}.isdisjoint(tag for tag, _ in page.elements)
    places = [value for _, attributes in page.elements for name, value in attributes.items() if name in ("src", "href")]
    assert places == ["data:,"]
    links = [attributes["xlink:href"] for _, attributes in page.elements if "xlink:href" in attributes]
    assert links and all(link.startswith("#") for link in links)


def test_a_run_in_a_bucket_has_its_report_there(bucket, capsys):
    run = Directory(f"{bucket}/runs/first")
    complete(run)
    assert cli.main(["report", run.uri]) == 0 and cli.main(["report", run.uri, "--output", f"{bucket}/x/y.html"]) == 0
    assert capsys.readouterr().out == f"Report: {run.uri}/{REPORT}\nReport: {bucket}/x/y.html\n"
    assert run.exists("report/loss.png") and Directory(f"{bucket}/x").names() == ["y", "y.html"]
    assert "a worker died" in Page(read_page(run)).text


def test_what_is_the_users_is_escaped(tmp_path):
    evil = "</pre><script>alert('&1')</script>"
    run = Directory(str(tmp_path / "a <b> & $x$"))
    complete(run)
    write_config(run, **{"data.vocab_file": evil})
    run.write("skipped_records.json", json.dumps({evil: {evil: [evil]}}).encode())
    entry = json.loads((run / "ledger").read("0001.json")) | {"reason": evil}
    (run / "ledger").write("0001.json", json.dumps(entry).encode())
    write_report(run, run)
    page = Page(read_page(run))
    assert "script" not in {tag for tag, _ in page.elements}
    assert page.text.count("</pre><script>") >= 4 and "a <b> & $x$" in page.text


def test_steps_that_were_done_again_count_once(run):
    """What they showed before is kept apart, whoever wrote it."""
    done_again(run)
    train = read_chronicle(run).train
    assert [(row["step"], row["training_loss"]) for row in train.kept] == [(2, 9), (4, 9), (5, 3), (7, 3)]
    assert [(row["step"], row["training_loss"]) for row in train.overridden] == [(6, 9), (8, 9)]
    rows = [{"step": step} for step in (1, 2, 3, 2, 3, 1)]
    assert [row["step"] for row in effective(rows).kept] == [1]
    assert [row["step"] for row in effective(rows).overridden] == [1, 2, 2, 3, 3]


@pytest.mark.parametrize("kind", [complete, resized_and_interrupted, two_drivers, first_step])
def test_blocks_of_time_are_the_ledgers_seconds(run, kind):
    """They follow each other without a gap over all the time that there was a driver."""
    kind(run)
    chronicle = read_chronicle(run)
    clock, summary = Clock(chronicle.entries), chronicle.summary
    drawn = list(blocks(chronicle.entries, summary.attempts, clock))
    assert drawn[0].begin_s == 0 and drawn[-1].end_s == pytest.approx(clock.total_s) == pytest.approx(summary.wall_s)
    assert all(a.end_s == pytest.approx(b.begin_s) for a, b in itertools.pairwise(drawn))
    seconds = dict.fromkeys(asdict(summary.seconds), 0.0)
    for block in drawn:
        seconds[block.state] += block.end_s - block.begin_s
    for state in ("starting", "preparing", "waiting"):
        assert seconds[state] == pytest.approx(asdict(summary.seconds)[state])
    assert sum(stopped_s for _, stopped_s in clock.stops) == pytest.approx(summary.stopped_s)


def test_a_long_curve_is_thinned_without_hiding_its_range():
    import numpy as np

    steps, values = np.arange(1.0, 1001), np.zeros(1000)
    values[500], values[:10] = 7.0, math.nan
    ends, means, lows, highs = thinned(steps, values)
    assert len(ends) == 200 and ends[-1] == 1000 and np.nanmax(highs) == 7 and np.nanmax(means) == 7 / 5
    assert np.isnan(means[:2]).all() and np.nanmin(lows) == 0
    assert [list(part) for part in thinned(steps[:3], steps[:3])] == [[1, 2, 3]] * 4


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.00012, "1.2e-4"), (0.25, "0.25"), (1500, "1,500"), (12_345, "12.3k"), (3.4e6, "3.4M"), (-2e12, "-2T"),
     (999_999, "1M"), (9_999, "9,999")],
)  # fmt: skip
def test_a_number_in_few_characters(value, text):
    assert compact(value) == text


# --- The command, and the end of a run --------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [lambda path: None, lambda path: path.mkdir(), lambda path: path.write_text("x")])
def test_a_directory_that_is_no_run_is_refused(tmp_path, capsys, make):
    make(tmp_path / "x")
    assert cli.main(["report", str(tmp_path / "x")]) == 1
    assert f"There is no run in {tmp_path}/x; give the run_dir of a run." in capsys.readouterr().err
    assert not (tmp_path / "x").is_dir() or not list((tmp_path / "x").iterdir())


def test_the_page_goes_where_it_is_asked_for(run, tmp_path, capsys):
    complete(run)
    place = tmp_path / "else" / "first.html"
    assert cli.main(["report", run.path, "--output", str(place)]) == 0
    assert capsys.readouterr().out == f"Report: {place}\n"
    assert place.exists() and (tmp_path / "else" / "first" / "loss.png").exists() and not run.exists(REPORT)
    with pytest.raises(UserError, match=r"must end in .html, got '/tmp/x'; the pictures go beside it"):
        cli.COMMANDS["report"][1]([run.path, "--output", "/tmp/x"])
    (tmp_path / "file").write_text("")
    assert cli.main(["report", run.path, "--output", str(tmp_path / "file" / "x.html")]) == 1
    assert "or choose another --output" in capsys.readouterr().err


@pytest.fixture
def config(run, tmp_path):
    """A run of twenty steps, in this process, with an evaluation."""
    samples, held_out = (write_samples(tmp_path / f"{name}.tfrecord", 500, seed=1) for name in ("samples", "held-out"))
    more = {"training.num_steps": 20, "evaluation.input_files": str(held_out), "evaluation.every_steps": 10}
    return tiny_config(run.uri, samples, **more)


def test_a_run_ends_with_its_report(run, config, capsys):
    assert train(config) == 0
    assert f"Report: {run.uri}/{REPORT}" in capsys.readouterr().out.splitlines()
    text = Page(read_page(run)).text
    for known in ("complete", "of 20", "held-out, train", "500", "Masked a sample", "Guessing by token frequency",
                  "training.num_steps", "All of config.yaml", "2 of 2 rows of metrics.jsonl", "finished"):  # fmt: skip
        assert known in text
    assert {"timeline.png", "loss.png", "goodput.png"} <= set((run / "report").names())


def test_a_report_that_cannot_be_drawn_fails_no_run(run, config, capsys):
    Path(run.path).mkdir()
    Path(run.path, "report").write_text("in the way")
    assert train(config) == 0
    said = capsys.readouterr().out
    assert "warning: the report is not drawn" in said and f"python run.py report {run.uri}` draws it later" in said


# --- In a browser -----------------------------------------------------------------------------------------------------


def luminance(colour):
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_text_can_be_read_on_its_ground(scheme):
    """By the contrast that WCAG asks for: 4.5 for text, 3 for what is drawn, but for what is meant to be faint."""
    ground = luminance(COLOURS["surface"][scheme])
    for name, colours in COLOURS.items():
        other = luminance(colours[scheme])
        contrast = (max(ground, other) + 0.05) / (min(ground, other) + 0.05)
        is_text = name in ("ink", "muted", "train", "failure", "resize")
        least = 4.5 if is_text else 3 if name in ("held-out", "useful", "redone", "preparing") else 0
        assert contrast >= least, (name, contrast)


@pytest.fixture(scope="module")
def port():
    if not browser.CHROMIUM.exists():
        pytest.skip("there is no /usr/bin/chromium (Debian's package chromium)")
    with browser.chromium() as port:
        yield port


OVERFLOWING = """
[...document.querySelectorAll("body *:not(svg *)")].filter(element => {
  const box = element.getBoundingClientRect();
  return box.width && box.right > document.documentElement.clientWidth + 0.5 && !element.closest(".scroll, pre");
}).map(element => element.outerHTML.slice(0, 100))
"""
CUT_OFF = """
[...document.querySelectorAll("svg text")].filter(element => {
  const box = element.getBoundingClientRect(), whole = element.closest("figure").getBoundingClientRect();
  return box.width && (box.right > whole.right || box.left < whole.left);
}).map(element => element.textContent)
"""
SMALLEST = """
Math.min(...[...document.querySelectorAll("svg text")].map(
  element => element.getBoundingClientRect().height).filter(height => height))
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1200])
@pytest.mark.parametrize("kind", [complete, two_drivers, long, just_begun, damaged], ids=lambda kind: kind.__name__)
def test_a_page_in_a_browser(port, run, kind, width, scheme):
    """No word on the console, nothing asked of any network, nothing wider than the page, and the scheme's colours."""
    kind(run)
    write_report(run, run)
    ground = "getComputedStyle(document.body).color"
    text = "document.body.innerText"
    whole = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
    values, events = browser.load(
        port, Path(run.path) / REPORT, width, scheme, whole, OVERFLOWING, CUT_OFF, SMALLEST, ground, text
    )
    beyond, overflowing, cut_off, smallest, colour, words = values
    assert (beyond, overflowing, cut_off) == (0, [], [])
    assert smallest is None or smallest > 9
    ink = COLOURS["ink"][scheme == "dark"]
    assert colour == f"rgb({', '.join(str(int(ink[i : i + 2], 16)) for i in (1, 3, 5))})"
    assert kind is just_begun or "loss" in words.lower()
    asked = [
        event["params"]["request"]["url"] for event in events if event.get("method") == "Network.requestWillBeSent"
    ]
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == [] and len(asked) <= 2
    said = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")
    assert [event for event in events if event.get("method") in said] == []
