"""Laws of scaling and of the hold before a planned end, and the contract with the insides of Ray that they stand on."""

import socket
import threading

import pytest
import torch
from nodes import free_ports
from ranks import run_ranks
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.callback import ControllerCallback
from ray.train.v2.api.config import RunConfig, ScalingConfig

from raybert import launch, scaling, spares
from raybert.config import ClusterConfig
from raybert.hold import Hold
from raybert.scaling import CheckpointedScaling, ElasticTrainer, Node, Persistence, answers, missing, room, seats


def test_the_installed_ray_has_what_scaling_needs():
    """Fails on a Ray that is built otherwise: read scaling.py again before pyproject.toml allows it."""
    assert missing() == []
    assert not CheckpointedScaling.__abstractmethods__


@pytest.mark.parametrize("keeps_spares", [True, False])
def test_our_policy_takes_the_place_of_rays(keeps_spares, monkeypatch):
    """Through the seam as Ray calls it, up to where Ray would start its controller."""
    given = {}
    monkeypatch.setattr(TorchTrainer, scaling.SEAM, lambda self, **arguments: given.update(arguments))
    run = RunConfig(worker_runtime_env={})
    settings = {"tell": print, "hang_timeout_s": 60, "keeps_spares": keeps_spares}
    trainer = ElasticTrainer(print, scaling_config=ScalingConfig(num_workers=(1, 2)), run_config=run, **settings)
    callbacks = [ControllerCallback(), PlacementGroupCleanerCallback(), ControllerCallback()]
    trainer._initialize_and_run_controller(scaling_policy="Ray's", train_fn_ref="kept", callbacks=callbacks)
    assert isinstance(given["scaling_policy"], CheckpointedScaling)
    assert given["train_fn_ref"] == "kept"
    assert given["callbacks"] == callbacks[::2]  # the cleaner's process would outlive a driver that is killed
    assert trainer.run_config.worker_runtime_env == (spares.ENVIRONMENT if keeps_spares else {})


def test_without_the_seam_rays_policy_is_used_and_said(monkeypatch):
    monkeypatch.setitem(scaling.NEEDED, TorchTrainer, ("_not_there",))
    said = []
    assert launch._trainer_class(ClusterConfig(), print, said.append) is TorchTrainer
    assert "TorchTrainer._not_there" in said[0] and "Ray's own scaling policy is used" in said[0]


def test_with_the_seam_ours_is_used_and_nothing_said(monkeypatch):
    monkeypatch.setenv("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    said = []
    assert launch._trainer_class(ClusterConfig(), print, said.append).func is ElasticTrainer
    assert said == []


@pytest.mark.parametrize(
    ("own", "rooms", "most", "found"),
    [
        ({"a": 1, "b": 1}, {"a": 1, "b": 1}, 2, {"a": 1, "b": 1}),
        ({"a": 1}, {"a": 64, "b": 64}, 2, {"a": 2}),  # never more than the run may have
        ({"b": 2}, {"a": 1, "b": 2, "c": 9}, 4, {"b": 2, "a": 1, "c": 1}),
        ({"gone": 1, "b": 1}, {"b": 1, "c": 1}, 3, {"b": 1, "c": 1}),  # nothing waits where nobody is to be
        ({}, {"a": 0}, 2, {}),
    ],
)
def test_seats_are_where_the_workers_are_and_then_where_there_is_room(own, rooms, most, found):
    assert seats(own, rooms, most) == found


@pytest.mark.parametrize(
    ("has", "number"),
    [
        ({"CPU": 4.0, "GPU": 2.0}, 2),
        ({"CPU": 3.0, "GPU": 2.0}, 1),  # a GPU without its CPUs is no room
        ({"CPU": 8.0}, 0),
        ({"CPU": 1.9, "GPU": 1.0}, 0),
    ],
)
def test_room_counts_whole_workers(has, number):
    assert room({"node": has}, {"CPU": 2, "GPU": 1, "TPU": 0}) == {"node": number}


def test_a_wish_that_comes_and_goes_does_not_last():
    now_s = iter([0, 4, 5, 6, 9])
    wishes = Persistence(lambda: next(now_s))
    assert [wishes.held_s(number) for number in (3, 3, 2, 3, 3)] == [0, 4, 0, 0, 3]


def test_a_node_answers_while_its_raylet_listens():
    with socket.create_server(("127.0.0.1", 0)) as server:
        assert answers(Node("a", "127.0.0.1", server.getsockname()[1], False))
    assert not answers(Node("a", "127.0.0.1", free_ports(1)[0], False))


# The hold


def test_a_hold_is_kept_until_it_is_released():
    hold, kept = Hold(), []
    hold.ask()
    assert hold.state == "asked"
    thread = threading.Thread(target=lambda: kept.append(hold.keep(limit_s=60)))
    thread.start()
    while hold.state != "held":
        pass
    hold.ask()
    assert hold.state == "held"  # asking again changes nothing
    hold.release()
    thread.join(10)
    assert kept == [True] and hold.state == "none"


def test_a_hold_that_nobody_ends_is_over():
    hold = Hold()
    assert hold.keep(limit_s=0.1) is False
    assert hold.state == "none"


def votes(world, yes):
    """[ranks, questions] what each rank is told."""
    asked = [world.any(world.rank in ranks) for ranks in yes]  # before the first is answered
    return world.gather(torch.tensor([int(answer()) for answer in asked])).tolist()


def test_one_yes_is_everybodys():
    told = run_ranks([(size, votes, ([(), (0,), (size - 1,), ()],)) for size in (1, 3)])
    assert told == [[[0, 1, 1, 0]], [[0, 1, 1, 0]] * 3]
