"""`convert`: a checkpoint of TensorFlow, of raybert or of transformers as a directory that the latter two open."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from safetensors.torch import save_file
from torch import Tensor

from raybert.config import ModelConfig
from raybert.errors import UserError
from raybert.manifest import FORMAT_VERSION, OPTIMIZER, STATE
from raybert.model import ACTIVATIONS, BertForPreTraining
from raybert.pretrained import (
    architecture_of,
    check_vocabulary,
    load_tensors,
    read_bert_config,
    read_weights,
    save_pretrained,
)
from raybert.scratch import scratch
from raybert.storage import Directory, absolute, local_file
from raybert.tensorflow_checkpoint import GOOGLE, TensorFlowCheckpoint, find_prefix, read_checkpoint
from raybert.weights import CONFIG_JSON, VOCABULARY, find_weights, read_state

RAYBERT, TRANSFORMERS = "raybert", "transformers"
BERT_CONFIG = "bert_config.json"
LINEAR = ("shift", "keep", "drop")
IDENTITY_FROM = 8.0  # where gelu(x) is x in fp32
_DENSE = "cls.predictions.transform.dense"
_SIZES = {  # the setting that says how many rows a table has
    "bert.embeddings.word_embeddings.weight": "vocab_size",
    "bert.embeddings.position_embeddings.weight": "max_position_embeddings",
    "bert.embeddings.token_type_embeddings.weight": "type_vocab_size",
    "cls.predictions.bias": "vocab_size",
}


@dataclass(frozen=True)
class Content:
    """What is converted.

    Args:
        source: what it is and where, for a person.
        config: of the model.
        weights: under the names of BertForPreTraining's state dict.
        moments: content of optimizer.safetensors; empty if there is none.
        step: updates that were made; None if that is not known.
        vocab_file: local path; None if there is none.
        notes: what a person must know.
    """

    source: str
    config: ModelConfig
    weights: Mapping[str, Tensor]
    moments: Mapping[str, Tensor]
    step: int | None
    vocab_file: Path | None
    notes: tuple[str, ...]


def main(argv: list[str]) -> int:
    """Convert a checkpoint, and say what became of it.

    Raises:
        UserError: the source cannot be read or is no BERT's, or the destination cannot be written.
    """
    options = _parser().parse_args(argv)
    target = Directory(absolute(options.destination))
    try:
        if target.names():
            raise UserError(f"DESTINATION {options.destination} is not empty; name a new directory.")
        with _opened(options) as content:
            checked = check_content(content)
            to = options.to or (TRANSFORMERS if checked.source.startswith(RAYBERT) else RAYBERT)
            _write(checked, target, to)
    except OSError as error:
        raise UserError(f"Cannot convert to {options.destination}: {error}; mend the storage or make room.") from error
    Console(highlight=False, soft_wrap=True).print("\n".join(_lines(checked, options.destination, to)), markup=False)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python run.py convert",
        description="Convert a BERT checkpoint, both heads and all: TensorFlow's (google-research/bert, and Model "
        "Garden v2.1 to v2.3) to raybert and transformers, raybert's to transformers and back. What is written opens "
        "in both: by from_pretrained, and by --training.init_checkpoint, evaluate and fill.",
        epilog="TensorFlow is needed for its own checkpoints only: pip install 'raybert[tensorflow]'.",
    )
    add = parser.add_argument
    add(
        "source", metavar="SOURCE",
        help="a TensorFlow checkpoint (bert_model.ckpt, or the directory it is in), a directory of transformers, a "
        "raybert checkpoint or run; local, s3:// or gs://",
    )  # fmt: skip
    add("destination", metavar="DESTINATION", help="a new directory; local, s3:// or gs://")
    add(
        "--to", choices=(RAYBERT, TRANSFORMERS),
        help="raybert keeps the optimizer's moments and the step, transformers has the weights alone; default: "
        "transformers from raybert, raybert from others",
    )  # fmt: skip
    add("--vocab", metavar="FILE", help="the vocabulary; default: vocab.txt beside the checkpoint")
    add("--bert_config_file", metavar="FILE", help=f"of TensorFlow's; default: {BERT_CONFIG} beside it, or one above")
    add(
        "--hidden_act", metavar="NAME",
        help="of TensorFlow's, by transformers' names; default: gelu_new for gelu, whose tanh form both repositories "
        "compute. google-research/bert computed erf until February 2019: gelu",
    )  # fmt: skip
    add(
        "--linear_transform", choices=LINEAR, default=LINEAR[0],
        help="Model Garden v2.1 and v2.2 have no activation in the masked LM head's transform. shift: the same logits "
        "in fp32, by a shift of its bias that LayerNorm takes back; keep: its weights, to be trained on under "
        "hidden_act, with other logits until then; drop: leave that head out; default: shift",
    )  # fmt: skip
    return parser


@contextmanager
def _opened(options: argparse.Namespace) -> Iterator[Content]:
    """What the source holds."""
    folder = Directory(absolute(options.source))
    is_ours = folder.exists(CONFIG_JSON) and not folder.exists("checkpoint")
    prefix = None if is_ours else find_prefix(options.source)
    if prefix is not None:
        with _tensorflow_content(prefix, options) as content:
            yield content
        return
    for name in ("bert_config_file", "hidden_act"):
        if getattr(options, name) is not None:
            raise UserError(
                f"--{name} is for TensorFlow's checkpoints; {options.source} has a config.json: leave it out."
            )
    uri = find_weights(options.source)
    with Directory(uri).local() as path, _vocabulary(options.vocab, [uri]) as vocab_file:
        state = read_state(path)
        weights, moments = read_weights(path), load_tensors(path / OPTIMIZER) if (path / OPTIMIZER).is_file() else {}
        source = f"{RAYBERT if state else TRANSFORMERS}, {uri}"
        config, step = read_bert_config(path / CONFIG_JSON), state.get("step")
        yield Content(source, config, weights, moments, step, vocab_file, ())


@contextmanager
def _tensorflow_content(prefix: str, options: argparse.Namespace) -> Iterator[Content]:
    folders = [prefix.rpartition("/")[0], prefix.rpartition("/")[0].rpartition("/")[0]]
    config_file = options.bert_config_file or _beside(folders, BERT_CONFIG)
    if config_file is None:
        raise UserError(f"There is no {BERT_CONFIG} beside {prefix}; name it by --bert_config_file.")
    with local_file(config_file) as path:
        config = read_bert_config(path)
    read = read_checkpoint(prefix)
    config, notes = _with_activation(config, options.hidden_act, config_file)
    if read.num_heads not in (None, config.num_attention_heads):
        raise UserError(
            f"{prefix} has {read.num_heads} attention heads and {config_file} says {config.num_attention_heads}; give "
            "the configuration of the checkpoint by --bert_config_file."
        )
    weights, more = _with_transform(read, config, options.linear_transform)
    if read.unused:
        more += (f"not used: {_listed(read.unused)}",)
    moments = {name: moment for name, moment in read.moments.items() if name.partition(".")[2] in weights}
    if moments and read.step is not None:
        counted = {name.partition(".")[2] for name in moments}
        moments |= {f"step.{name}": torch.tensor(float(read.step)) for name in counted}
    elif moments:
        more, moments = (*more, "left out: moments of the optimizer, since nothing says after how many updates"), {}
    with _vocabulary(options.vocab, folders) as vocab_file:
        yield Content(f"{read.origin}, {prefix}", config, weights, moments, read.step, vocab_file, (*notes, *more))


def _beside(folders: Sequence[str], name: str) -> str | None:
    return next((f"{folder}/{name}" for folder in folders if Directory(folder).exists(name)), None)


@contextmanager
def _vocabulary(given: str | None, folders: Sequence[str]) -> Iterator[Path | None]:
    """The vocabulary as a local file; None if there is none."""
    found = given or _beside(folders, VOCABULARY)
    if found is None:
        yield None
        return
    with local_file(found) as path:
        yield path


# --- Activations ------------------------------------------------------------------------------------------------------


def _with_activation(config: ModelConfig, given: str | None, config_file: str) -> tuple[ModelConfig, tuple[str, ...]]:
    """What TensorFlow's code computes where it says gelu is transformers' gelu_new."""
    if given is not None:
        if given not in ACTIVATIONS:
            raise UserError(f"--hidden_act must be one of {', '.join(ACTIVATIONS)}, got {given!r}; choose one.")
        return replace(config, hidden_act=given), ()
    if config.hidden_act != "gelu":
        return config, ()
    note = f"hidden_act is gelu_new, the tanh form, for gelu in {config_file} (--hidden_act gelu: the erf form)"
    return replace(config, hidden_act="gelu_new"), (note,)


def _with_transform(
    read: TensorFlowCheckpoint, config: ModelConfig, linear: str
) -> tuple[Mapping[str, Tensor], tuple[str, ...]]:
    """The weights with a masked LM head whose transform has an activation; what became of it."""
    if not read.has_linear_transform:
        return read.weights, ()
    what = "the masked LM head's transform has no activation there (Model Garden v2.1, v2.2)"
    if linear == "drop":
        rest = {name: tensor for name, tensor in read.weights.items() if not name.startswith("cls.predictions.")}
        return rest, (f"left out: the masked LM head, since {what}",)
    if linear == "keep":
        return read.weights, (f"{what}: with {config.hidden_act} its logits are others until it is trained on",)
    shift = _shift(read.weights, config)
    bias = read.weights[f"{_DENSE}.bias"]
    note = (
        f"{what}: its bias is shifted by {shift:g}, where {config.hidden_act} changes nothing, and LayerNorm takes "
        "that back: the same logits in fp32, though rough ones in bf16 (--linear_transform keep: to be trained on)"
    )
    return {**read.weights, f"{_DENSE}.bias": bias + shift}, (note,)


def _shift(weights: Mapping[str, Tensor], config: ModelConfig) -> float:
    """What to add to the outputs y of the transform's dense layer, so that act(y) is y for each input that can be.

    The layer's input is gamma * z + beta of the last LayerNorm, where z has the mean 0 and at most the length sqrt(D);
    so the smallest y is known (Cauchy-Schwarz). The same number added to all of y is taken back by the next LayerNorm.
    """
    if config.hidden_act not in ("gelu", "gelu_new", "relu"):
        raise UserError(
            f"--linear_transform shift needs an activation that is the identity for large numbers, got "
            f"{config.hidden_act}; choose keep or drop."
        )
    norm = f"bert.encoder.layer.{config.num_hidden_layers - 1}.output.LayerNorm"
    names = (f"{_DENSE}.weight", f"{_DENSE}.bias", f"{norm}.weight", f"{norm}.bias")
    if absent := [name for name in names if name not in weights]:
        raise UserError(f"The checkpoint lacks {', '.join(absent)}; choose --linear_transform drop.")
    weight_DD, bias_D, gamma_D, beta_D = (weights[name].double() for name in names)
    scaled_DD = weight_DD * gamma_D
    lengths_D = torch.linalg.vector_norm(scaled_DD - scaled_DD.mean(dim=1, keepdim=True), dim=1)
    smallest = (weight_DD @ beta_D + bias_D - math.sqrt(len(bias_D)) * lengths_D).min().item()
    return float(math.ceil(max(0.0, -smallest) + IDENTITY_FROM))


# --- What is there ----------------------------------------------------------------------------------------------------


def check_content(content: Content) -> Content:
    """The content as it is written: fp32, BERT's tensors only, with notes of what is left out.

    Raises:
        UserError: it is not the encoder that its configuration describes, a head is there in part, or the vocabulary
            is not the model's.
    """
    with torch.device("meta"):
        expected = BertForPreTraining(content.config).state_dict()
    weights = {name: tensor.float() for name, tensor in content.weights.items() if name in expected}
    for name, tensor in weights.items():
        _check_shape(content, name, tuple(tensor.shape), tuple(expected[name].shape))
    missing = [name for name in expected if name not in weights]
    unexpected = sorted(content.weights.keys() - expected.keys())
    optional = [part for part in _HEADS if all(name in missing for name in expected if name.startswith(part))]
    lost = [name for name in missing if not name.startswith(tuple(optional))]
    if lost or any(name.startswith("bert.") for name in unexpected):
        more = f"lacks {_listed(lost)}" if lost else f"has {_listed(unexpected)} beyond it"
        raise UserError(
            f"{content.source} is not the model of its configuration ({content.config.num_hidden_layers} layers): it "
            f"{more}; give the configuration of the checkpoint, or fetch it again."
        )
    notes = content.notes
    if optional:
        notes += (f"left out, since the source has none: {', '.join(_HEADS[part] for part in optional)}",)
    if unexpected:
        notes += (f"not used: {_listed(unexpected)}",)
    if content.vocab_file is None:
        notes += ("no vocabulary: give --vocab, or transformers and fill cannot read text",)
    else:
        check_vocabulary(content.vocab_file, content.config)
    return replace(content, weights=weights, notes=notes)


_HEADS = {
    "cls.predictions.": "the masked LM head",
    "cls.seq_relationship.": "the next sentence head",
    "bert.pooler.": "the pooler",
}


def _check_shape(content: Content, name: str, theirs: tuple[int, ...], ours: tuple[int, ...]) -> None:
    if theirs != ours:
        setting = _SIZES.get(name, "the sizes") if theirs[1:] == ours[1:] else "the sizes"
        value = f"; {setting} there is {theirs[0]}" if setting != "the sizes" else ""
        raise UserError(
            f"{name} is {theirs} in {content.source}, and {ours} by its configuration{value}; correct {setting} in the "
            "configuration, or give the checkpoint's own by --bert_config_file."
        )


def _listed(names: Sequence[str], most: int = 5) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


# --- What is written --------------------------------------------------------------------------------------------------


def _write(content: Content, target: Directory, to: str) -> None:
    """Write the directory: config.json last, without which nobody opens it."""
    with scratch() as path:
        save_pretrained(path, content.weights, content.config, content.vocab_file)
        if to == RAYBERT and content.moments:
            save_file(dict(content.moments), path / OPTIMIZER)
        if to == RAYBERT and content.step is not None:
            state = {"format_version": FORMAT_VERSION, "step": content.step, "converted_from": content.source}
            (path / STATE).write_text(json.dumps(state, indent=1))
        for file in sorted(path.iterdir(), key=lambda file: (file.name == CONFIG_JSON, file.name)):
            target.upload(file.name, file)


def _lines(content: Content, destination: str, to: str) -> Iterator[str]:
    config, at = content.config, "" if content.step is None else f", step {content.step:,}"
    yield f"{content.source}{at}"
    yield (
        f"  {architecture_of(content.weights)}: {config.num_hidden_layers} layers, hidden_size {config.hidden_size}, "
        f"vocab_size {config.vocab_size:,}, hidden_act {config.hidden_act}; {len(content.weights)} tensors"
    )
    if content.moments:
        kept = "kept, for --training.init_optimizer true" if to == RAYBERT else "left out (--to raybert keeps them)"
        yield f"  the optimizer's moments {kept}"
    yield from (f"  note: {note}" for note in content.notes)
    if content.source.startswith(GOOGLE) and content.moments and to == RAYBERT:
        yield "  note: its Adam does not correct the moments' bias as AdamW does, which matters in the first steps only"
    yield f"-> {destination} ({to})"
