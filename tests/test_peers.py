"""Peer snapshots: which may be begun from, that nothing is lost through one, and what a run is that lost nodes."""

import json
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch
from faults import leftovers, raylet, scene
from helpers import TINY_MODEL, tiny_config
from nodes import cluster, descendants, finish, running
from ranks import run_ranks
from runs import assert_exactly_once, flags, last_weights, relative_distance

from raybert.checkpoint import Saver, Writer, host_copy
from raybert.config import OptimizerConfig
from raybert.errors import UserError
from raybert.feed import Layout, local_batches
from raybert.guard import RollbackError, bar, newest_rollback
from raybert.history import Attempt, StepRecord, begin_attempt, read_attempts, read_history, trained_by
from raybert.loop import train
from raybert.manifest import find_checkpoints
from raybert.order import SampleOrder
from raybert.peers import NUM_NODES, Parcel, Peers, Snapshot, Trail, load, newest_usable, savers
from raybert.step import create_state, settle_buckets
from raybert.storage import Directory
from raybert.verify import verify
from raybert.world import World

EVERY, NUM_STEPS = 3, 12

# --- Decisions ------------------------------------------------------------------------------------------------------


def records(text, first=0):
    """Steps by the attempts that trained them: "112" is two of attempt 1 and one of attempt 2."""
    return tuple(StepRecord(step, int(attempt), ()) for step, attempt in enumerate(text, first))


def spelt(trail):
    """The trail's first step, and the attempts of its steps."""
    return trail.first, "".join(str(record.attempt) for record in trail.records)


C5, C8 = "step-00000005-attempt-0001", "step-00000008-attempt-0001"


@pytest.mark.parametrize(
    ("before", "parent", "more", "after"),
    [
        (Trail(), None, records("111"), (0, "111")),
        (Trail(None, records("111")), None, records("11", 3), (0, "11111")),
        (Trail(None, records("111111")), C5, records("11", 6), (5, "111")),  # committed meanwhile
        (Trail(None, records("111111")), None, records("22", 4), (0, "111122")),  # from a snapshot at 4
        (Trail(C5, records("1111", 5)), C5, records("2", 5), (5, "2")),  # from the checkpoint
        (Trail(C5, records("1111", 5)), None, records("2"), (0, "2")),  # which is damaged: from the beginning
        (Trail(C5, records("1111", 5)), C8, (), (8, "1")),
    ],
)
def test_what_a_trail_is_after_more_steps(before, parent, more, after):
    assert spelt(before.followed(parent, more)) == after


@pytest.mark.parametrize(
    ("trail", "snapshot", "leads"),
    [
        (Trail(None, records("1111")), Snapshot(3, 1), True),
        (Trail(None, records("1111")), Snapshot(4, 1), True),
        (Trail(None, records("1111")), Snapshot(5, 1), False),  # nobody says what step 4 was
        (Trail(None, records("1122")), Snapshot(2, 1), True),  # attempt 2 began from it
        (Trail(None, records("1122")), Snapshot(3, 1), False),  # attempt 1 went another way there
        (Trail(None, records("1122")), Snapshot(3, 2), True),
        (Trail(None, records("1122")), Snapshot(2, 2), False),
        (Trail(None, records("22")), Snapshot(2, 1), False),
        (Trail(C5, records("11", 5)), Snapshot(6, 1), True),
        (Trail(C5, records("11", 5)), Snapshot(5, 1), False),  # the checkpoint itself
        (Trail(C5, records("11", 6)), Snapshot(8, 1), False),  # a gap
        (Trail(), Snapshot(0, 1), False),
    ],
)
def test_a_snapshot_is_used_where_the_steps_to_it_are_known(trail, snapshot, leads):
    assert trail.leads_to(snapshot) is leads


def test_an_attempt_that_was_cut_off_is_not_followed():
    peers = Peers()
    for attempt, more in [(1, records("111")), (2, records("2", 2)), (1, records("1", 3)), (2, records("2", 3))]:
        peers.follow(attempt, None, more)
    assert spelt(peers._trail) == (0, "1122")


S3, S6 = Snapshot(3, 1), Snapshot(6, 1)


@pytest.mark.parametrize(
    ("held", "committed_step", "rolled_back", "tried", "found"),
    [
        ([S3, S6], 0, 0, [], S6),
        ([S6, S3], 0, 0, [], S6),
        ([S3], 0, 0, [], S3),  # of the newest one only the other node knew
        ([], 0, 0, [], None),
        ([S3, S6], 5, 0, [], S6),
        ([S3, S6], 6, 0, [], None),  # a checkpoint is as new
        ([S3, S6], 0, 1, [], None),  # the guard ended that attempt
        ([S3, S6], 0, 0, [S6], S3),
        ([S3, S6], 0, 0, [S6, S3], None),
        ([Snapshot(9, 1), S3], 0, 0, [], S3),  # the way to the other is not known
    ],
)
def test_which_snapshot_the_next_attempt_begins_from(held, committed_step, rolled_back, tried, found):
    trail = Trail(None, records("11111111"))
    assert newest_usable(held, trail, committed_step, rolled_back, tried) == found


@pytest.mark.parametrize(
    ("nodes", "expected"),
    [("a", {0: "a"}), ("aab", {0: "a", 2: "b"}), ("abab", {0: "a", 1: "b"}), ("aabbcc", {0: "a", 2: "b"})],
)
def test_two_nodes_hold_snapshots(nodes, expected):
    assert savers(list(nodes)) == expected


def test_the_newest_rollback_is_known(run):
    assert newest_rollback(run) == 0
    for number in (1, 2):
        begin_attempt(run, 1, 0, None)
        bar(run, number, RollbackError(3, 3, "why"))
    assert newest_rollback(run) == 2


@pytest.mark.parametrize(("step", "expected"), [(0, 1), (5, 1), (6, 2), (8, 2), (9, 4), (20, 4)])
def test_a_step_was_trained_by_whom_the_attempt_descends_from(step, expected):
    begun = {1: (0, None), 2: (6, 1), 3: (6, 1), 4: (9, 2)}
    known = {number: Attempt(number, 1, start, None, "", (), of) for number, (start, of) in begun.items()}
    assert trained_by(step, 4, known) == expected
    assert trained_by(step, 5, known) == 5  # of which nothing is known


def test_descent_ends_even_where_the_record_is_wrong():
    assert trained_by(0, 2, {2: Attempt(2, 1, 6, None, "", (), 2)}) == 2


def test_an_attempt_says_which_snapshot_it_began_from(run):
    written = [begin_attempt(run, 2, 0, None), begin_attempt(run, 1, 6, None, snapshot=1)]
    assert read_attempts(run) == written
    old = json.loads((run / "attempts").read("0001.json"))
    del old["snapshot"]  # of a version without snapshots
    (run / "attempts").write("0001.json", json.dumps(old).encode())
    assert read_attempts(run) == written


# --- The state ------------------------------------------------------------------------------------------------------


@pytest.fixture
def state():
    training = tiny_config("unused", "unused").training
    state = create_state(TINY_MODEL, training, OptimizerConfig(), World())
    state.step = 7
    return state


def test_a_parcel_is_all_of_the_state_and_shares_no_memory(state):
    parcel = Parcel.of(host_copy(state))
    for part in (parcel.model, parcel.optimizer):
        for array in part.values():
            array.setflags(write=False)  # as Ray gives it
    other = create_state(TINY_MODEL, tiny_config("", "", **{"training.seed": 2}).training, OptimizerConfig(), World())
    load(parcel, parcel.checksum(), Snapshot(7, 1), other)
    assert other.step == 7
    for name, tensor in state.model.state_dict().items():
        assert torch.equal(other.model.state_dict()[name], tensor), name
    with torch.no_grad():
        next(other.model.parameters()).zero_()
    assert parcel.checksum() == Parcel.of(host_copy(state)).checksum()


def test_what_is_not_what_was_handed_over_is_refused(state):
    parcel = Parcel.of(host_copy(state))
    before, checksum = Parcel.of(host_copy(state)).checksum(), parcel.checksum()
    with pytest.raises(ValueError, match="not what was handed over"):
        load(parcel, checksum, Snapshot(6, 1), state)
    for name, array in parcel.model.items():
        damaged = np.array(array)
        damaged.reshape(-1).view(np.uint8)[-1] ^= 1
        with pytest.raises(ValueError, match="not what was handed over"):
            load(replace(parcel, model={**parcel.model, name: damaged}), checksum, Snapshot(7, 1), state)
    less = {name: array for name, array in parcel.model.items() if name != next(iter(parcel.model))}
    other = replace(parcel, model=less)
    with pytest.raises(UserError, match="snapshot at step 7 of attempt 1: model weights of another configuration"):
        load(other, other.checksum(), Snapshot(7, 1), state)
    assert Parcel.of(host_copy(state)).checksum() == before


# --- Records and weights --------------------------------------------------------------------------------------------


class Life:
    """A run whose attempts end as if their processes were killed; what the peers know of it stays."""

    def __init__(self, world, index, run):
        self.config = tiny_config(run.path, "", **{"training.num_steps": NUM_STEPS, "checkpoint.every_steps": 100})
        self.config = replace(self.config, checkpoint=replace(self.config.checkpoint, snapshot_every_steps=EVERY))
        self.world, self.index, self.run = world, index, run
        self.order = SampleOrder(index.page_sizes, 1, self.config.training.global_batch_size, 4)
        self.held, self.trail = {}, Trail()

    def attempt(self, number, snapshot=None, until=NUM_STEPS):
        """Train from a snapshot until a step; its state and records that no snapshot carries."""
        state = create_state(self.config.model, self.config.training, self.config.optimizer, self.world)
        settle_buckets(state, 16, self.config.training, self.world)
        if snapshot:
            load(self.held[snapshot], self.held[snapshot].checksum(), snapshot, state)
        if self.world.is_first:
            begin_attempt(self.run, self.world.size, state.step, None, (), snapshot and snapshot.attempt)

        def keep(state, records):
            self.trail = self.trail.followed(None, records)
            self.held[Snapshot(state.step, number)] = Parcel.of(host_copy(state))

        layout = Layout(self.order, self.world.size, state.step, NUM_STEPS)
        batches = islice(local_batches(layout, self.index, self.world.rank), until - state.step)
        result = train(state, batches, self.config, self.world, number, {}, None, None, keep)
        return state, result.records

    def newest(self):
        """As rank 0 finds it, which alone has the records."""
        found = newest_usable(self.held, self.trail, 0, 0, []) or Snapshot(0, 0)
        return Snapshot(*self.world.gather(torch.tensor([found.step, found.attempt]))[0].tolist())


def lost_and_resumed(world, index, directory):
    """Weights of a run that loses three attempts, one of them before its first snapshot, and of one that loses none."""
    undisturbed, _ = Life(world, index, Directory(f"{directory}/whole")).attempt(1)
    run = Directory(f"{directory}/run")
    life = Life(world, index, run)
    life.attempt(1, until=5)
    assert life.newest() == Snapshot(3, 1)
    life.attempt(2, life.newest(), until=4)  # dies before it has a snapshot of its own
    assert life.newest() == Snapshot(3, 1)
    life.attempt(3, life.newest(), until=8)
    assert life.newest() == Snapshot(6, 3)
    begun = life.newest()
    state, rest = life.attempt(4, begun)
    if world.is_first:
        writer = Writer(run, 4, TINY_MODEL, None, {}, 0)
        saver = Saver(writer, None, lambda name: None, print, 60, life.trail.until(begun.step))
        saver.note(life.trail.records[begun.step :])
        saver.finish(state, rest)
    return [torch.cat([p.detach().ravel() for p in each.model.parameters()]) for each in (state, undisturbed)]


def test_nothing_is_lost_or_changed_through_snapshots(index, tmp_path):
    """At one and at three ranks: bitwise the weights of the undisturbed run, and every step once in the record."""
    sizes = (1, 3)
    results = run_ranks([(size, lost_and_resumed, (index, str(tmp_path / str(size)))) for size in sizes])
    for size, (weights, undisturbed) in zip(sizes, results, strict=True):
        assert torch.equal(weights, undisturbed)
        run = Directory(str(tmp_path / str(size) / "run"))
        (name,) = find_checkpoints(run)
        history = read_history(run, name)
        assert [record.step for record in history] == list(range(NUM_STEPS))
        known = {one.number: one for one in read_attempts(run)}
        assert [record.attempt for record in history] == [1] * 3 + [3] * 3 + [4] * 6
        assert [trained_by(record.step, 4, known) for record in history] == [record.attempt for record in history]


# --- On clusters ----------------------------------------------------------------------------------------------------

LAST = 40
RARELY = {"training__num_steps": LAST, "checkpoint__every_steps": 1000}


def actors(nodes):
    """Processes of holders and peers."""
    processes = (line for node in nodes.list_all_nodes() for line in descendants(raylet(node)).values())
    return [line for line in processes if line.startswith(("ray::Holder", "ray::Peers"))]


def recovered(directory, fault, rank, num_nodes, sample_index, **settings):
    """A run whose only checkpoint is its last: a fault costs no more than the steps since a snapshot, and the step that
    it happened in; returns the last weights."""
    settings = RARELY | {"checkpoint__snapshot_every_steps": EVERY} | settings
    with scene(directory, num_nodes, **settings) as stage:
        run = Directory(str(stage.run_dir))
        stage.wait_for_steps(15)  # the holders' processes have started
        recovery = stage.recover(fault, rank)
        print(recovery)
        assert recovery.redone <= EVERY + 1
        stage.wait_for_steps(4)
        assert find_checkpoints(run) == []
        assert len(actors(stage.nodes)) == 1 + min(recovery.world_size, NUM_NODES)  # none where no worker is any more
        stage.pace.write_text("0")
        finish(stage.process)
        assert leftovers(stage.nodes) == [] == actors(stage.nodes)
    assert_exactly_once(stage.run_dir, LAST, sample_index)
    first, *later = read_attempts(run)
    assert first.snapshot is None and later
    assert all(one.snapshot == 1 and one.start_step > 0 and one.start_step % EVERY == 0 for one in later)
    assert verify(run).findings == []
    return last_weights(stage.run_dir)


def test_the_death_of_rank_0s_node_costs_the_steps_since_a_snapshot(tmp_path, sample_index, undisturbed):
    """Its node held one of the two; the other one is enough."""
    weights = recovered(tmp_path, "kill_node", 0, 2, sample_index)
    assert relative_distance(weights, undisturbed(LAST)) <= 1e-5


@pytest.fixture(scope="module")
def weights_of_two(tmp_path_factory):
    """Weights of two workers that nothing happens to, and that make no snapshot."""
    run_dir = tmp_path_factory.mktemp("two") / "run"
    settings = RARELY | {"cluster__num_workers": 2, "cluster__cpus_per_worker": 2}
    with cluster(2) as nodes, running(nodes.address, *flags(run_dir, **settings)) as process:
        finish(process)
    return last_weights(run_dir)


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("fault", "rank"), [("kill_worker", 0), ("kill_worker", 1), ("replace_node", 0), ("kill_during_restore", 1)]
)
def test_at_the_same_world_size_the_weights_are_bitwise_the_same(fault, rank, tmp_path, sample_index, weights_of_two):
    weights = recovered(tmp_path, fault, rank, 2, sample_index, cluster__num_workers=2)
    assert torch.equal(weights, weights_of_two)


@pytest.mark.nightly
@pytest.mark.parametrize(("fault", "rank"), [("kill_node", 0), ("kill_node", 1), ("kill_node", 2), ("kill_two", 0)])
def test_of_three_nodes_one_that_holds_is_enough(fault, rank, tmp_path, sample_index, undisturbed):
    weights = recovered(tmp_path, fault, rank, 3, sample_index)
    assert relative_distance(weights, undisturbed(LAST)) <= 1e-5
