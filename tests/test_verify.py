"""`verify` finds and names whatever was done to a run's record, and holds for what runs really write."""

import json
import shutil
from pathlib import Path

import pytest
from helpers import tiny_config, write_samples

from raybert.cli import main
from raybert.config_file import CONFIG, config_to_yaml
from raybert.errors import UserError
from raybert.history import ATTEMPTS, RECORDS, begin_attempt
from raybert.index import INDEX, LIST
from raybert.manifest import CHECKPOINTS, MANIFEST, MODEL, OPTIMIZER, STATE, find_checkpoints
from raybert.storage import Directory
from raybert.verify import CANNOT_SAY, DOES_NOT_HOLD, HOLDS, lines, verify

NUM_STEPS, G, N = 40, 32, 500  # two complete epochs, 280 samples of the third
MIDDLE = "step-00000020-attempt-0001"  # of four links of ten steps each


def train(folder, **overrides):
    """A run in one process; its directory."""
    settings = {"training.num_steps": NUM_STEPS, "training.log_every_steps": 50, "checkpoint.every_steps": 10}
    config = tiny_config(folder / "run", folder / "samples*.tfrecord*", **settings | overrides)
    (folder / "run.yaml").write_text(config_to_yaml(config))
    assert main(["train", "--config", str(folder / "run.yaml")]) == 0
    return folder / "run"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run that resumed once; nobody writes into it."""
    folder = tmp_path_factory.mktemp("finished")
    write_samples(folder / "samples.tfrecord", 300, seed=1)
    write_samples(folder / "samples-2.tfrecord.gz", 200, seed=2, compression="gzip")
    train(folder, **{"training.num_steps": 30})
    return train(folder)


@pytest.fixture
def run_dir(finished, tmp_path):
    """A copy of the run, to be tampered with; without its data."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def findings(run_dir):
    return verify(Directory(str(run_dir))).findings


def edit(run_dir, change, name=MIDDLE):
    """Change the lines of a link: the parent, then a step a line."""
    path = run_dir / RECORDS / f"{name}.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    change(rows)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_what_a_run_wrote_holds(finished, capsys):
    report = verify(Directory(str(finished)))
    assert report.findings == [] and report.holds
    assert (report.step, report.num_steps, report.proven_steps) == (NUM_STEPS, NUM_STEPS, NUM_STEPS)
    assert (report.num_samples, report.complete_epochs, report.partial_samples) == (N, 2, NUM_STEPS * G - 2 * N)
    assert [state.is_intact for state in report.checkpoints] == [True] * 3
    assert main(["verify", str(finished)]) == HOLDS
    said = capsys.readouterr().out
    assert "  40 of 40 steps are there exactly once, the right samples at every rank\n" in said
    assert "  2 complete epochs of 500 samples, each sample exactly once; 280 samples, each once, of the next\n" in said
    assert "Checkpoints: 3 intact\n" in said and "All of it holds.\n" in said


def test_a_run_is_verified_where_its_data_is_not(run_dir):
    """The copy lies elsewhere, and only its index knows the files."""
    paths = json.loads((run_dir / INDEX / LIST).read_text())
    (run_dir / INDEX / LIST).write_text(json.dumps(paths))
    (run_dir / CONFIG).unlink()
    for copy in (run_dir / INDEX).glob("*.tfrecord"):
        copy.unlink()
    assert findings(run_dir) == []


TAMPERING = {
    "a repeated step": (lambda rows: rows.insert(6, rows[5]), "step 14 is recorded 2 times"),
    "a dropped step": (lambda rows: rows.pop(5), "not recorded: step 14"),
    "dropped steps": (lambda rows: rows.__delitem__(slice(5, 8)), "not recorded: steps 14 to 16"),
    "steps out of order": (lambda rows: rows.insert(5, rows.pop(6)), "step 14 is out of order, behind step 15"),
    "a step of elsewhere": (
        lambda rows: rows[5].update(step=3),
        "step 3 does not belong here, between steps 10 and 19",
    ),
    "swapped checksums": (
        lambda rows: rows[5].update(arrivals=[[*rows[5]["arrivals"][0][:2], rows[6]["arrivals"][0][2]]]),
        "step 14: other samples arrived than the sample order says (checksum ",
    ),
    "a wrong slice": (
        lambda rows: rows[5].update(arrivals=[[448, 479, rows[5]["arrivals"][0][2]]]),
        "step 14, rank 0: samples for places [448, 479) arrived, expected [448, 480)",
    ),
    "swapped steps": (
        lambda rows: (rows[5].update(step=15), rows[6].update(step=14)),
        "step 15, rank 0: samples for places [448, 480) arrived, expected [480, 512)",
    ),
    "a rank that nobody had": (
        lambda rows: rows[5].update(arrivals=rows[5]["arrivals"] * 2),
        "step 14 arrived at 2 ranks, expected 1",
    ),
    "no rank": (lambda rows: rows[5].update(arrivals=[]), "step 14 arrived at 0 ranks, expected 1"),
    "another attempt": (lambda rows: rows[5].update(attempt=2), "step 14 is of attempt 2, expected 1"),
    "a record without a field": (lambda rows: rows[5].pop("arrivals"), "line 6 is damaged"),
    "a parent that comes later": (
        lambda rows: rows[0].update(parent="step-00000030-attempt-0001"),
        "cannot be followed: line 1 names step-00000030-attempt-0001, which cannot come before",
    ),
    "a parent left out": (lambda rows: rows[0].update(parent=None), "not recorded: steps 0 to 9"),
    "itself as parent": (lambda rows: rows[0].update(parent=MIDDLE), "which cannot come before; nothing shows steps 0"),
}


@pytest.mark.parametrize("tampering", TAMPERING)
def test_tampering_with_the_record_is_found_and_named(run_dir, tampering):
    change, expected = TAMPERING[tampering]
    edit(run_dir, change)
    found = findings(run_dir)
    assert any(finding.startswith(f"{RECORDS}/{MIDDLE}.jsonl") and expected in finding for finding in found), found
    assert main(["verify", str(run_dir)]) == DOES_NOT_HOLD


def test_every_number_of_an_arrival_counts(run_dir):
    for place in range(3):
        edit(
            run_dir,
            lambda rows, place=place: rows[-1]["arrivals"][0].__setitem__(place, rows[-1]["arrivals"][0][place] + 1),
        )
        assert len([finding for finding in findings(run_dir) if ": step 19" in finding]) == 1
        edit(
            run_dir,
            lambda rows, place=place: rows[-1]["arrivals"][0].__setitem__(place, rows[-1]["arrivals"][0][place] - 1),
        )
        assert findings(run_dir) == []


def test_the_samples_of_an_epoch_are_counted(run_dir):
    """A step trained twice is a sample trained twice, one left out is one not trained."""
    edit(run_dir, lambda rows: rows.insert(2, rows.pop(3)) or rows.insert(2, rows[3]))
    assert "epoch 0: of 500 samples 32 were trained on more than once and 0 are not shown to have been trained on" in (
        findings(run_dir)
    )
    edit(run_dir, lambda rows: rows.__delitem__(slice(2, 4)))
    assert verify(Directory(str(run_dir))).complete_epochs == 1


def descend(run_dir, start_step, snapshot):
    """Make the second attempt, which committed steps 30 to 39, one that began where the first had come to."""
    path = run_dir / ATTEMPTS / "0002.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"start_step": start_step, "snapshot": snapshot}))
    edit(run_dir, lambda rows: [row.update(attempt=1) for row in rows[1:6]], "step-00000040-attempt-0002")


def test_a_history_through_a_snapshot_holds(run_dir):
    descend(run_dir, 35, 1)
    assert findings(run_dir) == []


@pytest.mark.parametrize(
    ("start_step", "snapshot", "wrong"),
    [
        (35, None, [(step, 1, 2) for step in range(30, 35)]),  # it began from a checkpoint
        (34, 1, [(34, 1, 2)]),
        (36, 1, [(35, 2, 1)]),
    ],
)
def test_steps_of_an_attempt_that_another_does_not_descend_from_are_found(run_dir, start_step, snapshot, wrong):
    descend(run_dir, start_step, snapshot)
    link = f"{RECORDS}/step-00000040-attempt-0002.jsonl"
    expected = [f"{link}: step {step} is of attempt {found}, expected {right}" for step, found, right in wrong]
    assert findings(run_dir) == expected


def test_a_missing_record_is_found(run_dir):
    (run_dir / RECORDS / f"{MIDDLE}.jsonl").unlink()
    assert findings(run_dir)[0] == f"{RECORDS}/{MIDDLE}.jsonl is missing; nothing shows steps 0 to 19"
    report = verify(Directory(str(run_dir)))
    assert report.proven_steps == 20 and not report.holds


def test_a_cut_record_is_found_wherever_it_was_cut(run_dir):
    path = run_dir / RECORDS / f"{MIDDLE}.jsonl"
    whole = path.read_bytes()
    for size in range(0, len(whole) - 1, 13):
        path.write_bytes(whole[:size])
        found = findings(run_dir)
        assert any(finding.startswith(f"{RECORDS}/{MIDDLE}.jsonl") for finding in found), size


def test_a_flipped_bit_of_a_record_is_found(run_dir):
    path = run_dir / RECORDS / f"{MIDDLE}.jsonl"
    whole = path.read_bytes()
    parsed = [json.loads(line) for line in whole.splitlines()]
    for at in range(0, len(whole), 11):
        flipped = whole[:at] + bytes([whole[at] ^ 1 << at % 7]) + whole[at + 1 :]
        path.write_bytes(flipped)
        try:
            same = [json.loads(line) for line in flipped.splitlines()] == parsed
        except ValueError:
            same = False
        assert same or findings(run_dir), flipped


@pytest.mark.parametrize("file", ["config.json", MODEL, OPTIMIZER, STATE])
@pytest.mark.parametrize("which", [0, 1])
def test_a_flipped_byte_of_a_checkpoint_is_found(run_dir, which, file, capsys):
    name = find_checkpoints(Directory(str(run_dir)))[which]
    path = run_dir / CHECKPOINTS / name / file
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert findings(run_dir)[0].startswith(f"{CHECKPOINTS}/{name} is damaged: {file} has digest ")
    assert main(["verify", str(run_dir)]) == DOES_NOT_HOLD
    said = capsys.readouterr().out
    assert f"  {name}: DAMAGED, {file} has digest " in said and "Checkpoints: 2 intact" in said
    step = NUM_STEPS if which else 30
    assert f"{step} of {step} steps are there exactly once" in said


def test_a_manifest_that_lists_too_little_is_damaged(run_dir):
    name = find_checkpoints(Directory(str(run_dir)))[0]
    path = run_dir / CHECKPOINTS / name / MANIFEST
    manifest = json.loads(path.read_text())
    del manifest["files"][OPTIMIZER]
    path.write_text(json.dumps(manifest))
    assert findings(run_dir) == [f"{CHECKPOINTS}/{name} is damaged: {MANIFEST} lists no {OPTIMIZER}"]


def test_one_checkpoint_is_not_taken_for_another(run_dir):
    later, earlier, _ = find_checkpoints(Directory(str(run_dir)))
    shutil.rmtree(run_dir / CHECKPOINTS / later)
    (run_dir / CHECKPOINTS / earlier).rename(run_dir / CHECKPOINTS / later)
    assert findings(run_dir)[0] == f"{CHECKPOINTS}/{later} is damaged: {MANIFEST} is of step 30, attempt 1"


def test_an_incomplete_checkpoint_is_ignored(run_dir, capsys):
    name = find_checkpoints(Directory(str(run_dir)))[0]
    (run_dir / CHECKPOINTS / name / MANIFEST).unlink()
    assert main(["verify", str(run_dir)]) == HOLDS
    said = capsys.readouterr().out
    assert f"  {name}: incomplete, ignored" in said and "step 30 of 40" in said


def test_all_checkpoints_damaged(run_dir):
    for name in find_checkpoints(Directory(str(run_dir))):
        (run_dir / CHECKPOINTS / name / MODEL).unlink()
    *damaged, last = findings(run_dir)
    assert len(damaged) == 3 and last.startswith("no checkpoint is intact")


@pytest.mark.parametrize("content", ["{", "[]", '{"number": 1}', None])
def test_a_damaged_attempt_is_found(run_dir, content):
    path = run_dir / ATTEMPTS / "0001.json"
    path.unlink() if content is None else path.write_text(content)
    assert any(ATTEMPTS in finding for finding in findings(run_dir))


def test_skipped_updates_are_listed_with_their_reasons(run_dir, capsys):
    edit(run_dir, lambda rows: [row.update(skipped="non-finite gradient") for row in (rows[2], rows[3], rows[7])])
    assert main(["verify", str(run_dir)]) == HOLDS
    assert "  3 updates skipped (non-finite gradient): steps 11 to 12, step 16\n" in capsys.readouterr().out


# The index


def entries(run_dir):
    return sorted((run_dir / INDEX).glob("*.index"))


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:-1])], ids=range(2))
def test_an_entry_of_the_index_that_is_gone_is_built_again(run_dir, damage):
    for path in entries(run_dir):
        damage(path)
    before = sorted(run_dir.rglob("*"))
    assert findings(run_dir) == []
    assert sorted(run_dir.rglob("*")) == before


@pytest.mark.parametrize("content", [None, "{", "3"])
def test_without_the_list_of_files_the_configuration_names_them(run_dir, content):
    path = run_dir / INDEX / LIST
    path.unlink() if content is None else path.write_text(content)
    assert findings(run_dir) == []


def test_what_cannot_be_checked_is_said(run_dir, capsys):
    shutil.rmtree(run_dir / INDEX)
    (run_dir / CONFIG).unlink()
    (finding,) = findings(run_dir)
    assert finding.startswith("not checked, which samples arrived: ")
    assert main(["verify", str(run_dir)]) == DOES_NOT_HOLD
    said = capsys.readouterr().out
    assert "40 of 40 steps are there exactly once, positions right; samples NOT CHECKED" in said
    edit(run_dir, lambda rows: rows.pop(5))
    assert len(findings(run_dir)) == 2


def test_the_index_of_other_data_is_not_used(run_dir):
    path = run_dir / INDEX / LIST
    path.write_text(json.dumps(json.loads(path.read_text())[:1]))
    (finding,) = findings(run_dir)
    assert finding.startswith("not checked, which samples arrived: index/ is of other data (digest ")


# The command


def test_json_holds_the_whole_report(run_dir, capsys):
    assert main(["verify", str(run_dir), "--json"]) == HOLDS
    report = json.loads(capsys.readouterr().out)
    assert report["holds"] is True and report["findings"] == [] and report["complete_epochs"] == 2
    assert {state["name"] for state in report["checkpoints"]} == set(find_checkpoints(Directory(str(run_dir))))
    edit(run_dir, lambda rows: rows.pop(5))
    assert main(["verify", "--json", str(run_dir)]) == DOES_NOT_HOLD
    report = json.loads(capsys.readouterr().out)
    assert report["holds"] is False and len(report["findings"]) == 2


def test_what_is_no_run_is_refused(run, tmp_path, capsys):
    with pytest.raises(UserError, match=r"There is no run in .*; give the run_dir of a run"):
        verify(run)
    assert main(["verify", run.path]) == CANNOT_SAY
    assert capsys.readouterr().err.startswith("raybert: error: There is no run in ")
    begin_attempt(run, 1, 0, None)
    with pytest.raises(UserError, match="has no complete checkpoint yet: nothing is committed"):
        verify(run)
    with pytest.raises(SystemExit) as ended:
        main(["verify"])
    assert ended.value.code == CANNOT_SAY


def test_a_place_that_cannot_be_read_is_refused(capsys):
    assert main(["verify", "ftp://host/run"]) == CANNOT_SAY
    assert "Unknown scheme ftp://" in capsys.readouterr().err


def test_a_report_says_twenty_findings(run_dir):
    edit(run_dir, lambda rows: [row.update(arrivals=[]) for row in rows[1:]])
    edit(run_dir, lambda rows: [row.update(arrivals=[]) for row in rows[1:]], "step-00000010-attempt-0001")
    edit(run_dir, lambda rows: [row.update(arrivals=[]) for row in rows[1:]], "step-00000030-attempt-0001")
    said = list(lines(verify(Directory(str(run_dir)))))
    assert said[-1] == "  ... (--json lists all)" and len([line for line in said if "0 ranks" in line]) == 20
