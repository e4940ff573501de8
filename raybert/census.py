"""The census of samples: how many there are, how long, how masked; of parts that add up."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from raybert.example import Arrays, Schema
from raybert.jit import Ints
from raybert.wordpiece import MASK, UNK, Vocabulary


@dataclass(frozen=True, eq=False)
class Census:
    """Counts of samples.

    Args:
        num_samples: N.
        num_random_next: samples of label 1.
        num_unknown: real tokens that are [UNK]; a masked one counts by its label.
        num_masked: masked places, by what stands in them: [MASK], the token itself, another one.
        lengths: [L + 1] samples by their number of real tokens.
        predictions: [P + 1] samples by their number of masked places.
    """

    num_samples: int
    num_random_next: int
    num_unknown: int
    num_masked: Ints
    lengths: Ints
    predictions: Ints

    def __add__(self, other: Census) -> Census:
        return Census(**{name: value + getattr(other, name) for name, value in vars(self).items()})

    @property
    def num_tokens(self) -> int:
        """Real tokens, [CLS] and [SEP] among them."""
        return int(self.lengths @ np.arange(len(self.lengths)))

    def summary(self) -> dict[str, Any]:
        """Counts and shares for a person and for JSON; shares of nothing are 0."""
        num_slots = self.num_samples * (len(self.lengths) - 1)
        as_mask, as_itself, as_other = self.num_masked.tolist()
        num_masked = as_mask + as_itself + as_other
        return {
            "samples": self.num_samples,
            "tokens": self.num_tokens,
            "tokens_per_sample": _share(self.num_tokens, self.num_samples),
            "padding": _share(num_slots - self.num_tokens, num_slots),
            "full_sequences": _share(int(self.lengths[-1]), self.num_samples),
            "masked_per_sample": _share(num_masked, self.num_samples),
            "masked": _share(num_masked, self.num_tokens),
            "masked_as_mask": _share(as_mask, num_masked),
            "masked_as_itself": _share(as_itself, num_masked),
            "masked_as_other": _share(as_other, num_masked),
            "random_next": _share(self.num_random_next, self.num_samples),
            "unknown": _share(self.num_unknown, self.num_tokens),
        }

    def to_json(self) -> dict[str, Any]:
        """Everything, as `from_json` reads it."""
        return {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in vars(self).items()}

    @staticmethod
    def from_json(values: dict[str, Any]) -> Census:
        arrays: dict[str, Any] = {name: np.array(value) for name, value in values.items() if isinstance(value, list)}
        return Census(**{**values, **arrays})


def empty_census(schema: Schema) -> Census:
    """Of no sample."""
    lengths, predictions = np.zeros(schema.max_seq_length + 1, int), np.zeros(schema.max_predictions_per_seq + 1, int)
    return Census(0, 0, 0, np.zeros(3, int), lengths, predictions)


def take_census(features: Arrays, schema: Schema, vocabulary: Vocabulary) -> Census:
    """Of google-research/bert's feature names to [N, ...] arrays."""
    mask_id, unknown_id = vocabulary.ids[MASK], vocabulary.ids[UNK]
    rows, places = np.nonzero(features["masked_lm_weights"])
    labels = features["masked_lm_ids"][rows, places]
    found = features["input_ids"][rows, features["masked_lm_positions"][rows, places]]
    as_mask, as_itself = int((found == mask_id).sum()), int(((found == labels) & (found != mask_id)).sum())
    lengths = features["input_mask"].sum(axis=1, dtype=np.int64)
    predictions = np.bincount(rows, minlength=len(lengths))
    num_unknown = int((features["input_ids"] == unknown_id).sum())
    num_unknown += int((labels == unknown_id).sum()) - int((found == unknown_id).sum())
    return Census(
        num_samples=len(lengths),
        num_random_next=int(features["next_sentence_labels"].sum(dtype=np.int64)),
        num_unknown=num_unknown,
        num_masked=np.array([as_mask, as_itself, len(found) - as_mask - as_itself]),
        lengths=np.bincount(lengths, minlength=schema.max_seq_length + 1),
        predictions=np.bincount(predictions, minlength=schema.max_predictions_per_seq + 1),
    )


def _share(part: float, whole: float) -> float:
    return round(part / whole, 6) if whole else 0.0
