"""What torch's allocator hands out on a CPU, by its own record."""

import itertools

from torch.profiler import ProfilerActivity, profile


def peak_bytes(work):
    """The most that work has at once, beyond what is there before it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        work()
    events = recorded.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    return max(itertools.accumulate(size_bytes for _, size_bytes in changes))
