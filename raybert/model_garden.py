"""The flags of TensorFlow Model Garden's BERT run_pretraining.py, and the settings they become.

A flag that is not given has raybert's default, which may differ from Model Garden's, except where EPOCH_DEFAULTS says.
"""

from __future__ import annotations

from collections.abc import Mapping

from raybert.errors import UserError

FLAGS: Mapping[str, tuple[str, ...]] = {
    "input_files": ("data.input_files",),
    "bert_config_file": ("bert_config_file",),
    "model_dir": ("run_dir",),
    "max_seq_length": ("data.max_seq_length",),
    "max_predictions_per_seq": ("data.max_predictions_per_seq",),
    "train_batch_size": ("training.global_batch_size",),
    "num_steps_per_epoch": ("training.num_steps", "checkpoint.every_steps", "evaluation.every_steps"),
    "num_train_epochs": ("training.num_steps",),  # times num_steps_per_epoch
    "steps_per_loop": ("training.log_every_steps",),
    "learning_rate": ("optimizer.learning_rate",),
    "warmup_steps": ("optimizer.warmup_steps",),
    "end_lr": ("optimizer.end_lr",),
    "optimizer_type": ("optimizer.type",),
    "use_next_sentence_label": ("training.use_next_sentence_label",),
    "init_checkpoint": ("training.init_checkpoint",),
    "scale_loss": (),  # true is what raybert always does
    "dtype": ("training.precision",),
}
SWITCHES = ("use_next_sentence_label", "scale_loss")
SHORT_NAMES = {"md": "model_dir", "dt": "dtype", "ng": "num_gpus", "ds": "distribution_strategy", "ls": "loss_scale"}
EPOCH_DEFAULTS = {"num_steps_per_epoch": "1000", "num_train_epochs": "3"}

_WORKERS = "workers are Ray's: use --cluster.num_workers (a number, or 'min,max') and --cluster.use_gpu true"
_ALL_REDUCE = "gradients are always summed over the workers in buckets, by DistributedDataParallel; leave it out"
_EAGER = "there is one training loop, of PyTorch; leave it out"
_FP16 = "fp16 has one implementation here, with a dynamic loss scale: --training.precision fp16"
_EXPORT = "every checkpoint in run_dir opens in transformers; leave it out"
_THREADS = "threads are set by --cluster.cpus_per_worker"
_LOG = "progress is logged every --training.log_every_steps steps"
_GIN = "settings are a YAML file (--config FILE.yaml) and flags (--section.field VALUE)"
REFUSED: Mapping[str, str] = {
    "distribution_strategy": _WORKERS,
    "strategy_type": _WORKERS,
    "num_gpus": _WORKERS,
    "worker_hosts": _WORKERS,
    "task_index": _WORKERS,
    "tpu": "TPUs are not supported; " + _WORKERS,
    "explicit_allreduce": _ALL_REDUCE,
    "allreduce_bytes_per_pack": _ALL_REDUCE,
    "all_reduce_alg": _ALL_REDUCE,
    "num_packs": _ALL_REDUCE,
    "run_eagerly": _EAGER,
    "use_keras_compile_fit": _EAGER,
    "enable_xla": "XLA is TensorFlow's compiler; leave it out",
    "loss_scale": _FP16,
    "fp16_implementation": _FP16,
    "hub_module_url": "TF-Hub modules are not read; --training.init_checkpoint reads transformers'",
    "model_export_path": _EXPORT,
    "model_type": "only BERT is trained; leave it out",
    "train_summary_interval": _LOG,
    "log_steps": _LOG,
    "gin_file": _GIN,
    "gin_param": _GIN,
    "flagfile": _GIN,
    "tf_gpu_thread_mode": _THREADS,
    "per_gpu_thread_count": _THREADS,
    "datasets_num_private_threads": _THREADS,
    "num_eval_per_epoch": "use --evaluation.every_steps",
}
_SCALE_LOSS_NOTE = "--scale_loss is what raybert always does: gradients are divided by the counts of the global batch."
_TRUE, _FALSE = ("true", "t", "1"), ("false", "f", "0")


def flag_name(name: str) -> str | None:
    """The full name of a flag of Model Garden's, also of its short form or of 'no' before a switch; None if it is none.

    Raises UserError for one that has no meaning here.
    """
    name = SHORT_NAMES.get(name, name)
    for candidate in (name, name.removeprefix("no")):
        if candidate in REFUSED:
            raise UserError(f"command line: Model Garden's --{candidate} has no meaning here: {REFUSED[candidate]}.")
    if name.startswith("no") and name[2:] in SWITCHES:
        return name[2:]
    return name if name in FLAGS else None


def switch_text(name: str, text: str | None) -> str:
    """'true' or 'false' for --flag, --noflag and --flag=text, as absl reads them; other text is returned as it is."""
    negated = name.startswith("no")
    if text is None:
        return "false" if negated else "true"
    if negated:
        raise UserError(f"command line: --{name} takes no value, got {text!r}; write --{name[2:]}={text}.")
    return "true" if text.lower() in _TRUE else "false" if text.lower() in _FALSE else text


def translate(flags: Mapping[str, str]) -> tuple[dict[str, tuple[str, str]], list[str]]:
    """Our setting -> (flag it comes from, text), and notes for the user."""
    flags, notes = _without_scale_loss(flags)
    if "warmup_steps" in flags:
        flags["warmup_steps"] = str(_whole("warmup_steps", flags["warmup_steps"]))
    settings = {ours: (flag, text) for flag, text in flags.items() for ours in FLAGS[flag]}
    return settings | _epochs(flags), notes


def _without_scale_loss(flags: Mapping[str, str]) -> tuple[dict[str, str], list[str]]:
    rest = dict(flags)
    scale_loss = rest.pop("scale_loss", None)
    if scale_loss not in (None, "true"):
        raise UserError(
            f"command line: --scale_loss={scale_loss} is not supported: summed over workers, gradients would "
            f"depend on their number; leave it out (raybert divides by the counts of the global batch)."
        )
    return rest, [] if scale_loss is None else [_SCALE_LOSS_NOTE]


def _epochs(flags: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    """Their epoch is a number of steps: after each they save and evaluate."""
    given = [flag for flag in EPOCH_DEFAULTS if flag in flags]
    if not given:
        return {}
    steps, epochs = (_whole(flag, flags.get(flag, default)) for flag, default in EPOCH_DEFAULTS.items())
    origin = " and --".join(given)
    period = dict.fromkeys(("checkpoint.every_steps", "evaluation.every_steps"), (origin, str(steps)))
    return {"training.num_steps": (origin, str(steps * epochs)), **period}


def _whole(flag: str, text: str) -> int:
    """warmup_steps is a float flag there: 10000.0 is 10000."""
    try:
        number = float(text)
    except ValueError:
        number = 0.5
    if not number.is_integer():
        raise UserError(f"command line: --{flag} must be a whole number, got {text!r}.")
    return int(number)
