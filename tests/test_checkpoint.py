"""Checkpoints: complete or absent, verified, of one owner; and what they hold is all that a run is."""

import gc
import json
import pickletools
import shutil
import threading
import time
from dataclasses import replace
from pathlib import Path
from threading import Timer

import pytest
import torch
import transformers
from helpers import TINY_MODEL, take_step

from raybert import retry
from raybert.checkpoint import HostCopy, Saver, Writer, host_copy, restore, room_for
from raybert.config import OptimizerConfig, TrainingConfig
from raybert.errors import UserError
from raybert.feed import Layout, local_batches
from raybert.history import ATTEMPTS, FencedError, StepRecord, begin_attempt, read_history
from raybert.manifest import (
    CHECKPOINTS,
    FORMAT_VERSION,
    MANIFEST,
    MODEL,
    OPTIMIZER,
    STATE,
    checkpoint_name,
    find_checkpoints,
    newest_checkpoint,
    open_checkpoint,
)
from raybert.order import SampleOrder
from raybert.step import create_state
from raybert.storage import Directory
from raybert.world import World

TRAINING = TrainingConfig(num_steps=8, global_batch_size=8, micro_batch_size=8)
KINDS = {
    "adamw": (TRAINING, OptimizerConfig()),
    "lamb": (TRAINING, OptimizerConfig(type="lamb")),
    "fp16": (replace(TRAINING, precision="fp16"), OptimizerConfig()),
    "mlm only": (replace(TRAINING, use_next_sentence_label=False), OptimizerConfig()),
}
TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"token{i}" for i in range(92))]


def trained(index, num_steps, kind="adamw", state=None, model=TINY_MODEL):
    """A state after so many steps of its run."""
    training, optimizer = KINDS[kind]
    state = state or create_state(model, training, optimizer, World())
    order = SampleOrder(index.page_sizes, 1, training.global_batch_size, 4)
    for batch in local_batches(Layout(order, 1, state.step, num_steps), index):
        take_step(state, batch, training, optimizer, World())
    return state


@pytest.fixture(scope="module")
def state(index):
    return trained(index, 2)


def writer(run, keep=0, vocab_file=None, attempt=None):
    number = begin_attempt(run, 1, 0, None).number if attempt is None else attempt
    return Writer(run, number, TINY_MODEL, vocab_file, {"training.seed": 1}, keep)


def write_all(writer, state, *steps):
    """Checkpoints of one state under several steps; their names."""
    copy = host_copy(state)
    names = []
    for step in steps:
        names.append(writer.write(replace(copy, step=step), None, []))
        writer.prune(names[-1])
    return names


def tensors(state):
    """All tensors of a state, by name."""
    moments = state.optimizer.state_dict()["state"].items()
    return {
        **state.model.state_dict(),
        **{f"{number}.{name}": value for number, values in moments for name, value in values.items()},
        "num_skipped": state.num_skipped,
    }


def assert_same_state(found, expected):
    assert (found.step, found.scaler.state_dict()) == (expected.step, expected.scaler.state_dict())
    ours, theirs = tensors(found), tensors(expected)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype and torch.equal(ours[name], tensor), name


def newest(run):
    """Name of the newest intact checkpoint, and what was warned of."""
    warnings = []
    checkpoint = newest_checkpoint(run, warnings.append)
    return checkpoint and checkpoint.name, warnings


def folder(run, name):
    return Path((run / CHECKPOINTS / name).path)


# --- What a checkpoint holds ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_saved_is_restored_bitwise(run, index, kind):
    before = trained(index, 3, kind)
    name = writer(run).write(host_copy(before), None, [])
    training, optimizer = KINDS[kind]
    after = create_state(TINY_MODEL, replace(training, seed=99), optimizer, World())
    restore(open_checkpoint(run, name), after)
    assert_same_state(after, before)
    assert_same_state(trained(index, 5, kind, after), trained(index, 5, kind, before))


def test_skipped_updates_are_remembered(run, index):
    before = trained(index, 4, "fp16")
    before.num_skipped.fill_(3)
    name = writer(run).write(host_copy(before), None, [])
    assert open_checkpoint(run, name).state["num_updates"] == 1
    after = create_state(TINY_MODEL, *KINDS["fp16"], World())
    restore(open_checkpoint(run, name), after)
    assert (int(after.num_skipped), after.step) == (3, 4)


def test_a_checkpoint_before_the_first_update(run):
    before = create_state(TINY_MODEL, *KINDS["adamw"], World())
    name = writer(run).write(host_copy(before), None, [])
    after = create_state(TINY_MODEL, replace(TRAINING, seed=99), OptimizerConfig(), World())
    restore(open_checkpoint(run, name), after)
    assert_same_state(after, before)


def test_a_host_copy_does_not_change_with_the_state(index):
    state = trained(index, 1)
    copy = host_copy(state)
    before = {name: tensor.clone() for name, tensor in {**copy.model, **copy.optimizer}.items()}
    trained(index, 3, state=state)
    for name, tensor in before.items():
        assert torch.equal({**copy.model, **copy.optimizer}[name], tensor), name


def test_a_host_copy_takes_the_memory_of_one_that_is_not_needed_any_more(index):
    state = trained(index, 1)
    old = host_copy(state)
    places = {name: tensor.data_ptr() for name, tensor in {**old.model, **old.optimizer}.items()}
    trained(index, 3, state=state)
    expected, found = host_copy(state), host_copy(state, old)
    for ours, theirs in ((found.model, expected.model), (found.optimizer, expected.optimizer)):
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert (found.step, found.num_updates) == (expected.step, expected.num_updates)
    assert {name: tensor.data_ptr() for name, tensor in {**found.model, **found.optimizer}.items()} == places


@pytest.mark.parametrize("num_steps", [0, 1])
def test_there_is_room_for_the_first_copy(index, num_steps):
    """Before the first step, too, when there are no moments yet."""
    state = create_state(TINY_MODEL, TRAINING, OptimizerConfig(), World())
    if num_steps:
        trained(index, num_steps, state=state)
    room = room_for(state)
    trained(index, num_steps + 1, state=state)
    found, expected = host_copy(state, room), host_copy(state)
    for ours, theirs, place in (
        (found.model, expected.model, room.model),
        (found.optimizer, expected.optimizer, room.optimizer),
    ):
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
        assert place and all(ours[name].data_ptr() == tensor.data_ptr() for name, tensor in place.items())


def test_a_host_copy_of_another_model_takes_memory_of_its_own(index):
    state = trained(index, 1)
    other = host_copy(create_state(replace(TINY_MODEL, hidden_size=48), TRAINING, OptimizerConfig(), World()))
    found, expected = host_copy(state, other), host_copy(state)
    assert all(torch.equal(found.model[name], expected.model[name]) for name in expected.model)
    assert all(torch.equal(found.optimizer[name], expected.optimizer[name]) for name in expected.optimizer)


def test_transformers_opens_it(run, tmp_path, state):
    (tmp_path / "vocab.txt").write_text("\n".join(TOKENS) + "\n")
    path = folder(run, writer(run, vocab_file=tmp_path / "vocab.txt").write(host_copy(state), None, []))
    model, info = transformers.BertForPreTraining.from_pretrained(path, output_loading_info=True)
    assert not any(info.values()), info
    for name, tensor in state.model.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    _, info = transformers.BertModel.from_pretrained(path, output_loading_info=True)
    unexpected = info.pop("unexpected_keys")
    assert unexpected and all(name.startswith("cls.") for name in unexpected)
    assert not any(info.values()), info
    assert transformers.AutoTokenizer.from_pretrained(path).convert_ids_to_tokens(range(97)) == TOKENS


def test_no_file_is_a_pickle(run, state):
    path = folder(run, *write_all(writer(run), state, 2))
    names = {file.name for file in path.iterdir()}
    assert names == {"config.json", MANIFEST, MODEL, OPTIMIZER, STATE}
    for file in path.iterdir():
        with pytest.raises(ValueError, match=r"opcode|pickle|at position"):
            list(pickletools.genops(file.read_bytes()))
        assert not file.read_bytes().startswith((b"PK", b"\x80"))


# --- Complete or absent ---------------------------------------------------------------------------------------------


def test_no_checkpoint_is_none(run):
    assert newest(run) == (None, [])


def test_the_newest_is_by_step_then_attempt(run, state):
    """By number: 10,000 attempts are no fewer than 9,999."""
    steps = {(4, 1), (12, 1), (8, 9999), (12, 10000), (12, 9999), (2, 3)}
    for step, attempt in steps:
        name = checkpoint_name(step, attempt)
        (run / CHECKPOINTS / name).write("file", b"")
    assert find_checkpoints(run) == [checkpoint_name(*place) for place in sorted(steps, reverse=True)]


def test_a_directory_without_manifest_is_absent(run, state):
    first, second = write_all(writer(run), state, 4, 8)
    (folder(run, second) / MANIFEST).unlink()
    (run / CHECKPOINTS / "step-00000012-attempt-0001").write(MODEL, b"")
    (run / CHECKPOINTS / "notes").write(MANIFEST, b"{}")
    assert newest(run) == (first, [])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-10])


@pytest.mark.parametrize("damage", [flip, truncate, Path.unlink, lambda path: path.write_bytes(b"")], ids=range(4))
@pytest.mark.parametrize("file", ["config.json", MODEL, OPTIMIZER, STATE])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(run, state, file, damage):
    names = write_all(writer(run), state, 4, 8, 12)
    damage(folder(run, names[2]) / file)
    found, (warning,) = newest(run)
    assert found == names[1]
    assert file in warning and names[2] in warning and "the one before" in warning
    for name in names[:2]:
        damage(folder(run, name) / file)
    found, warnings = newest(run)
    assert found is None and len(warnings) == 3


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b'{"files": 3}', b"\xff\xfe", b"null"])
def test_a_damaged_manifest_falls_back_too(run, state, content):
    names = write_all(writer(run), state, 4, 8)
    (folder(run, names[1]) / MANIFEST).write_bytes(content)
    found, (warning,) = newest(run)
    assert found == names[0] and MANIFEST in warning


def test_no_flipped_bit_of_a_manifest_passes_for_another_checkpoint(run, state):
    names = write_all(writer(run), state, 4, 8)
    path = folder(run, names[1]) / MANIFEST
    content = path.read_bytes()
    for at in range(0, len(content), 7):
        path.write_bytes(content[:at] + bytes([content[at] ^ 1 << at % 7]) + content[at + 1 :])
        checkpoint = newest_checkpoint(run, lambda _: None)
        assert (checkpoint.name, checkpoint.step) in zip(names, (4, 8), strict=True)


def test_storage_that_cannot_be_read_is_an_error(run, state):
    """Never taken for a run without checkpoints."""
    run.write(CHECKPOINTS, b"not a directory")
    with pytest.raises(OSError, match=CHECKPOINTS):
        newest(run)
    run.remove(CHECKPOINTS)
    (name,) = write_all(writer(run), state, 4)
    (folder(run, name) / MODEL).unlink()
    (folder(run, name) / MODEL).mkdir()
    with pytest.raises(OSError, match=MODEL):
        newest(run)


# --- Keeping and deleting -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("keep", "kept"), [(1, [12]), (3, [4, 8, 12]), (2, [8, 12]), (0, [2, 4, 8, 12])])
def test_the_newest_are_kept(run, state, keep, kept):
    write_all(writer(run, keep), state, 2, 4, 8, 12)
    assert find_checkpoints(run) == [checkpoint_name(step, 1) for step in reversed(kept)]
    assert newest(run) == (checkpoint_name(12, 1), [])


def test_what_was_cut_off_is_deleted_behind_the_newest(run, state):
    for step in (3, 20):
        (run / CHECKPOINTS / checkpoint_name(step, 1)).write(MODEL, b"half")
    write_all(writer(run, keep=0), state, 2, 8)
    assert find_checkpoints(run) == [checkpoint_name(step, 1) for step in (20, 8, 2)]


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_pruning_leaves_the_newest_good_one(run, state, keep):
    """Though a damaged one lies there that is newer: attempt 2 began before it."""
    *_, damaged = write_all(writer(run), state, 4, 8, 12)
    flip(folder(run, damaged) / MODEL)
    second = writer(run, keep)
    write_all(second, state, 5, 6)
    assert newest(run)[0] == checkpoint_name(8, 1)
    flip(folder(run, checkpoint_name(8, 1)) / STATE)
    assert newest(run)[0] == checkpoint_name(6, 2)
    write_all(second, state, 16)
    assert newest(run) == (checkpoint_name(16, 2), [])


def test_a_newer_attempt_fences(run, state):
    first = writer(run)
    write_all(first, state, 4)
    second = writer(run)
    with pytest.raises(FencedError, match="attempt 1"):
        write_all(first, state, 8)
    assert newest(run) == (checkpoint_name(4, 1), [])
    assert not (folder(run, checkpoint_name(8, 1)) / MANIFEST).exists()
    (name,) = write_all(second, state, 8)
    assert find_checkpoints(run) == [name, checkpoint_name(4, 1)]


# --- Another model --------------------------------------------------------------------------------------------------


OTHERS = {  # model and training of the run, a tensor, its shape there, its shape in the run
    "wider": (replace(TINY_MODEL, intermediate_size=48), TRAINING, "intermediate.dense.bias", "(32,)", "(48,)"),
    "deeper": (replace(TINY_MODEL, num_hidden_layers=3), TRAINING, "bert.encoder.layer.2.", "absent", "("),
    "vocabulary": (replace(TINY_MODEL, vocab_size=98), TRAINING, "word_embeddings", "(97, 16)", "(98, 16)"),
    "mlm only": (TINY_MODEL, KINDS["mlm only"][0], "optimizer moments", "(", "absent"),
}


@pytest.mark.parametrize("other", OTHERS)
def test_a_checkpoint_of_another_model_is_refused(run, state, index, other):
    model, training, tensor, theirs, ours = OTHERS[other]
    (name,) = write_all(writer(run), state, 2)
    found, expected = (create_state(model, training, OptimizerConfig(), World()) for _ in range(2))
    with pytest.raises(UserError, match="another configuration") as caught:
        restore(open_checkpoint(run, name), found)
    message = str(caught.value)
    assert tensor in message or other == "vocabulary"
    assert f"is {theirs}" in message and f"and {ours}" in message and "run_dir" in message and name in message
    assert_same_state(found, expected)


# --- Saving behind the steps ----------------------------------------------------------------------------------------


def records(*steps):
    return [StepRecord(step, 1, ()) for step in steps]


class Log:
    """What a saver told; the first commit waits at the gate."""

    def __init__(self):
        self.committed, self.warnings, self.gate = [], [], threading.Event()

    def commit(self, name):
        self.committed.append(name)
        assert self.gate.wait(60)


def test_saving_goes_on_behind_the_steps(run, state):
    """While a write is pending the newest copy waits, and takes all records along."""
    log = Log()
    saver = Saver(writer(run), None, log.commit, log.warnings.append, 60)
    saver.save(replace_step(state, 2), records(0, 1))
    assert wait_until(lambda: log.committed)
    saver.save(replace_step(state, 4), records(2, 3))
    assert log.warnings == []
    saver.save(replace_step(state, 6), records(4, 5))
    assert len(log.warnings) == 1 and "step 4 left out" in log.warnings[0]
    log.gate.set()
    saver.wait()
    assert log.committed == [checkpoint_name(2, 1), checkpoint_name(6, 1)]
    saver.finish(replace_step(state, 8), records(6, 7))
    assert log.committed[2:] == [checkpoint_name(8, 1)] and len(log.warnings) == 1
    assert read_history(run, checkpoint_name(2, 1)) == records(0, 1)
    assert read_history(run, checkpoint_name(6, 1)) == records(*range(6))
    assert read_history(run, checkpoint_name(8, 1)) == records(*range(8))


def replace_step(state, step):
    return replace(state, step=step)


def wait_until(holds, limit_s=20):
    until_s = time.monotonic() + limit_s
    while not holds() and time.monotonic() < until_s:
        time.sleep(0.02)
    return holds()


@pytest.fixture
def saver_of(monkeypatch):
    """Savers that do not wait long between two tries, and what they tell."""
    monkeypatch.setattr(retry, "FIRST_S", 0.02)
    monkeypatch.setattr(retry, "LONGEST_S", 0.1)
    savers = []

    def make(run, parent=None, outage_limit_s=60, keep=0):
        log = Log()
        log.gate.set()
        savers.append(Saver(writer(run, keep), parent, log.commit, log.warnings.append, outage_limit_s))
        return savers[-1], log

    yield make
    for saver in savers:
        saver.close()


def block(run):
    """Make storage fail: where checkpoints go stands a file."""
    shutil.rmtree(Path(run.path) / CHECKPOINTS, ignore_errors=True)
    run.write(CHECKPOINTS, b"")


def test_an_outage_delays_the_commit_and_loses_no_record(run, state, saver_of):
    """The newest takes the place of what storage refuses, and an outage is told of once."""
    saver, log = saver_of(run)
    block(run)
    for step in (2, 4, 6):
        saver.save(replace_step(state, step), records(step - 2, step - 1))
        saver.wait(0.2)
    assert saver.is_failing and log.committed == []
    assert len(log.warnings) == 1 and "cannot be written" in log.warnings[0] and CHECKPOINTS in log.warnings[0]
    run.remove(CHECKPOINTS)
    saver.wait()
    assert log.committed == [checkpoint_name(6, 1)] and newest(run)[0] == checkpoint_name(6, 1)
    assert len(log.warnings) == 2 and "written again" in log.warnings[1] and not saver.is_failing
    saver.finish(replace_step(state, 8), records(6, 7))
    assert find_checkpoints(run) == log.committed[::-1] == [checkpoint_name(8, 1), checkpoint_name(6, 1)]
    assert read_history(run, checkpoint_name(8, 1)) == records(*range(8))


def num_copies():
    return sum(type(each) is HostCopy for each in gc.get_objects())


def test_an_outage_does_not_fill_the_memory(run, state, saver_of):
    """One copy is being written, one waits, or the memory of one that was left; in the end there is that of one."""
    saver, _ = saver_of(run)
    gc.collect()  # what other tests have left
    before = num_copies()
    block(run)
    for step in range(2, 12, 2):
        saver.save(replace_step(state, step), records(step - 2, step - 1))
        assert num_copies() <= before + 2
    run.remove(CHECKPOINTS)
    saver.wait()
    assert num_copies() == before + 1


def test_weights_that_cannot_be_written_are_a_storage_error(run, state):
    """safetensors has an error of its own for a full disk."""
    mine = writer(run)
    for file in (MODEL, OPTIMIZER):
        (run / CHECKPOINTS / checkpoint_name(2, 1)).delete()
        (run / CHECKPOINTS / checkpoint_name(2, 1) / file).write("directory", b"")
        with pytest.raises(OSError, match=r"directory"):
            mine.write(host_copy(state), None, [])
        assert find_checkpoints(run) == []  # a full disk needs the room


def test_finishing_waits_for_storage_up_to_a_limit(run, state, saver_of):
    saver, log = saver_of(run, parent="step-00000001-attempt-0001", outage_limit_s=0.5)
    block(run)
    with pytest.raises(UserError, match=r"run_dir: .*step 2.*outage_limit_s.*stands at step-00000001.*same command"):
        saver.finish(state, records(0, 1))
    assert log.committed == []
    saver, log = saver_of(run)
    Timer(0.3, run.remove, [CHECKPOINTS]).start()
    saver.finish(state, records(0, 1))
    assert log.committed == [checkpoint_name(2, 2)]


def test_a_long_outage_is_told_of_once_more(run, state, saver_of):
    saver, log = saver_of(run, outage_limit_s=0.2)
    block(run)
    saver.save(state, records(0, 1))
    assert wait_until(lambda: len(log.warnings) > 1)
    saver.wait(0.5)
    assert len(log.warnings) == 2 and "outage_limit_s" in log.warnings[1] and "make room" in log.warnings[1]


def test_an_attempt_that_ends_gives_up_what_storage_refuses(run, state, saver_of):
    saver, log = saver_of(run)
    block(run)
    saver.save(state, records(0, 1))
    saver.close()
    assert log.committed == [] and (run / ATTEMPTS).names() == ["0001.json"]


def test_a_fenced_saver_stops(run, state, saver_of):
    """Also one whose successor began in an outage."""
    saver, log = saver_of(run)
    block(run)
    saver.save(replace_step(state, 2), records(0, 1))
    assert wait_until(lambda: saver.is_failing)
    begin_attempt(run, 1, 0, None)
    run.remove(CHECKPOINTS)
    saver.wait()
    with pytest.raises(FencedError):
        saver.save(replace_step(state, 4), records(2, 3))
    assert log.committed == [] and newest(run) == (None, [])


def test_a_run_directory_that_is_gone_is_an_outage_and_no_fence(run, state, saver_of):
    """As where a file system is not mounted any more."""
    saver, log = saver_of(run)
    attempts = Path(run.path) / ATTEMPTS
    attempts.rename(f"{attempts}-elsewhere")
    saver.save(state, records(0, 1))
    assert wait_until(lambda: saver.is_failing)
    assert "record of attempt 1" in log.warnings[0]
    Path(f"{attempts}-elsewhere").rename(attempts)
    saver.wait()
    assert log.committed == [checkpoint_name(2, 1)] == find_checkpoints(run)


def test_what_cannot_be_deleted_does_not_undo_the_commit(run, state, saver_of):
    saver, log = saver_of(run, keep=1)
    (run / CHECKPOINTS).write(checkpoint_name(1, 1), b"a file, which is no directory to delete")
    saver.finish(state, records(0, 1))
    assert log.committed == [checkpoint_name(2, 1)] == [newest(run)[0]]
    assert len(log.warnings) == 1 and "could not be deleted" in log.warnings[0]


def test_every_checkpoint_names_its_parent(run, state, saver_of):
    saver, _ = saver_of(run, "step-00000002-attempt-0001")
    for step in (4, 6):
        saver.save(replace_step(state, step), records(step))
        saver.wait()
    parents = [json.loads(open_checkpoint(run, name).directory.read(STATE))["parent"] for name in find_checkpoints(run)]
    assert parents == ["step-00000004-attempt-0001", "step-00000002-attempt-0001"]


def test_a_checkpoint_moves_with_its_run(run, state, tmp_path):
    (name,) = write_all(writer(run), state, 2)
    Path(run.path).rename(tmp_path / "elsewhere")
    assert newest(Directory(str(tmp_path / "elsewhere"))) == (name, [])


def test_a_checkpoint_of_another_format_is_refused(run, state, monkeypatch):
    """An older one, though it is intact: its history says other things of what arrived."""
    monkeypatch.setattr("raybert.checkpoint.FORMAT_VERSION", FORMAT_VERSION - 1)
    (name,) = write_all(writer(run), state, 2)
    rule = rf"{name} is of format {FORMAT_VERSION - 1}, and this raybert reads format {FORMAT_VERSION}; go on with the"
    with pytest.raises(UserError, match=rule):
        newest_checkpoint(run, print)
