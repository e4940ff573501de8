"""BERT for pretraining: the encoder, masked LM and next sentence prediction (Devlin et al. 2019, sections 3 and 3.1).

Module names are those of transformers' BertForPreTraining, so that the state dict has the names of its files.

Shape letters: T real tokens of the micro-batch, S sequences, B of them samples, M masked tokens, W those and the first
of each sequence, D hidden, H heads, K head size, F feed-forward, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from raybert.attention import Sequences, attend
from raybert.batch import Tokens
from raybert.config import ModelConfig
from raybert.dropout import Dropout
from raybert.errors import UserError
from raybert.projection import Projection

LAYER_NORM_EPS = 1e-12


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_new": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "gelu_fast": _gelu_tanh,
    "gelu_accurate": _gelu_tanh,
    "quick_gelu": _quick_gelu,
    "relu": F.relu,
    "silu": F.silu,
    "swish": F.silu,
    "mish": F.mish,
    "tanh": torch.tanh,
}
"""By transformers' names. "gelu" is the erf form; later google-research and Model Garden mean the tanh form."""


def check_model_config(config: ModelConfig) -> None:
    """Refuses what cannot be built.

    Raises:
        UserError: a size below 1, heads that do not divide hidden_size, a dropout outside [0, 1), an initializer_range
            that is not positive, or an unknown hidden_act.
    """
    sizes = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    for name in (*sizes, "max_position_embeddings", "type_vocab_size"):
        if getattr(config, name) < 1:
            raise UserError(f"{name} must be at least 1, got {getattr(config, name)}; raise {name}.")
    if config.hidden_size % config.num_attention_heads:
        raise UserError(
            f"num_attention_heads must divide hidden_size, got num_attention_heads={config.num_attention_heads} and "
            f"hidden_size={config.hidden_size}; change one of them (BERT takes 64 per head)."
        )
    for name in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
        if not 0 <= getattr(config, name) < 1:
            raise UserError(f"{name} must be in [0, 1), got {getattr(config, name)}; 0.1 is BERT's, 0 turns it off.")
    if not 0 < config.initializer_range < float("inf"):
        raise UserError(f"initializer_range must be positive, got {config.initializer_range}; 0.02 is BERT's.")
    if config.hidden_act not in ACTIVATIONS:
        raise UserError(f"hidden_act must be one of {', '.join(ACTIVATIONS)}, got {config.hidden_act!r}; choose one.")


class BertForPreTraining(nn.Module):
    """The encoder with both pretraining heads.

    With use_next_sentence=False the pooler and the next sentence head stay in the state dict, so that a checkpoint is
    complete for transformers, but they are not trained: requires_grad is False, and forward returns None for them.

    Raises:
        UserError: see `check_model_config`.
    """

    def __init__(self, config: ModelConfig, use_next_sentence: bool = True) -> None:
        check_model_config(config)
        super().__init__()
        self.config = config
        self.use_next_sentence = use_next_sentence
        self.bert = Bert(config)
        self.cls = PreTrainingHeads(config)
        for module in (self.bert.pooler, self.cls.seq_relationship):
            module.requires_grad_(use_next_sentence)
        initialize_weights(self, config.initializer_range)

    def forward(self, tokens: Tokens, masked_places: Tensor) -> tuple[Projection, Tensor | None]:
        """The projection to the logits of the masked tokens, and the logits of the sentence pairs.

        Args:
            tokens: of B samples, in S sequences.
            masked_places: [M] int64, which of the T tokens are to be predicted. M may be 0: every trained parameter
                then still gets a gradient (of zeros), as DDP needs.

        Returns:
            the projection to [M, V], and nsp_logits [S, 2] (0: the second sentence follows the first), of which the
            first B are the samples'; None instead of nsp_logits without next sentence prediction.
        """
        # Only these are looked at: what comes after the last attention costs M + S rows instead of T.
        firsts = tokens.sequences.starts[:-1].long() if self.use_next_sentence else masked_places[:0]
        hidden_WD = self.bert(tokens, torch.cat([masked_places, firsts]))
        hidden_MD, first_SD = hidden_WD.split([len(masked_places), len(firsts)])  # [CLS] stands first
        projection = self.cls.predictions(hidden_MD, self.bert.embeddings.word_embeddings.weight)
        if not self.use_next_sentence:
            return projection, None
        return projection, self.cls.seq_relationship(self.bert.pooler(first_SD))


@torch.no_grad()
def initialize_weights(model: nn.Module, std: float) -> None:
    """Truncated normal, cut at two std, for every kernel and table; zero biases; LayerNorm 1 and 0.

    As TensorFlow's TruncatedNormal(stddev=std) in google-research/bert: what is drawn has a standard deviation of
    0.88 * std. Draws from torch's global generator, in the order of the parameters.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.trunc_normal_(module.weight, std=std, a=-2 * std, b=2 * std)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)


class Bert(nn.Module):
    """Tokens to hidden states [W, D] of the wanted ones."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config)
        self.pooler = Pooler(config)

    def forward(self, tokens: Tokens, wanted: Tensor) -> Tensor:
        longest, limit = tokens.sequences.longest, self.embeddings.position_embeddings.num_embeddings
        assert longest <= limit, f"sequence length {longest} is beyond max_position_embeddings {limit}"
        hidden_WD: Tensor = self.encoder(self.embeddings(tokens), tokens.sequences, wanted)
        return hidden_WD


class Embeddings(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=LAYER_NORM_EPS)
        self.dropout = Dropout(config.hidden_dropout_prob)

    def forward(self, tokens: Tokens) -> Tensor:
        # The table has a gradient from the projection to V, too: on a CPU adding the rows that occur to that is cheaper
        # than adding another table.
        words, is_sparse = self.word_embeddings.weight, tokens.input_ids.device.type == "cpu"
        sum_TD = F.embedding(tokens.input_ids, words, sparse=is_sparse) + self.token_type_embeddings(tokens.segment_ids)
        sum_TD = sum_TD + self.position_embeddings(tokens.positions)
        hidden_TD: Tensor = self.dropout(self.LayerNorm(sum_TD))
        return hidden_TD


class Encoder(nn.Module):
    """The layers; with `recomputes`, backward computes what is inside of one again instead of keeping it."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.layer = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.recomputes = False

    def forward(self, hidden_TD: Tensor, sequences: Sequences, wanted: Tensor) -> Tensor:
        last = len(self.layer) - 1
        for number, layer in enumerate(self.layer):
            arguments = hidden_TD, sequences, wanted if number == last else None
            if self.recomputes and self.training:  # Chen et al. 2016, "Training deep nets with sublinear memory cost"
                hidden_TD = checkpoint(layer, *arguments, use_reentrant=False)
            else:
                hidden_TD = layer(*arguments)
        return hidden_TD


class Layer(nn.Module):
    """Attention and feed-forward, each followed by dropout, residual sum and LayerNorm (post-LN).

    Where only some tokens are wanted, all are attended to, and the rest is done for those.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.intermediate = Intermediate(config)
        self.output = ResidualOutput(config.intermediate_size, config)

    def forward(self, hidden_TD: Tensor, sequences: Sequences, wanted: Tensor | None) -> Tensor:
        attended_TD = self.attention(hidden_TD, sequences, wanted)
        output_TD: Tensor = self.output(self.intermediate(attended_TD), attended_TD)
        return output_TD


class Attention(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.self = SelfAttention(config)
        self.output = ResidualOutput(config.hidden_size, config)

    def forward(self, hidden_TD: Tensor, sequences: Sequences, wanted: Tensor | None) -> Tensor:
        context_TD = self.self(hidden_TD, sequences)
        if wanted is not None:
            context_TD, hidden_TD = context_TD.index_select(0, wanted), hidden_TD.index_select(0, wanted)
        attended_TD: Tensor = self.output(context_TD, hidden_TD)
        return attended_TD


class SelfAttention(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.dropout_prob = config.attention_probs_dropout_prob
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(config.hidden_size, config.hidden_size)
        self.value = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden_TD: Tensor, sequences: Sequences) -> Tensor:
        hidden_TD = _lowered(hidden_TD)
        query_THK, key_THK, value_THK = (
            project(hidden_TD).unflatten(-1, (self.num_heads, -1)) for project in (self.query, self.key, self.value)
        )
        return attend(query_THK, key_THK, value_THK, sequences, self.dropout_prob if self.training else 0.0).flatten(1)


def _lowered(x: Tensor) -> Tensor:
    """x as autocast would have it, once for all who take it."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


class Intermediate(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.intermediate_size)
        self.activation = ACTIVATIONS[config.hidden_act]

    def forward(self, hidden_TD: Tensor) -> Tensor:
        return self.activation(self.dense(hidden_TD))  # [T, F]


class ResidualOutput(nn.Module):
    """Back to the width D, dropout, and LayerNorm of the sum with the sub-layer's input."""

    def __init__(self, width: int, config: ModelConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(width, config.hidden_size)
        self.dropout = Dropout(config.hidden_dropout_prob)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=LAYER_NORM_EPS)

    def forward(self, output: Tensor, residual_TD: Tensor) -> Tensor:
        hidden_TD: Tensor = self.LayerNorm(residual_TD + self.dropout(self.dense(output)))
        return hidden_TD


class Pooler(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, first_SD: Tensor) -> Tensor:
        return torch.tanh(self.dense(first_SD))


class PreTrainingHeads(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.predictions = MaskedLmHead(config)
        self.seq_relationship = nn.Linear(config.hidden_size, 2)


class MaskedLmHead(nn.Module):
    """To the vocabulary; what projects to it is the word embedding table itself, so only the bias is here."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.transform = Transform(config)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, hidden_MD: Tensor, word_embeddings_VD: Tensor) -> Projection:
        return Projection(self.transform(hidden_MD), word_embeddings_VD, self.bias)


class Transform(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.activation = ACTIVATIONS[config.hidden_act]
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=LAYER_NORM_EPS)

    def forward(self, hidden_MD: Tensor) -> Tensor:
        transformed_MD: Tensor = self.LayerNorm(self.activation(self.dense(hidden_MD)))
        return transformed_MD
