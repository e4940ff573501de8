"""Laws of the training step: its result depends on neither the world size, the micro-batches nor interruptions."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import DATA, TINY_MODEL, take_step
from ranks import run_ranks

from raybert.checkpoint import Writer, host_copy, restore
from raybert.config import OptimizerConfig, TrainingConfig
from raybert.feed import FeedError, Layout, local_batches, rank_batches, window_blocks
from raybert.history import begin_attempt
from raybert.loop import Trail
from raybert.manifest import open_checkpoint
from raybert.order import SampleOrder
from raybert.plan import plan
from raybert.step import _backward, create_state, pass_over, settle_buckets
from raybert.storage import Directory
from raybert.world import CPU, World

SEQ_LENGTH = 16
NUM_STEPS = 12
MODEL = replace(TINY_MODEL, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
WITH_DROPOUT = replace(TINY_MODEL, hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.2)
OPTIMIZER = OptimizerConfig(learning_rate=1e-2, warmup_steps=3)
TRAINING = TrainingConfig(num_steps=NUM_STEPS, global_batch_size=32, micro_batch_size=8)
WORLD_SIZES = (1, 2, 3, 5, 7)


def make_order(index):
    return SampleOrder(index.page_sizes, seed=3, global_batch_size=32, window_steps=4)


def make_state(world, model=MODEL, training=TRAINING, dtype=torch.float32):
    torch.set_default_dtype(dtype)
    try:
        state = create_state(model, training, OPTIMIZER, world)
    finally:
        torch.set_default_dtype(torch.float32)
    settle_buckets(state, SEQ_LENGTH, training, world)
    return state


def batches(index, world, start_step=0, stop_step=NUM_STEPS):
    return local_batches(Layout(make_order(index), world.size, start_step, stop_step), index, world.rank)


def weights(state):
    return torch.cat([parameter.detach().ravel() for parameter in state.model.parameters()])


def relative_distance(a, b):
    return (torch.linalg.vector_norm(a - b) / torch.linalg.vector_norm(b)).item()


# Tasks that ranks run ------------------------------------------------------------------------------------------------


def gradients(world, index, model, dtype):
    """Gradients of the first global batch, and the sums over it."""
    state = make_state(world, model, dtype=dtype)
    batch = next(batches(index, world))
    sums, _ = _backward(state, plan(batch, model, TRAINING, world.device), TRAINING, world)
    grads = torch.cat([parameter.grad.ravel() for parameter in state.model.parameters()])
    return grads, world.sum(sums.values)


def seeds(world, index):
    """[ranks, steps * micro-batches] what dropout's random numbers came from."""
    state, found = make_state(world, WITH_DROPOUT), []
    state.model.register_forward_pre_hook(lambda *_: found.append(torch.initial_seed()))
    for batch in batches(index, world):
        take_step(state, batch, TRAINING, OPTIMIZER, world)
    return world.gather(torch.tensor(found))


def drained(world, index, is_crossed):
    """Steps whose records rank 0 has; or its error. Crossed, every rank gets what is rank 0's."""
    layout = Layout(make_order(index), world.size, 0, 4)
    blocks = [block for window in layout.windows for block in window_blocks(window, layout, index)]
    trail, nothing = Trail(world, attempt=1), pass_over(make_state(world), world)
    for batch in rank_batches(blocks[0 if is_crossed else world.rank :: world.size], layout, world.rank):
        trail.add(batch, nothing)
    try:
        return [record.step for record in trail.drain()]
    except FeedError as error:
        return str(error)


def trained(world, index, start_step, stop_step, run_dir=None, parent=None, model=MODEL):
    """Weights after training [start_step, stop_step), from a checkpoint where one is given; saved at the end."""
    state = make_state(world, model)
    run = run_dir and Directory(run_dir)
    if parent:
        restore(open_checkpoint(run, parent), state)
    assert state.step == start_step
    for batch in batches(index, world, start_step, stop_step):
        take_step(state, batch, TRAINING, OPTIMIZER, world)
    name = None
    if run_dir and world.is_first:
        attempt = begin_attempt(run, world.size, start_step, parent)
        name = Writer(run, attempt.number, MODEL, None, {}, keep=0).write(host_copy(state), parent, [])
    return name, weights(state)


def trained_and_saved_at_every_step(world, index, run_dir):
    """Train without interruption and save at every step; names of the checkpoints and the last weights."""
    state, run = make_state(world, WITH_DROPOUT), Directory(run_dir)
    writer = Writer(run, 1, WITH_DROPOUT, None, {}, keep=0)
    if world.is_first:
        begin_attempt(run, world.size, 0, None)
    names = []
    for batch in batches(index, world):
        take_step(state, batch, TRAINING, OPTIMIZER, world)
        if world.is_first:
            names.append(writer.write(host_copy(state), None, []))
    return names, weights(state)


def resumed_from_each(world, index, run_dir, names):
    """The last weights of a run that resumes from each of the checkpoints."""
    results = []
    for name in names:
        state = make_state(world, WITH_DROPOUT)
        restore(open_checkpoint(Directory(run_dir), name), state)
        for batch in batches(index, world, state.step):
            take_step(state, batch, TRAINING, OPTIMIZER, world)
        results.append(weights(state))
    return results


# Laws ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def all_ranks(index, tmp_path_factory):
    """Results of every task in this file that needs a process group, by name; processes are started once."""
    run_dir = tmp_path_factory.mktemp("resizes")
    three = tmp_path_factory.mktemp("three")
    names = [f"step-{step:08d}-attempt-0001" for step in range(1, NUM_STEPS)]
    tasks = {f"gradients {size}": (size, gradients, (index, MODEL, torch.float64)) for size in WORLD_SIZES}
    tasks |= {f"seeds {size}": (size, seeds, (index,)) for size in (1, 3)}
    schedule, parent = [(1, 0, 3), (3, 3, 6), (5, 6, 9), (2, 9, 12)], None
    for number, (size, start, stop) in enumerate(schedule, 1):
        tasks[f"resized {stop}"] = (size, trained, (index, start, stop, str(run_dir), parent))
        parent = f"step-{stop:08d}-attempt-{number:04d}"
    tasks |= {f"crossed {size}": (size, drained, (index, True)) for size in (1, 2)}
    tasks["not crossed"] = (2, drained, (index, False))
    tasks["three ranks"] = (3, trained_and_saved_at_every_step, (index, str(three)))
    tasks["three ranks resumed"] = (3, resumed_from_each, (index, str(three), names))
    return dict(zip(tasks, run_ranks(list(tasks.values())), strict=True))


@pytest.mark.parametrize("size", WORLD_SIZES[1:])
def test_gradients_do_not_depend_on_world_size(all_ranks, size):
    """In float64, over real gloo process groups; 32 samples over 3, 5 and 7 ranks too."""
    (alone, sums), (shared, shared_sums) = all_ranks["gradients 1"], all_ranks[f"gradients {size}"]
    torch.testing.assert_close(shared, alone, rtol=1e-11, atol=1e-14)
    torch.testing.assert_close(shared_sums, sums, rtol=1e-12, atol=0)


@pytest.mark.parametrize(("size", "num_micro_batches"), [(1, 4), (3, 2)])
def test_every_micro_batch_of_a_run_has_random_numbers_of_its_own(all_ranks, size, num_micro_batches):
    found = all_ranks[f"seeds {size}"].flatten().tolist()
    assert len(set(found)) == len(found) == NUM_STEPS * size * num_micro_batches


def test_ranks_that_got_the_same_samples_are_found_out(all_ranks):
    assert all_ranks["crossed 1"] == all_ranks["not crossed"] == [0, 1, 2, 3]
    assert "step 0: the samples that arrived at 2 ranks are not its global batch" in all_ranks["crossed 2"]


def test_resume_at_another_world_size(all_ranks, index):
    """1, 3, 5, then 2 ranks end where one undisturbed rank ends."""
    _, undisturbed = trained(World(), index, 0, NUM_STEPS)
    assert relative_distance(all_ranks["resized 12"][1], undisturbed) <= 1e-5


def test_resume_equals_uninterrupted_run(index, tmp_path):
    """Bitwise, restored at every step, with dropout."""
    names, expected = trained_and_saved_at_every_step(World(), index, str(tmp_path))
    results = resumed_from_each(World(), index, str(tmp_path), names[:-1])
    assert len(results) == NUM_STEPS - 1
    for result in results:
        assert torch.equal(result, expected)


def test_resume_equals_uninterrupted_run_at_three_ranks(all_ranks):
    """Bitwise too: the order of summation over ranks is the same from the first step of every attempt."""
    _, expected = all_ranks["three ranks"]
    results = all_ranks["three ranks resumed"]
    assert len(results) == NUM_STEPS - 1
    for result in results:
        assert torch.equal(result, expected)


@pytest.mark.parametrize("micro_batch_size", [1, 5, 8, 32])
def test_gradients_do_not_depend_on_micro_batches(index, micro_batch_size):
    expected, _ = gradients(World(), index, MODEL, torch.float64)
    state = make_state(World(), dtype=torch.float64)
    training = replace(TRAINING, micro_batch_size=micro_batch_size)
    _backward(state, plan(next(batches(index, World())), MODEL, training, CPU), training, World())
    grads = torch.cat([parameter.grad.ravel() for parameter in state.model.parameters()])
    torch.testing.assert_close(grads, expected, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_activation_checkpointing_changes_nothing(index, precision):
    """With dropout, bitwise: what is computed again is the same."""
    found = []
    for recomputes in (False, True):
        training = replace(TRAINING, precision=precision, activation_checkpointing=recomputes)
        state = create_state(WITH_DROPOUT, training, OPTIMIZER, World())
        for batch in batches(index, World(), stop_step=2):
            take_step(state, batch, training, OPTIMIZER, World())
        found.append(weights(state))
    assert torch.equal(*found)


def test_masked_lm_only_leaves_the_next_sentence_head_alone(index):
    training = replace(TRAINING, use_next_sentence_label=False)
    state = make_state(World(), training=training)
    before = {name: tensor.clone() for name, tensor in state.model.state_dict().items()}
    for batch in batches(index, World(), stop_step=3):
        take_step(state, batch, training, OPTIMIZER, World())
    changed = {name for name, tensor in state.model.state_dict().items() if not torch.equal(tensor, before[name])}
    untouched = {name for name in before if name.startswith(("bert.pooler", "cls.seq_relationship"))}
    assert changed == before.keys() - untouched


def test_an_overflow_in_fp16_skips_the_update_and_consumes_the_step(index):
    training = replace(TRAINING, precision="fp16", num_steps=100)
    state = make_state(World(), training=training)
    state.scaler._init_scale = 2.0**40  # overflows for certain
    before = weights(state)
    first, second = list(batches(index, World(), stop_step=2))
    result = take_step(state, first, training, OPTIMIZER, World())
    assert result.skipped
    assert torch.equal(weights(state), before)
    assert (state.step, int(state.num_skipped)) == (1, 1)
    while take_step(state, second, training, OPTIMIZER, World()).skipped:
        pass
    assert not torch.equal(weights(state), before)


@pytest.mark.parametrize("kind", ["adamw", "lamb"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_gradient_that_is_not_finite_makes_no_update(index, precision, kind):
    """Weights, moments and their count stay as they were; the step is consumed."""
    training, optimizer = replace(TRAINING, precision=precision), replace(OPTIMIZER, type=kind)
    state = create_state(MODEL, training, optimizer, World())
    batch, first, second = list(batches(index, World(), stop_step=3))
    assert not take_step(state, batch, training, optimizer, World()).skipped
    before = host_copy(state)
    hook = state.model.cls.predictions.transform.register_forward_hook(lambda *call: call[-1] * torch.nan)
    assert take_step(state, first, training, optimizer, World()).skipped
    hook.remove()
    after = host_copy(state)
    assert (after.step, after.num_updates) == (2, 1) == (before.step + 1, before.num_updates)
    for name in ("model", "optimizer"):
        ours, theirs = getattr(after, name), getattr(before, name)
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert not take_step(state, second, training, optimizer, World()).skipped
    assert not torch.equal(
        weights(state), torch.cat([before.model[name].ravel() for name, _ in state.model.named_parameters()])
    )


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_is_near_fp32(index, precision):
    losses = []
    for training in (TRAINING, replace(TRAINING, precision=precision)):
        state = make_state(World(), training=training)
        results = [take_step(state, batch, training, OPTIMIZER, World()) for batch in batches(index, World())]
        assert all(parameter.dtype == torch.float32 for parameter in state.model.parameters())
        losses.append(results[0].sums.metrics()["loss"])
    assert losses[1] == pytest.approx(losses[0], rel=2e-2)
    assert losses[1] != losses[0]


def test_golden_step(sample_index):
    """One update on real records; a change of numerics changes the golden file in the same commit and says why."""
    model = replace(TINY_MODEL, vocab_size=30522, max_position_embeddings=128)
    state = create_state(model, TRAINING, OPTIMIZER, World())
    order = SampleOrder(sample_index.page_sizes, seed=3, global_batch_size=32, window_steps=4)
    batch = next(local_batches(Layout(order, 1, 0, 1), sample_index))
    result = take_step(state, batch, TRAINING, OPTIMIZER, World())
    found = {
        "samples": batch.samples[:4].tolist(),
        **result.sums.metrics(),
        "grad_norm": float(result.grad_norm),
        "parameter_norm": float(torch.linalg.vector_norm(weights(state))),
    }
    golden = json.loads((DATA / "golden_step.json").read_text())
    assert found.keys() == golden.keys()
    for name, value in golden.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-5, err_msg=name)
