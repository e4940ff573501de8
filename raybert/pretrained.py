"""Configurations and weights in the form of transformers: written so that it opens them, read as starting points."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from raybert.config import ModelConfig
from raybert.errors import UserError
from raybert.model import ACTIVATIONS, LAYER_NORM_EPS, BertForPreTraining, check_model_config

SPECIAL_TOKENS = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}
_OPTIONAL_KEYS = {"hidden_dropout_prob", "attention_probs_dropout_prob", "initializer_range"}
_WORD_EMBEDDINGS = "bert.embeddings.word_embeddings.weight"


def transformers_config(config: ModelConfig, architecture: str = "BertForPreTraining") -> dict[str, Any]:
    """The content of config.json with which transformers builds the same model."""
    return {
        "architectures": [architecture],
        "model_type": "bert",
        **asdict(config),
        "layer_norm_eps": LAYER_NORM_EPS,
        "pad_token_id": 0,
        "position_embedding_type": "absolute",
        "tie_word_embeddings": True,
        "dtype": "float32",
    }


def save_pretrained(
    directory: str | Path, state_dict: Mapping[str, Tensor], config: ModelConfig, vocab_file: str | Path | None = None
) -> None:
    """Writes into an existing directory what `from_pretrained` of transformers' BERT classes reads.

    That is config.json and model.safetensors and, with a vocabulary, vocab.txt and tokenizer_config.json. Not atomic:
    the caller writes aside and renames.

    Args:
        directory: an existing local directory.
        state_dict: of a `BertForPreTraining`, on any device; where it lacks a head, so does what is written.
        config: of the same model.
        vocab_file: one token a line; see `check_vocabulary`.
    """
    directory = Path(directory)
    _write_json(directory / "config.json", transformers_config(config, architecture_of(state_dict)))
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state_dict.items()}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    if vocab_file is not None:
        shutil.copyfile(vocab_file, directory / "vocab.txt")
        _write_json(directory / "tokenizer_config.json", _tokenizer_config(vocab_file, config))


def architecture_of(names: Iterable[str]) -> str:
    """The class of transformers that has these tensors and no other head."""
    heads = {name.split(".")[1] for name in names if name.startswith("cls.")}
    return {
        frozenset(("predictions", "seq_relationship")): "BertForPreTraining",
        frozenset(("predictions",)): "BertForMaskedLM",
        frozenset(("seq_relationship",)): "BertForNextSentencePrediction",
    }.get(frozenset(heads), "BertModel")


def _tokenizer_config(vocab_file: str | Path, config: ModelConfig) -> dict[str, Any]:
    return {
        "tokenizer_class": "BertTokenizer",
        "do_lower_case": is_uncased(read_vocabulary(vocab_file)),
        "model_max_length": config.max_position_embeddings,
        **SPECIAL_TOKENS,
    }


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def read_vocabulary(path: str | Path) -> list[str]:
    """The tokens of a WordPiece vocabulary in the order of their ids.

    Raises:
        UserError: the file is absent or not UTF-8.
    """
    return _read_text(Path(path)).removesuffix("\n").split("\n")


def is_uncased(tokens: list[str]) -> bool:
    """Whether text must be lower-cased for this vocabulary: no A-Z in any token but the bracketed ones."""
    return not any(re.search("[A-Z]", token) for token in tokens if not re.fullmatch(r"\[.+\]", token))


def check_vocabulary(vocab_file: str | Path, config: ModelConfig) -> None:
    """Refuses a vocabulary that does not belong to the model.

    Raises:
        UserError: more tokens than vocab_size, or a special token is absent (transformers would append it).
    """
    tokens = read_vocabulary(vocab_file)
    if len(tokens) > config.vocab_size:
        raise UserError(
            f"{vocab_file} must not have more tokens than vocab_size, got {len(tokens)} tokens and "
            f"vocab_size={config.vocab_size}; set vocab_size={len(tokens)} or give the vocabulary of the data."
        )
    if absent := set(SPECIAL_TOKENS.values()).difference(tokens):
        raise UserError(f"{vocab_file} must contain {', '.join(sorted(absent))}; give BERT's WordPiece vocabulary.")


def read_bert_config(path: str | Path) -> ModelConfig:
    """The model section from Google's bert_config.json or transformers' config.json.

    Every size and hidden_act must be there, since Google and transformers have different defaults for some;
    dropouts and initializer_range may be absent. `hidden_act` is read by transformers' names in both: "gelu" is
    the erf form. Keys that do not concern the model are ignored.

    Raises:
        UserError: no such file, no JSON object, a key absent or of the wrong type, or another architecture than BERT's.
    """
    path = Path(path)
    content = _read_json(path)
    _check_architecture(path, content)
    known = [field.name for field in fields(ModelConfig)]
    if absent := [name for name in known if name not in content and name not in _OPTIONAL_KEYS]:
        raise UserError(f"{path} must say {', '.join(absent)}; add what is absent.")
    config = ModelConfig(**{name: _typed(path, name, content[name]) for name in known if name in content})
    try:
        check_model_config(config)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return config


def _typed(path: Path, name: str, value: Any) -> Any:
    """The value, if it has the type of ModelConfig's default."""
    wanted = type(getattr(ModelConfig(), name))
    if type(value) is int and wanted is float:
        return float(value)
    if type(value) is not wanted:
        raise UserError(f"{name} in {path} must be of type {wanted.__name__}, got {value!r}; correct it.")
    return value


def _check_architecture(path: Path, content: dict[str, Any]) -> None:
    expected = {
        "model_type": "bert",
        "position_embedding_type": "absolute",
        "is_decoder": False,
        "add_cross_attention": False,
        "tie_word_embeddings": True,
        "layer_norm_eps": LAYER_NORM_EPS,
        "embedding_size": content.get("hidden_size"),
    }
    for key, value in expected.items():
        if content.get(key, value) != value:
            raise UserError(f"{key} in {path} must be {value!r}, as in BERT, got {content[key]!r}; use a BERT encoder.")


@dataclass(frozen=True)
class LoadReport:
    """What became of the tensors of a file; names are the model's. Its text is one line."""

    loaded: list[str]
    missing: list[str]
    """In the model but not in the file; they keep their values."""
    unexpected: list[str]
    """In the file but not in the model; not used."""

    def __str__(self) -> str:
        text = f"loaded {len(self.loaded)} of {len(self.loaded) + len(self.missing)} tensors"
        if self.missing:
            text += f"; newly initialised: {_listed(self.missing)}"
        if self.unexpected:
            text += f"; not used: {_listed(self.unexpected)}"
        return text


def _listed(names: list[str], most: int = 6) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def load_pretrained(model: BertForPreTraining, directory: str | Path) -> LoadReport:
    """Copies weights into the model: the encoder and, where the files have them, both heads.

    Reads a directory of transformers (BertModel, BertForMaskedLM, BertForPreTraining, ...; one safetensors file or
    several with an index) or a checkpoint of raybert. Names with LayerNorm.gamma and beta are understood, and weights
    of any float type. Runs no code from the files.

    Raises:
        UserError: no safetensors files, a damaged one, another shape, heads or activation than the model's, an output
            projection that is not the word embeddings, or nothing that fits.
    """
    directory = Path(directory)
    if (directory / "config.json").is_file():
        _check_same_function(directory / "config.json", model.config)
    weights, own = read_weights(directory), model.state_dict()
    loaded = [name for name in own if name in weights]
    if not loaded:
        raise UserError(
            f"{directory} has no tensor of a BERT encoder, only {_listed(sorted(weights))}; "
            "give a directory that transformers wrote for a BERT model."
        )
    for name in loaded:
        _check_same_shape(directory, name, weights[name], own[name])
    model.load_state_dict({name: weights[name] for name in loaded}, strict=False)
    missing = [name for name in own if name not in weights]
    return LoadReport(loaded, missing, sorted(weights.keys() - own.keys()))


def _check_same_function(path: Path, config: ModelConfig) -> None:
    """Compares what no tensor's shape shows."""
    theirs = read_bert_config(path)
    same_act = ACTIVATIONS[theirs.hidden_act] is ACTIVATIONS[config.hidden_act]
    same_heads = theirs.num_attention_heads == config.num_attention_heads
    for name, same in (("hidden_act", same_act), ("num_attention_heads", same_heads)):
        if not same:
            raise UserError(
                f"{name} must be that of the weights, got {getattr(config, name)} for the model and "
                f"{getattr(theirs, name)} in {path}; set {name} to {getattr(theirs, name)}."
            )


def _check_same_shape(directory: Path, name: str, theirs: Tensor, ours: Tensor) -> None:
    if theirs.shape != ours.shape:
        raise UserError(
            f"{name} must have the same shape in {directory} and in the model, got {tuple(theirs.shape)} and "
            f"{tuple(ours.shape)}; set the model's sizes to those of the weights (bert_config_file may name their "
            "config.json) or start without them."
        )


def read_weights(directory: Path) -> dict[str, Tensor]:
    """The tensors of a directory, under the names of BertForPreTraining's own files; see `load_pretrained`.

    Raises:
        UserError: no safetensors files, a damaged one, or an output projection that is not the word embeddings.
    """
    return _with_our_names(directory, _read_files(directory))


def _read_files(directory: Path) -> dict[str, Tensor]:
    single, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if single.is_file():
        return load_tensors(single)
    if index.is_file():
        files = sorted(set(_read_json(index).get("weight_map", {}).values()))
        return {name: tensor for file in files for name, tensor in load_tensors(directory / file).items()}
    if any(directory.glob("pytorch_model*.bin")):
        raise UserError(
            f"weights must be safetensors, got only a pickle (pytorch_model.bin), which can run code, in {directory}; "
            "convert a file that you trust by from_pretrained and save_pretrained of transformers."
        )
    raise UserError(f"{directory} must have model.safetensors, but has none; give a directory of transformers' form.")


def load_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    Raises:
        UserError: it is damaged, or cannot be read.
    """
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read ({error}); fetch it again.") from error


def _with_our_names(directory: Path, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Under the names of BertForPreTraining's own files, without what these leave out."""
    renamed = {_our_name(name): tensor for name, tensor in weights.items()}
    renamed.pop("bert.embeddings.position_ids", None)  # a buffer in files of transformers before 4.31
    decoder_bias = renamed.pop("cls.predictions.decoder.bias", None)
    if decoder_bias is not None:
        renamed.setdefault("cls.predictions.bias", decoder_bias)
    decoder = renamed.pop("cls.predictions.decoder.weight", None)
    words = renamed.get(_WORD_EMBEDDINGS)
    if decoder is not None and words is not None and not torch.equal(decoder, words):
        raise UserError(
            f"cls.predictions.decoder.weight must equal the word embeddings, but in {directory} it does not; "
            "remove the cls.predictions tensors from the file to start from its encoder alone."
        )
    return renamed


def _our_name(name: str) -> str:
    name = re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", name)
    name = re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", name)
    return f"bert.{name}" if name.startswith(("embeddings.", "encoder.", "pooler.")) else name


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(_read_text(path))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno}: not JSON ({error.msg}); correct it.") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} must be a JSON object, got {type(content).__name__}; correct it.")
    return content


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); correct the path.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} must be UTF-8 text, but byte {error.start} is not; convert it.") from error
