"""Checkpoints: complete or absent, verified, of one owner; and what they hold is all that a run is."""

import json
import pickletools
import shutil
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from helpers import TINY_MODEL

from raybert.checkpoint import (
    CHECKPOINTS,
    MANIFEST,
    MODEL,
    OPTIMIZER,
    STATE,
    Saver,
    Writer,
    checkpoint_name,
    find_checkpoints,
    host_copy,
    newest_checkpoint,
    open_checkpoint,
    restore,
)
from raybert.config import OptimizerConfig, TrainingConfig
from raybert.errors import UserError
from raybert.feed import Layout, local_batches
from raybert.history import FencedError, StepRecord, begin_attempt, read_history
from raybert.order import SampleOrder
from raybert.step import create_state, train_step
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
        train_step(state, batch, training, optimizer, World())
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
    return [writer.write(replace(copy, step=step), None, []) for step in steps]


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
    log = Log()
    saver = Saver(writer(run), None, log.commit, log.warnings.append)
    saver.save(replace_step(state, 2), records(0, 1))
    assert saver.is_busy
    saver.save(replace_step(state, 4), records(2, 3))
    assert saver.is_busy and len(log.warnings) == 1 and "step 4 left out" in log.warnings[0]
    log.gate.set()
    saver.finish(replace_step(state, 6), records(4, 5))
    assert not saver.is_busy
    assert log.committed == [checkpoint_name(2, 1), checkpoint_name(6, 1)]
    assert read_history(run, checkpoint_name(2, 1)) == records(0, 1)
    assert read_history(run, checkpoint_name(6, 1)) == records(*range(6))


def replace_step(state, step):
    return replace(state, step=step)


def saver_of(run, parent=None):
    log = Log()
    log.gate.set()
    return Saver(writer(run), parent, log.commit, log.warnings.append), log


def block(run):
    """Make storage fail: where checkpoints go stands a file."""
    shutil.rmtree(Path(run.path) / CHECKPOINTS, ignore_errors=True)
    run.write(CHECKPOINTS, b"")


def test_a_storage_error_delays_the_commit_and_loses_no_record(run, state):
    saver, log = saver_of(run)
    block(run)
    saver.save(replace_step(state, 2), records(0, 1))
    saver.wait()
    assert log.committed == [] and len(log.warnings) == 1 and "step 2 could not be written" in log.warnings[0]
    saver.save(replace_step(state, 4), records(2, 3))
    saver.wait()
    assert len(log.warnings) == 2
    run.remove(CHECKPOINTS)
    saver.finish(replace_step(state, 6), records(4, 5))
    assert log.committed == [checkpoint_name(6, 1)] and newest(run)[0] == checkpoint_name(6, 1)
    assert read_history(run, checkpoint_name(6, 1)) == records(*range(6))


def test_weights_that_cannot_be_written_are_a_storage_error(run, state):
    """safetensors has an error of its own for a full disk."""
    mine = writer(run)
    for file in (MODEL, OPTIMIZER):
        (run / CHECKPOINTS / checkpoint_name(2, 1)).delete()
        (run / CHECKPOINTS / checkpoint_name(2, 1) / file).write("directory", b"")
        with pytest.raises(OSError, match=r"directory"):
            mine.write(host_copy(state), None, [])


def test_finishing_raises_what_could_not_be_saved(run, state):
    saver, _ = saver_of(run)
    block(run)
    with pytest.raises(OSError, match=CHECKPOINTS):
        saver.finish(state, records(0, 1))


def test_a_fenced_saver_stops(run, state):
    saver, log = saver_of(run)
    begin_attempt(run, 1, 0, None)
    saver.save(replace_step(state, 2), records(0, 1))
    saver.wait()
    with pytest.raises(FencedError):
        saver.save(replace_step(state, 4), records(2, 3))
    assert log.committed == [] and newest(run) == (None, [])


def test_every_checkpoint_names_its_parent(run, state):
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
