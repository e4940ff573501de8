"""Gauges: a run's metrics for Prometheus, which Ray exports at the node of the driver as ray_raybert_*.

Ray drops a gauge that was not set for two of its reporting intervals (20 s), and keeps counters as long as the node. So
gauges are set again and again while they hold; those of a run that ended, or rates of one that does not train, vanish.
"""

from __future__ import annotations

import re
import time

from ray.util.metrics import Counter, Gauge

from raybert.config import Config
from raybert.events import Event
from raybert.storage import Directory

PREFIX = "raybert_"
RATES = {  # these hold only while steps are trained
    "samples_per_s": "Samples trained on per second, all workers.",
    "tokens_per_s": "Real tokens trained on per second, all workers.",
    "flops_per_s": "Model operations per second, all workers.",
    "mfu": "Model FLOPs utilization; absent where the peak of a device is not known.",
    "data_wait": "Share of the time that workers waited for data.",
}
TRAIN = {
    "training_loss": "Training loss since the last line.",
    "lm_example_loss": "Masked LM loss since the last line.",
    "masked_lm_accuracy": "Masked LM accuracy since the last line.",
    "next_sentence_loss": "Next sentence loss since the last line.",
    "next_sentence_accuracy": "Next sentence accuracy since the last line.",
    "grad_norm": "Norm of the newest gradient before clipping.",
    "learning_rate": "Learning rate of the newest step.",
    "num_skipped": "Updates skipped for a gradient that is not finite; goes back with the run.",
}
HELD_OUT = {
    "held_out_lm_example_loss": "Masked LM loss on the held-out set.",
    "held_out_masked_lm_accuracy": "Masked LM accuracy on the held-out set.",
    "held_out_next_sentence_loss": "Next sentence loss on the held-out set.",
    "held_out_next_sentence_accuracy": "Next sentence accuracy on the held-out set.",
}
RUN = {
    "step": "Global batches consumed.",
    "num_steps": "Global batches of the whole run.",
    "attempt": "Number of the newest attempt, over all drivers of the run.",
    "world_size": "Workers of the newest attempt.",
    "max_world_size": "Workers wanted at most.",
    "seconds_since_step": "Seconds since steps were last reported, or since the driver began.",
    "seconds_since_commit": "Seconds since a checkpoint was last complete, or since the driver began.",
}
GAUGES = {**RUN, **TRAIN, **RATES, **HELD_OUT}
COUNTERS = {
    "restarts": "Attempts that this driver began after its first.",
    "checkpoints": "Checkpoints that became complete.",
    "warnings": "Warnings shown.",
}
PAUSE_S = 60.0  # without a report for so long, and for three times the usual, a run does not train


class Gauges:
    """Holds what events say, as gauges of one run; `values` are those that hold now, by name."""

    def __init__(self, run: Directory, config: Config) -> None:
        """Args:
        run: the run directory; its name is the label "run".
        config: of the run.
        """
        # Ray's labels are ASCII. Nothing but the name: a URI may hold more than everybody should read.
        label = {"run": re.sub("[^ -~]", "_", run.path.rstrip("/").rpartition("/")[2])}
        self._gauges = {
            name: Gauge(PREFIX + name, text, ("run",)).set_default_tags(label) for name, text in GAUGES.items()
        }
        self._counters = {
            name: Counter(PREFIX + name, text, ("run",)).set_default_tags(label) for name, text in COUNTERS.items()
        }
        self._saves = config.checkpoint.every_steps != 0
        self.values: dict[str, float] = {
            "num_steps": config.training.num_steps,
            "max_world_size": config.cluster.worker_range()[1],
        }
        now_s = time.monotonic()
        self._stepped_at_s = self._committed_at_s = now_s
        self._reported_at_s, self._interval_s = now_s, 0.0  # of the attempt: its beginning, then its lines

    def show(self, event: Event) -> None:
        """Hold what an event says."""
        now_s = time.monotonic()
        if event.kind == "attempt":
            if "attempt" in self.values:
                self._counters["restarts"].inc()
            self._drop_rates()
            self.values |= {"step": event.step, "attempt": event.metrics["number"]}
            self.values["world_size"] = event.metrics["world_size"]
            self._reported_at_s = now_s
        elif event.kind == "train":
            self.values |= {"step": event.step}
            self.values |= {name: value for name, value in event.metrics.items() if name in TRAIN or name in RATES}
            self._interval_s, self._reported_at_s, self._stepped_at_s = now_s - self._reported_at_s, now_s, now_s
        elif event.kind == "eval":
            held_out = {f"held_out_{name}": value for name, value in event.metrics.items()}
            self.values |= {name: value for name, value in held_out.items() if name in HELD_OUT}
        elif event.kind == "checkpoint":
            self._counters["checkpoints"].inc()
            self._committed_at_s = now_s
        elif event.kind in ("warning", "failure"):
            self._counters["warnings"].inc()

    def refresh(self) -> None:
        """Set all that holds now; to be called more often than Ray reports."""
        now_s = time.monotonic()
        if now_s - self._reported_at_s > max(PAUSE_S, 3 * self._interval_s):
            self._drop_rates()
        self.values["seconds_since_step"] = now_s - self._stepped_at_s
        if self._saves:
            self.values["seconds_since_commit"] = now_s - self._committed_at_s
        for name, value in self.values.items():
            self._gauges[name].set(float(value))

    def _drop_rates(self) -> None:
        for name in RATES:
            self.values.pop(name, None)
