"""TensorFlow checkpoints of BERT, read under our names: weights, Adam's moments, and the step.

Read are those of google-research/bert (names such as bert/encoder/layer_0/attention/self/query/kernel; with adam_m,
adam_v and global_step where they are of a pretraining) and those of TensorFlow Model Garden's BERT, v2.1 to v2.3 and
what is built alike: ctl_step_N.ckpt-M with the optimizer, pretrained/bert_model*.ckpt-M of the encoder. The latter are
graphs of objects, in which the encoder and the heads are found by what they are made of: keys change with every
version, and there are no names where training was distributed (MirroredStrategy). TensorFlow is imported only to read.
"""

from __future__ import annotations

import os
import posixpath
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from raybert.errors import UserError
from raybert.scratch import scratch
from raybert.storage import Directory, absolute, open_input

INDEX_SUFFIX = ".index"
_PART = re.compile(r"\.(index|meta|data-\d{5}-of-\d{5})$")
_GRAPH = "_CHECKPOINTABLE_OBJECT_GRAPH"
_NEWEST = re.compile(r'^model_checkpoint_path: "(.+)"$', re.MULTILINE)
_MOMENTS = {"adam_m": "exp_avg", "adam_v": "exp_avg_sq"}
STEP = "global_step"
_STEP_KEY = re.compile(r"(global_step|optimizer/(.+/)?iter)/\.ATTRIBUTES/VARIABLE_VALUE")
_COUNTER_KEY = re.compile(r"(global_step|save_counter|optimizer/.+)/\.ATTRIBUTES/VARIABLE_VALUE")
GOOGLE, GARDEN = "google-research/bert", "TensorFlow Model Garden"
_EMBEDDINGS = {  # where they are in an encoder of Model Garden, and google-research/bert's names for the same
    "layer_with_weights-0/embeddings": "bert/embeddings/word_embeddings",
    "layer_with_weights-1/embeddings": "bert/embeddings/position_embeddings",
    "layer_with_weights-2/embeddings": "bert/embeddings/token_type_embeddings",
    "layer_with_weights-3": "bert/embeddings/LayerNorm",
}
_FIRST_LAYER = len(_EMBEDDINGS)
_LAYER = {  # likewise, in a layer of it
    "_attention_layer/_query_dense": "attention/self/query",
    "_attention_layer/_key_dense": "attention/self/key",
    "_attention_layer/_value_dense": "attention/self/value",
    "_attention_output_dense": "attention/output/dense",
    "_attention_layer_norm": "attention/output/LayerNorm",
    "_intermediate_dense": "intermediate/dense",
    "_output_dense": "output/dense",
    "_output_layer_norm": "output/LayerNorm",
}
_NETWORK_HEAD = {  # of v2.1 and v2.2, a network of layers, the first of which has no activation
    "layer_with_weights-0": "cls/predictions/transform/dense",
    "layer_with_weights-1": "cls/predictions/transform/LayerNorm",
    "layer_with_weights-2/bias": "cls/predictions/output_bias",
}
_LAYER_HEAD = {  # of v2.3, a layer
    "dense": "cls/predictions/transform/dense",
    "layer_norm": "cls/predictions/transform/LayerNorm",
    "bias": "cls/predictions/output_bias",
}
_NEXT_SENTENCE = {"layer_with_weights-0": "cls/seq_relationship"}
_OURS = tuple(  # the same in transformers' words
    (re.compile(pattern), ours)
    for pattern, ours in (
        (r"(word|position|token_type)_embeddings$", r"\1_embeddings.weight"),
        (r"/layer_(\d+)/", r"/layer.\1/"),
        (r"/(kernel|gamma|output_weights)$", r"/weight"),
        (r"/(beta|output_bias)$", r"/bias"),
        (r"/", r"."),
    )
)


@dataclass(frozen=True)
class TensorFlowCheckpoint:
    """What a checkpoint holds, under the names of BertForPreTraining's state dict.

    Args:
        origin: whose it is, for a person.
        weights: fp32.
        moments: exp_avg.NAME and exp_avg_sq.NAME; empty if there are none.
        step: updates that were made; None if it does not say.
        num_heads: of attention; None where the shapes do not say.
        has_linear_transform: the masked LM head's transform has no activation, as in Model Garden before v2.3.
        unused: names of its variables that are none of BERT's.
    """

    origin: str
    weights: Mapping[str, Tensor]
    moments: Mapping[str, Tensor]
    step: int | None
    num_heads: int | None
    has_linear_transform: bool
    unused: tuple[str, ...]


def find_prefix(source: str) -> str | None:
    """The prefix of the TensorFlow checkpoint that a path means; None if it means none.

    Args:
        source: a prefix (bert_model.ckpt), one of its files, or a directory: then the one that its `checkpoint` file
            names, or the only one in it.

    Raises:
        UserError: there are several, and nothing says which.
    """
    prefix = _PART.sub("", absolute(source).rstrip("/"))
    folder, _, name = prefix.rpartition("/")
    if Directory(folder).exists(name + INDEX_SUFFIX):
        return prefix
    directory = Directory(prefix)
    names = directory.names() if directory.exists("") else []
    found = [name.removesuffix(INDEX_SUFFIX) for name in names if name.endswith(INDEX_SUFFIX)]
    newest = _NEWEST.search(directory.read("checkpoint").decode(errors="replace")) if "checkpoint" in names else None
    if newest and posixpath.basename(newest[1]) in found:
        return f"{prefix}/{posixpath.basename(newest[1])}"
    if len(found) > 1:
        raise UserError(f"{source} holds {len(found)} TensorFlow checkpoints: {', '.join(found)}; name one of them.")
    return f"{prefix}/{found[0]}" if found else None


def read_checkpoint(prefix: str) -> TensorFlowCheckpoint:
    """All of a checkpoint that is BERT's.

    Raises:
        UserError: TensorFlow is not installed, or the checkpoint is damaged or of another model.
    """
    tensorflow = _import_tensorflow()
    with _fetched(prefix) as local:
        try:
            reader = tensorflow.train.load_checkpoint(local)
            found = _read_garden(reader) if reader.has_tensor(_GRAPH) else _read_google(reader)
        except (tensorflow.errors.OpError, ValueError, RuntimeError, LookupError) as error:
            raise UserError(f"{prefix} cannot be read ({_first_line(error)}); fetch it again.") from error
    if not found.weights:
        raise UserError(
            f"{prefix} holds no variable of a BERT encoder, only {', '.join(found.unused[:5]) or 'nothing'}; give a "
            "checkpoint of google-research/bert or of Model Garden's BERT."
        )
    return found


def _import_tensorflow() -> Any:
    for name, value in (("TF_CPP_MIN_LOG_LEVEL", "3"), ("TF_ENABLE_ONEDNN_OPTS", "0")):
        os.environ.setdefault(name, value)  # or it greets with the instructions of this CPU
    try:
        import tensorflow
    except ImportError as error:
        raise UserError(
            f"A TensorFlow checkpoint is read by TensorFlow, which cannot be imported ({error}); install it: "
            "pip install 'raybert[tensorflow]'."
        ) from error
    return tensorflow


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


@contextmanager
def _fetched(prefix: str) -> Iterator[str]:
    """A local prefix; the files of a remote one are downloaded for the time of the context."""
    folder, _, name = prefix.rpartition("/")
    if Directory(folder).is_local:
        yield prefix
        return
    with scratch() as path:
        for file in Directory(folder).names():
            if _PART.sub("", file) == name:
                with open_input(f"{folder}/{file}") as source, (path / file).open("wb") as target:
                    shutil.copyfileobj(source, target)
        yield str(path / name)


def _read_google(reader: Any) -> TensorFlowCheckpoint:
    return _read(reader, GOOGLE, {name: name for name in reader.get_variable_to_shape_map()})


def _read_garden(reader: Any) -> TensorFlowCheckpoint:
    """Of a graph of objects, Model Garden's."""
    from tensorflow.core.protobuf.trackable_object_graph_pb2 import TrackableObjectGraph

    graph = Objects(TrackableObjectGraph.FromString(reader.get_tensor(_GRAPH)).nodes)
    nodes, is_linear = _bert_nodes(graph)
    query = graph.keys.get(nodes.get("bert/encoder/layer_0/attention/self/query/bias", -1))
    num_heads = reader.get_variable_to_shape_map()[query][0] if query else None
    keys = {name: graph.keys[node] for name, node in nodes.items()}
    names = {node: name for name, node in nodes.items()}
    for variable, kind, slot in graph.slots:
        if variable in names:
            keys[f"{names[variable]}/adam_{kind}"] = graph.keys[slot]
    rest = sorted(set(graph.keys.values()) - set(keys.values()))
    if steps := list(filter(_STEP_KEY.fullmatch, rest)):
        keys[STEP] = steps[0]
    keys |= {key: key for key in rest if not _COUNTER_KEY.fullmatch(key)}
    return replace(_read(reader, GARDEN, keys), has_linear_transform=is_linear, num_heads=num_heads)


class Objects:
    """A graph of objects, numbered, of which some are variables."""

    def __init__(self, nodes: Any) -> None:
        self._children = [{child.local_name: child.node_id for child in node.children} for node in nodes]
        self.keys = {number: node.attributes[0].checkpoint_key for number, node in enumerate(nodes) if node.attributes}
        self.slots = [
            (slot.original_variable_node_id, slot.slot_name, slot.slot_variable_node_id)
            for node in nodes
            for slot in node.slot_variables
        ]

    def at(self, start: int, path: str) -> int | None:
        """The object that a path leads to; None if it leads nowhere."""
        number: int | None = start
        for name in path.split("/"):
            number = None if number is None else self._children[number].get(name)
        return number

    def only(self, *paths: str, without: str) -> int | None:
        """The object from which all of these paths lead somewhere, and one does not; None if there is none.

        Raises:
            ValueError: there are several.
        """
        found = [
            number
            for number in range(len(self._children))
            if all(self.at(number, path) is not None for path in paths) and self.at(number, without) is None
        ]
        if len(found) > 1:
            raise ValueError(f"{len(found)} of its objects have {', '.join(paths)}")
        return found[0] if found else None


def _bert_nodes(graph: Objects) -> tuple[dict[str, int], bool]:
    """BERT's variables by google-research/bert's names, and whether the masked LM head is one without an activation."""
    encoder = graph.only(f"layer_with_weights-{_FIRST_LAYER}/_attention_layer", without="_attention_layer")
    network_head = graph.only("layer_with_weights-1/gamma", "layer_with_weights-2/bias", without="layer_with_weights-3")
    layer_head = graph.only("dense/kernel", "layer_norm/gamma", "bias", without="layer_with_weights-0")
    is_pretrainer = (
        network_head is not None or layer_head is not None
    )  # or what looks like it classifies something else
    next_sentence = graph.only("layer_with_weights-0/kernel", without="layer_with_weights-1") if is_pretrainer else None
    found: dict[str, int] = {}
    for start, parts in (
        (encoder, _encoder_parts(graph, encoder)),
        (network_head, _NETWORK_HEAD),
        (layer_head, _LAYER_HEAD),
        (next_sentence, _NEXT_SENTENCE),
    ):
        if start is not None:
            found |= dict(_variables(graph, start, parts))
    return found, network_head is not None


def _encoder_parts(graph: Objects, encoder: int | None) -> dict[str, str]:
    """Where its parts are, and what google-research/bert calls them."""
    if encoder is None:
        return {}
    parts, number = dict(_EMBEDDINGS), 0
    while graph.at(encoder, f"layer_with_weights-{_FIRST_LAYER + number}/_attention_layer") is not None:
        at = f"layer_with_weights-{_FIRST_LAYER + number}"
        parts |= {f"{at}/{path}": f"bert/encoder/layer_{number}/{name}" for path, name in _LAYER.items()}
        number += 1
    return parts | {f"layer_with_weights-{_FIRST_LAYER + number}": "bert/pooler/dense"}


def _variables(graph: Objects, start: int, parts: Mapping[str, str]) -> Iterator[tuple[str, int]]:
    """Names and numbers of variables: those that the paths lead to, or that belong to the layers there."""
    for path, name in parts.items():
        here = graph.at(start, path)
        if here in graph.keys:
            yield name, here
        elif here is not None:
            for kind in ("kernel", "bias", "gamma", "beta"):
                variable = graph.at(here, kind)
                if variable in graph.keys:
                    yield f"{name}/{kind}", variable


def _read(reader: Any, origin: str, keys: Mapping[str, str]) -> TensorFlowCheckpoint:
    """What a checkpoint holds, by google-research/bert's names of the variables that its keys lead to."""
    weights, moments, unused = {}, {}, []
    for name in sorted(keys.keys() - {STEP}):
        stem, _, slot = name.rpartition("/")
        variable = stem if slot in _MOMENTS else name
        ours = _our_name(variable)
        if ours is None:
            unused.append(name)
        elif slot in _MOMENTS:
            moments[f"{_MOMENTS[slot]}.{ours}"] = _tensor(variable, reader.get_tensor(keys[name]))
        else:
            weights[ours] = _tensor(variable, reader.get_tensor(keys[name]))
    step = int(reader.get_tensor(keys[STEP])) if STEP in keys else None
    return TensorFlowCheckpoint(origin, weights, moments, step, None, False, tuple(unused))


def _our_name(name: str) -> str | None:
    """Ours for one of google-research/bert's; None for what is none of BERT's."""
    if not name.startswith(("bert/", "cls/")):
        return None
    for pattern, ours in _OURS:
        name = pattern.sub(ours, name)
    return name


def _tensor(name: str, values: npt.NDArray[Any]) -> Tensor:
    """A variable of this name of google-research/bert's as ours: kernels transposed, no axis for the heads."""
    if "/attention/self/" in name:  # [D, H, K] and [H, K] in Model Garden
        values = values.reshape(len(values), -1) if name.endswith("/kernel") else values.reshape(-1)
    elif name.endswith("/kernel"):  # [H, K, D] after attention
        values = values.reshape(-1, values.shape[-1])
    return torch.from_numpy(np.ascontiguousarray(values.T if name.endswith("/kernel") else values, np.float32))
