"""The feed through a real Ray Data, and what its processes keep."""

import time

import ray
from nodes import cluster
from ray.autoscaler.v2.sdk import get_cluster_status
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raybert.feed import Layout, rank_batches
from raybert.ingest import blocks, quiet_data, split
from raybert.order import SampleOrder

NUM_STEPS = 40
IDLE_MS, LIMIT_S = 2000, 30


@ray.remote(num_cpus=1)
class Busy:
    """Takes a CPU from all else."""

    def is_there(self):
        return True


def idle_ms(address, node_id):
    """For how long a node has been idle in the autoscaler's eyes; None if it is not."""
    return {node.node_id: node.resource_usage.idle_time_ms for node in get_cluster_status(address).idle_nodes}.get(
        node_id
    )


def test_a_node_that_has_read_windows_is_idle_afterwards(index):
    """Its processes keep copies, not references, while the driver goes on: an autoscaler may take it away."""
    with cluster(1) as nodes:
        ray.init(nodes.address, log_to_driver=False)
        try:
            head = NodeAffinitySchedulingStrategy(nodes.head_node.node_id, soft=False)
            busy = Busy.options(scheduling_strategy=head).remote()  # so that the other node reads
            assert ray.get(busy.is_there.remote())
            quiet_data()
            shared = ray.put(index.for_reading())
            layout = Layout(SampleOrder(index.page_sizes, 1, 32, 2), 1, 0, NUM_STEPS)
            (iterator,) = split(layout, shared)
            steps = [batch.step for batch in rank_batches(blocks(iterator), layout, 0)]
            assert steps == list(range(NUM_STEPS))
            del iterator  # with it ends what it was executed by
            (node,) = nodes.worker_nodes
            until_s = time.monotonic() + LIMIT_S
            while (idle_ms(nodes.address, node.node_id) or 0) < IDLE_MS:
                assert time.monotonic() < until_s, get_cluster_status(nodes.address).active_nodes
                time.sleep(0.2)
        finally:
            ray.shutdown()
