"""Weights wherever they are: a directory of transformers' form, a raybert checkpoint, or the newest of a run."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raybert.errors import UserError
from raybert.manifest import STATE, newest_checkpoint
from raybert.model import BertForPreTraining
from raybert.pretrained import LoadReport, load_pretrained, read_bert_config
from raybert.storage import Directory, absolute

CONFIG_JSON, VOCABULARY = "config.json", "vocab.txt"


def find_weights(path: str) -> str:
    """A directory of weights; of a run directory, its newest intact checkpoint.

    Raises:
        UserError: it is neither.
    """
    directory = Directory(absolute(path))
    if directory.exists(CONFIG_JSON):
        return directory.uri
    checkpoint = newest_checkpoint(directory, lambda _: None)
    if checkpoint is None:
        raise UserError(
            f"{path!r} holds neither a config.json nor a run with a checkpoint; give a transformers directory, a "
            "raybert checkpoint or a run directory (a TensorFlow checkpoint becomes one by `run.py convert`)."
        )
    return checkpoint.directory.uri


@dataclass(frozen=True)
class Opened:
    """A model with its weights.

    Args:
        uri: where they are.
        model: on the CPU, for evaluation.
        report: what of it the files hold.
        state: content of a raybert checkpoint's state.json; empty for others.
    """

    uri: str
    model: BertForPreTraining
    report: LoadReport
    state: dict[str, Any]

    def lacks(self, part: str) -> bool:
        """Whether the files do not hold a part of the model, by the beginning of its name."""
        return any(name.startswith(part) for name in self.report.missing)

    @property
    def masked_lm_only(self) -> bool:
        """Whether next sentence prediction was not trained, or is not there."""
        was_trained = self.state.get("identity", {}).get("training.use_next_sentence_label", True)
        return not was_trained or self.lacks("bert.pooler.") or self.lacks("cls.seq_relationship.")


def open_model(path: str) -> Opened:
    """The model that a path names, with a masked LM head.

    Raises:
        UserError: it cannot be read, or is an encoder without that head.
    """
    uri = find_weights(path)
    with Directory(uri).local() as local:
        model = BertForPreTraining(read_bert_config(local / CONFIG_JSON))
        opened = Opened(uri, model.eval(), load_pretrained(model, local), read_state(local))
    if opened.lacks("cls.predictions."):
        raise UserError(
            f"{uri} has no masked LM head, only an encoder ({opened.report}); give a checkpoint of pretraining: "
            "BertForPreTraining's or BertForMaskedLM's."
        )
    if opened.lacks("bert.embeddings.") or opened.lacks("bert.encoder."):
        raise UserError(f"{uri} lacks parts of its encoder ({opened.report}); fetch it again.")
    return opened


def read_state(directory: Path) -> dict[str, Any]:
    """Content of a raybert checkpoint's state.json; nothing where there is none."""
    path = directory / STATE
    return dict(json.loads(path.read_text())) if path.is_file() else {}
