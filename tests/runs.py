"""Small runs on clusters of one worker a node, and what holds for each: every step once, and undisturbed weights."""

import itertools

import torch
from helpers import SAMPLE_FILE
from nodes import finish, running
from safetensors.torch import load_file

from raybert.history import CHECKSUM_LIMIT, checksum, read_history
from raybert.manifest import MODEL, newest_checkpoint
from raybert.order import SampleOrder, rank_slice, steps_per_window
from raybert.storage import Directory

G, WINDOW = 32, 128
SETTINGS = {
    "data.input_files": SAMPLE_FILE,
    "data.window_size": WINDOW,
    "model.hidden_size": 32,
    "model.num_hidden_layers": 2,
    "model.num_attention_heads": 2,
    "model.intermediate_size": 64,
    "model.hidden_dropout_prob": 0,
    "model.attention_probs_dropout_prob": 0,
    "optimizer.learning_rate": 1e-4,
    "training.global_batch_size": G,
    "training.micro_batch_size": 8,
    "training.log_every_steps": 1,
    "checkpoint.every_steps": 5,
    "cluster.resize_check_s": 3,
    "cluster.start_timeout_s": 5,
    "cluster.keep_spares": "false",  # all nodes are this machine
}


def flags(run_dir, **settings):
    merged = SETTINGS | {name.replace("__", "."): value for name, value in settings.items()}
    return [f"--run_dir={run_dir}", *(f"--{name}={value}" for name, value in merged.items())]


def last_weights(run_dir):
    """Every parameter of the newest checkpoint, in one vector."""
    warnings = []
    checkpoint = newest_checkpoint(Directory(str(run_dir)), warnings.append)
    assert not warnings
    with checkpoint.directory.local() as path:
        tensors = load_file(path / MODEL)
    return torch.cat([tensors[name].ravel() for name in sorted(tensors)])


def relative_distance(a, b):
    return (torch.linalg.vector_norm(a - b) / torch.linalg.vector_norm(b)).item()


def assert_exactly_once(run_dir, num_steps, index):
    """The effective history holds every step once, and what arrived is what the sample order says; its world sizes."""
    run = Directory(str(run_dir))
    history = read_history(run, newest_checkpoint(run, print).name)
    assert [record.step for record in history] == list(range(num_steps))
    order = SampleOrder(index.page_sizes, 12345, G, steps_per_window(WINDOW, G))
    for record in history:
        world_size = len(record.arrivals)
        for rank, arrival in enumerate(record.arrivals):
            mine, start = rank_slice(G, rank, world_size), record.step * G
            assert (arrival.first, arrival.stop) == (start + mine.start, start + mine.stop)
        arrived = sum(arrival.checksum for arrival in record.arrivals) % CHECKSUM_LIMIT
        assert arrived == checksum(order.positions(record.step), order.global_batch(record.step))
    return [len(record.arrivals) for record in history]


def undisturbed_weights(run_dir, num_steps, within=(), **settings):
    """Weights after a run in one process."""
    settings |= {"training__num_steps": num_steps, "cluster__num_workers": 0}
    with running(None, *flags(run_dir, **settings), within=within) as process:
        finish(process)
    return last_weights(run_dir)


def changes(values):
    """The values without those that repeat the one before."""
    return [value for value, _ in itertools.groupby(values)]
