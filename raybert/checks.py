"""Which configurations make sense: single values, ranges and combinations. Pure; files are looked at elsewhere."""

from __future__ import annotations

import math
import re
from operator import attrgetter

from raybert.config import Config
from raybert.errors import UserError

SMALLEST = {
    "data.max_seq_length": 1,
    "data.max_predictions_per_seq": 1,
    "data.max_ngram_size": 1,
    "data.window_size": 1,
    "training.num_steps": 1,
    "training.global_batch_size": 1,
    "training.micro_batch_size": 1,
    "training.micro_batch_tokens": 0,
    "training.seed": 0,
    "training.log_every_steps": 1,
    "checkpoint.every_steps": 1,
    "checkpoint.snapshot_every_steps": 0,
    "checkpoint.keep": 0,
    "guard.max_non_finite": 1,
    "guard.spike_window": 2,
    "guard.max_rollbacks": 0,
    "evaluation.every_steps": 0,
    "evaluation.num_steps": 1,
    "cluster.cpus_per_worker": 1,
}
POSITIVE_SECONDS = (
    "checkpoint.outage_limit_s",
    "cluster.resize_check_s",
    "cluster.start_timeout_s",
    "cluster.collective_timeout_s",
    "cluster.hang_timeout_s",
)


def check_config(config: Config) -> None:
    """UserError at the first rule that is broken. The model and optimizer sections have checks of their own.

    While bert_config_file still stands in for the model section, the position table is not compared: check again after
    the file is read.
    """
    _check_paths(config)
    for name, smallest in SMALLEST.items():
        _check_smallest(name, attrgetter(name)(config), smallest)
    for name in POSITIVE_SECONDS:
        _check_seconds(name, attrgetter(name)(config))
    price = config.cluster.price_per_worker_hour
    if price is not None and not (0 <= price < math.inf):
        raise UserError(
            f"cluster.price_per_worker_hour must be 0 or more, got cluster.price_per_worker_hour={price}; as in 2.5."
        )
    if not (0 <= config.guard.spike_sigma < math.inf):
        raise UserError(
            f"guard.spike_sigma must be 0 or more, got guard.spike_sigma={config.guard.spike_sigma}; 6 is OLMo's, 0 "
            "looks for no spike."
        )
    if config.training.init_optimizer and config.training.init_checkpoint is None:
        raise UserError(
            "training.init_optimizer takes the moments of training.init_checkpoint, and that is not set; set it, or "
            "training.init_optimizer to false."
        )
    _check_lengths(config)
    _check_float8(config)
    _check_masking(config)
    _check_workers(config)
    _check_logging(config)


def _check_paths(config: Config) -> None:
    if not config.run_dir.strip():
        raise UserError("run_dir must not be empty; name the directory that keeps the run, such as runs/first.")
    if not config.data.input_files.strip(", "):
        raise UserError(
            "data.input_files must not be empty; name TFRecord files, as in --data.input_files 'data/*.tfrecord'; "
            "or try the bundled sample: --config sample."
        )


def _check_smallest(name: str, value: int | str | None, smallest: int) -> None:
    if isinstance(value, int) and value < smallest:
        raise UserError(f"{name} must be at least {smallest}, got {name}={value}; raise it.")


def _check_seconds(name: str, value: float) -> None:
    if not (0 < value < math.inf):
        raise UserError(f"{name} must be a positive number of seconds, got {name}={value}; such as 60.")


def _check_lengths(config: Config) -> None:
    data = config.data
    if data.max_predictions_per_seq > data.max_seq_length:
        raise UserError(
            f"data.max_predictions_per_seq must not exceed data.max_seq_length, got "
            f"max_predictions_per_seq={data.max_predictions_per_seq} and max_seq_length={data.max_seq_length}; "
            f"set both to what the files were made with."
        )
    positions = config.model.max_position_embeddings
    if config.bert_config_file is None and data.max_seq_length > positions:
        raise UserError(
            f"data.max_seq_length must not exceed model.max_position_embeddings, got max_seq_length="
            f"{data.max_seq_length} and max_position_embeddings={positions}; "
            f"raise model.max_position_embeddings or use shorter samples."
        )


def _check_float8(config: Config) -> None:
    if not config.training.float8:
        return
    if config.training.precision != "bf16":
        raise UserError(
            f"training.float8 is for what is bf16 otherwise, got training.precision={config.training.precision}; "
            "set training.precision to bf16, or training.float8 to false."
        )
    for name in ("hidden_size", "intermediate_size"):
        size = getattr(config.model, name)
        if config.bert_config_file is None and size % 16:
            raise UserError(
                f"training.float8 needs multiples of 16, got model.{name}={size}; change it, or set training.float8 to "
                "false."
            )


def _check_masking(config: Config) -> None:
    data = config.data
    if data.masking == "dynamic" and data.vocab_file is None:
        raise UserError(
            "data.masking=dynamic needs data.vocab_file, which says what [MASK] is and which tokens are words; name "
            "the vocabulary of the files, or set data.masking to static."
        )
    if not 0 < data.masked_lm_prob < 1:
        raise UserError(
            f"data.masked_lm_prob must be above 0 and below 1, got data.masked_lm_prob={data.masked_lm_prob}; as 0.15."
        )
    if data.max_ngram_size > 1 and not data.do_whole_word_mask:
        raise UserError(
            f"data.max_ngram_size={data.max_ngram_size} masks runs of whole words, and data.do_whole_word_mask is "
            "false; set it to true, or data.max_ngram_size to 1."
        )


def _check_workers(config: Config) -> None:
    workers = config.cluster.num_workers
    if not re.fullmatch(r"\s*\d+\s*(,\s*\d+\s*)?", str(workers)):
        raise UserError(
            f"cluster.num_workers must be a number or 'min,max', got {workers!r}; as in 2, or '1,4' (elastic)."
        )
    low, high = config.cluster.worker_range()
    if low > high:
        raise UserError(
            f"cluster.num_workers must have min <= max, got min={low} and max={high}; write '{high},{low}'."
        )
    if low == 0 < high:
        raise UserError(
            f"cluster.num_workers may be 0 only alone (training in this process), got {workers!r}; write '1,{high}'."
        )
    if high == 0 < config.checkpoint.snapshot_every_steps:
        raise UserError(
            f"checkpoint.snapshot_every_steps needs workers whose loss it is for, got snapshot_every_steps="
            f"{config.checkpoint.snapshot_every_steps} and cluster.num_workers=0; set it to 0, or give workers."
        )
    if config.training.global_batch_size < high:
        raise UserError(
            f"training.global_batch_size must be at least the largest number of workers, got "
            f"global_batch_size={config.training.global_batch_size} and cluster.num_workers={workers}; "
            f"raise the batch size or lower the number of workers."
        )


def _check_logging(config: Config) -> None:
    logging = config.logging
    for name in ("wandb_project", "mlflow_experiment", "mlflow_tracking_uri", "run_name"):
        value = getattr(logging, name)
        if value is not None and not value.strip():
            raise UserError(f"logging.{name} must not be empty; give a name, or null for none.")
    uri = logging.mlflow_tracking_uri
    if uri is not None and logging.mlflow_experiment is None:
        raise UserError(
            "logging.mlflow_tracking_uri says where MLflow is, but not what to log to; set logging.mlflow_experiment, "
            "too, such as to bert."
        )
    if uri is not None and "@" in uri.partition("://")[2].partition("/")[0]:
        raise UserError(
            "logging.mlflow_tracking_uri must not hold credentials, since settings are kept with the run; set "
            "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or the whole address in MLFLOW_TRACKING_URI."
        )
