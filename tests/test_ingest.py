"""The feed through a real Ray Data, and what its processes keep."""

import os
import time

import pytest
import ray
from nodes import cluster
from ray._private.internal_api import node_stats
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raybert.feed import Layout, rank_batches
from raybert.ingest import blocks, quiet_data, split
from raybert.order import SampleOrder

NUM_STEPS, LIMIT_S = 40, 20


@ray.remote(num_cpus=1)
class Busy:
    """Takes a CPU from all else."""

    def is_there(self):
        return True


def holders():
    """Processes that hold references to objects, other than this one: pid to how many."""
    places = [(node["NodeManagerAddress"], node["NodeManagerPort"]) for node in ray.nodes()]
    workers = [stats for place in places for stats in node_stats(*place).core_workers_stats]
    counts = {stats.pid: len(stats.object_refs) for stats in workers}
    return {pid: count for pid, count in counts.items() if count and pid != os.getpid()}


@pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.data.context")  # Ray reads all of its own settings
def test_processes_that_have_read_windows_hold_no_reference(sample_index):
    """They keep copies while the driver goes on; Ray takes one that holds a reference, and its node, for busy."""
    with cluster(1) as nodes:
        ray.init(nodes.address, log_to_driver=False)
        try:
            head = NodeAffinitySchedulingStrategy(nodes.head_node.node_id, soft=False)
            busy = Busy.options(scheduling_strategy=head).remote()  # so that the other node reads
            assert ray.get(busy.is_there.remote())
            quiet_data()
            shared = ray.put(sample_index)  # label counts and all: too large to travel inside a message
            layout = Layout(SampleOrder(sample_index.page_sizes, 1, 32, 2), 1, 0, NUM_STEPS)
            (iterator,) = split(layout, shared)
            steps = [batch.step for batch in rank_batches(blocks(iterator), layout, 0)]
            assert steps == list(range(NUM_STEPS))
            del iterator  # with it ends what it was executed by
            until_s = time.monotonic() + LIMIT_S
            while held := holders():
                assert time.monotonic() < until_s, held
                time.sleep(0.5)
        finally:
            ray.shutdown()
