"""Before a run: what a user can get wrong is checked here, in the driver, before a single worker starts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from raybert import wordpiece
from raybert.checkpoint import read_moments
from raybert.checks import check_config
from raybert.config import Config, DataConfig
from raybert.errors import UserError
from raybert.example import Schema
from raybert.feed import MIN_BLOCK_ROWS
from raybert.index import Index
from raybert.manifest import Checkpoint, newest_checkpoint
from raybert.masking import Remasking, make_masking
from raybert.model import BertForPreTraining, check_model_config
from raybert.optim import check_optimizer_config
from raybert.order import SampleOrder, steps_per_window
from raybert.pretrained import check_vocabulary, load_pretrained, read_bert_config, read_vocabulary
from raybert.retry import outlast_blip
from raybert.storage import Directory, absolute, local_file
from raybert.weights import find_weights

UNNOTICED_WORKERS = 8  # what blocks of any size feed
JOB_FILES = "working_dir_files"  # where Ray unpacks the working directories of jobs


def resolve(config: Config) -> Config:
    """The configuration with the files that it names read and checked, and every path absolute.

    Raises:
        UserError: a value, a combination of values or a file is wrong.
    """
    check_config(config)
    if config.bert_config_file is not None:
        with _option("bert_config_file", config.bert_config_file), local_file(config.bert_config_file) as path:
            config = replace(config, model=read_bert_config(path), bert_config_file=None)
        check_config(config)
    check_model_config(config.model)
    check_optimizer_config(config.optimizer, config.training.num_steps)
    data, training = config.data, config.training
    if data.vocab_file is not None:
        read_tokens(data.vocab_file, config)
        data = replace(data, vocab_file=absolute(data.vocab_file))
    if training.init_checkpoint is not None:
        with _option("training.init_checkpoint", training.init_checkpoint):
            training = replace(training, init_checkpoint=find_weights(training.init_checkpoint))
    return replace(config, run_dir=absolute(config.run_dir), data=data, training=training)


def check_run_dir(run: Directory, warn: Callable[[str], None]) -> None:
    """Refuse a run directory that cannot be reached or not be written; warn of one that will not last.

    Raises:
        UserError: naming it and the reason.
    """
    with _option("run_dir", run.uri):
        if not run.is_local:
            run.names()  # a store that does not answer says so sooner than to a write
    run.check_writable("run_dir")
    if run.is_local and JOB_FILES in run.path.split("/"):
        warn(
            f"run_dir {run.uri} lies in the job's own copy of its working directory, which Ray deletes some time after "
            "the job; to keep the run, give an absolute path that every node sees, s3:// or gs://."
        )


def read_tokens(vocab_file: str, config: Config) -> list[str]:
    """The vocabulary's tokens by id.

    Raises:
        UserError: it is absent, unreadable or not the model's.
    """
    with _option("data.vocab_file", vocab_file), local_file(vocab_file) as path:
        check_vocabulary(path, config.model)
        return read_vocabulary(path)


@contextmanager
def _option(name: str, value: str) -> Iterator[None]:
    """Errors of what the setting's value names begin with the setting."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{name}: {error}") from error
    except OSError as error:
        raise UserError(
            f"{name}: cannot read {value!r}: {error}; check the path, the network and the credentials."
        ) from error


def check_initial_weights(config: Config) -> str:
    """Load init_checkpoint once and say what of it fits.

    Raises:
        UserError: it does not fit the model.
    """
    training = config.training
    source = training.init_checkpoint
    assert source is not None
    model = BertForPreTraining(config.model, training.use_next_sentence_label)
    with _option("training.init_checkpoint", source), Directory(source).local() as path:
        report = str(load_pretrained(model, path))
        if not training.init_optimizer:
            return report
        num_moments = len(read_moments(path, model))
        return f"{report}; and {num_moments} tensors of the optimizer"


def schema(config: Config) -> Schema:
    """What each sample must look like."""
    data, model = config.data, config.model
    return Schema(data.max_seq_length, data.max_predictions_per_seq, model.vocab_size, model.type_vocab_size)


def sample_order(config: Config, index: Index) -> SampleOrder:
    """The sample order of the run."""
    size = config.training.global_batch_size
    return SampleOrder(index.page_sizes, config.training.seed, size, steps_per_window(config.data.window_size, size))


def check_tokens(config: Config, index: Index) -> None:
    """Refuse samples that were made with another vocabulary: every sample begins with [CLS].

    Raises:
        UserError: naming the ids that differ.
    """
    if config.data.vocab_file is None:
        return
    expected = read_tokens(config.data.vocab_file, config).index("[CLS]")
    first = index.read(np.arange(min(64, index.num_samples)))["input_ids"][:, 0]
    if (first != expected).any():
        found = int(first[first != expected][0])
        raise UserError(
            f"data.vocab_file: [CLS] is token {expected} in {config.data.vocab_file}, but samples of "
            f"{index.shards[0].file.path} begin with token {found}; give the vocabulary that the files were made with."
        )


def check_window(config: Config, warn: Callable[[str], None]) -> None:
    """Warn of a window that gives many workers blocks too small for the feed to hand out at their speed."""
    high = config.cluster.worker_range()[1]
    wanted = MIN_BLOCK_ROWS * high
    if high > UNNOTICED_WORKERS and config.data.window_size < wanted:
        warn(
            f"data.window_size={config.data.window_size} gives each of {high} workers blocks of fewer than "
            f"{MIN_BLOCK_ROWS} samples, which fast ones may have to wait for; begin a new run with {wanted} or more."
        )


def identity(config: Config) -> dict[str, Any]:
    """What a run must keep, so that its checkpoints and its sample order stay the same run's."""
    training = config.training
    return {
        **{f"model.{name}": value for name, value in asdict(config.model).items()},
        "optimizer.type": config.optimizer.type,
        "training.seed": training.seed,
        "training.global_batch_size": training.global_batch_size,
        "training.use_next_sentence_label": training.use_next_sentence_label,
        "data.max_seq_length": config.data.max_seq_length,
        "data.max_predictions_per_seq": config.data.max_predictions_per_seq,
        "data.window_size": config.data.window_size,
        **_masking_identity(config.data),
    }


def _masking_identity(data: DataConfig) -> dict[str, Any]:
    """What decides which tokens are masked, beyond the files."""
    if data.masking == "static":
        return {"data.masking": data.masking}
    assert data.vocab_file is not None
    names = ("masking", "masked_lm_prob", "do_whole_word_mask", "max_ngram_size")
    settings = {f"data.{name}": getattr(data, name) for name in names}
    return {**settings, "vocabulary": wordpiece.read_vocabulary(data.vocab_file).digest}


def remasking(config: Config) -> Remasking | None:
    """Dynamic masking as the configuration has it; None where samples stay as they are.

    Raises:
        UserError: the vocabulary cannot be read.
    """
    data = config.data
    if data.masking == "static":
        return None
    assert data.vocab_file is not None
    vocabulary = wordpiece.read_vocabulary(data.vocab_file)
    masking = make_masking(
        vocabulary, data.masked_lm_prob, data.max_predictions_per_seq, data.do_whole_word_mask, data.max_ngram_size
    )
    return Remasking(config.training.seed, masking)


def existing_run(run: Directory, config: Config, warn: Callable[[str], None]) -> Checkpoint | None:
    """The checkpoint that the run in run_dir goes on from, if there is one.

    Raises:
        UserError: it belongs to another configuration.
    """
    checkpoint = outlast_blip(lambda: newest_checkpoint(run, warn))
    if checkpoint is not None:
        check_identity(checkpoint, identity(config))
    return checkpoint


def check_identity(checkpoint: Checkpoint, ours: Mapping[str, Any]) -> None:
    """Refuse to go on with a run under another identity.

    Raises:
        UserError: naming each setting that differs, with both values.
    """
    theirs = {"data.masking": "static", **checkpoint.state["identity"]}  # older runs do not say it
    differing = [
        f"  {name}: {theirs.get(name)!r} there, {value!r} now"
        for name, value in ours.items()
        if theirs.get(name) != value
    ]
    if differing:
        raise UserError(
            f"run_dir: the run to continue, {checkpoint.directory.uri}, has another configuration:\n"
            + "\n".join(differing)
            + "\nGive its values back, or begin another run with another run_dir."
        )
