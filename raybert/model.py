"""BERT for pretraining: the encoder, masked LM and next sentence prediction (Devlin et al. 2019, sections 3 and 3.1).

Module names are those of transformers' BertForPreTraining, so that the state dict has the names of its files.

Shape letters: B samples, L sequence length, D hidden, H heads, K head size, F feed-forward, V vocabulary,
M masked tokens of the micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raybert.config import ModelConfig
from raybert.errors import UserError

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

    def forward(
        self, input_ids: Tensor, input_mask: Tensor, segment_ids: Tensor, masked_positions: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Logits of the masked tokens and of the sentence pairs.

        Args:
            input_ids: [B, L] int32 or int64.
            input_mask: [B, L], 1 at real tokens, 0 at padding. A sample may be all padding; its logits mean nothing
                but are finite.
            segment_ids: [B, L] int32 or int64.
            masked_positions: [M] int32 or int64, flat indices b * L + position of the tokens to predict. M may be 0:
                every trained parameter then still gets a gradient (of zeros), as DDP needs.

        Returns:
            mlm_logits [M, V] and nsp_logits [B, 2] (0: the second sentence follows the first); None instead of
            nsp_logits without next sentence prediction.
        """
        hidden_BLD = self.bert(input_ids, input_mask, segment_ids)
        # Gather first: the transform and the projection to V then cost M rows instead of B * L.
        hidden_MD = hidden_BLD.flatten(0, 1).index_select(0, masked_positions)
        mlm_logits_MV = self.cls.predictions(hidden_MD, self.bert.embeddings.word_embeddings.weight)
        if not self.use_next_sentence:
            return mlm_logits_MV, None
        return mlm_logits_MV, self.cls.seq_relationship(self.bert.pooler(hidden_BLD))


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
    """Token ids to hidden states [B, L, D]."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config)
        self.pooler = Pooler(config)

    def forward(self, input_ids: Tensor, input_mask: Tensor, segment_ids: Tensor) -> Tensor:
        embedded_BLD = self.embeddings(input_ids, segment_ids)
        hidden_BLD: Tensor = self.encoder(embedded_BLD, visible_keys(input_mask))
        return hidden_BLD


def visible_keys(input_mask: Tensor) -> Tensor:
    """The attention mask [B, 1, 1, L], true where a key may be seen.

    A sample that is all padding sees all its keys: a softmax over no key is NaN. Always a mask, since whether there is
    any padding cannot be known on the host without waiting for the device.
    """
    visible_BL = input_mask.bool()
    visible_BL = visible_BL | ~visible_BL.any(dim=1, keepdim=True)
    return visible_BL[:, None, None, :]


class Embeddings(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=LAYER_NORM_EPS)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, input_ids: Tensor, segment_ids: Tensor) -> Tensor:
        length, longest = input_ids.shape[1], self.position_embeddings.num_embeddings
        assert length <= longest, f"sequence length {length} is beyond max_position_embeddings {longest}"
        sum_BLD = self.word_embeddings(input_ids) + self.token_type_embeddings(segment_ids)
        sum_BLD = sum_BLD + self.position_embeddings.weight[:length]
        hidden_BLD: Tensor = self.dropout(self.LayerNorm(sum_BLD))
        return hidden_BLD


class Encoder(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.layer = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))

    def forward(self, hidden_BLD: Tensor, visible_B11L: Tensor) -> Tensor:
        for layer in self.layer:
            hidden_BLD = layer(hidden_BLD, visible_B11L)
        return hidden_BLD


class Layer(nn.Module):
    """Attention and feed-forward, each followed by dropout, residual sum and LayerNorm (post-LN)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.intermediate = Intermediate(config)
        self.output = ResidualOutput(config.intermediate_size, config)

    def forward(self, hidden_BLD: Tensor, visible_B11L: Tensor) -> Tensor:
        attended_BLD = self.attention(hidden_BLD, visible_B11L)
        output_BLD: Tensor = self.output(self.intermediate(attended_BLD), attended_BLD)
        return output_BLD


class Attention(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.self = SelfAttention(config)
        self.output = ResidualOutput(config.hidden_size, config)

    def forward(self, hidden_BLD: Tensor, visible_B11L: Tensor) -> Tensor:
        attended_BLD: Tensor = self.output(self.self(hidden_BLD, visible_B11L), hidden_BLD)
        return attended_BLD


class SelfAttention(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.dropout_prob = config.attention_probs_dropout_prob
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(config.hidden_size, config.hidden_size)
        self.value = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden_BLD: Tensor, visible_B11L: Tensor) -> Tensor:
        query_BHLK, key_BHLK, value_BHLK = (
            project(hidden_BLD).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for project in (self.query, self.key, self.value)
        )
        context_BHLK = F.scaled_dot_product_attention(
            query_BHLK,
            key_BHLK,
            value_BHLK,
            attn_mask=visible_B11L,
            dropout_p=self.dropout_prob if self.training else 0.0,
        )
        return context_BHLK.transpose(1, 2).flatten(2)


class Intermediate(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.intermediate_size)
        self.activation = ACTIVATIONS[config.hidden_act]

    def forward(self, hidden_BLD: Tensor) -> Tensor:
        return self.activation(self.dense(hidden_BLD))  # [B, L, F]


class ResidualOutput(nn.Module):
    """Back to the width D, dropout, and LayerNorm of the sum with the sub-layer's input."""

    def __init__(self, width: int, config: ModelConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(width, config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=LAYER_NORM_EPS)

    def forward(self, output: Tensor, residual_BLD: Tensor) -> Tensor:
        hidden_BLD: Tensor = self.LayerNorm(residual_BLD + self.dropout(self.dense(output)))
        return hidden_BLD


class Pooler(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden_BLD: Tensor) -> Tensor:
        return torch.tanh(self.dense(hidden_BLD[:, 0]))  # [CLS] stands first: [B, D]


class PreTrainingHeads(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.predictions = MaskedLmHead(config)
        self.seq_relationship = nn.Linear(config.hidden_size, 2)


class MaskedLmHead(nn.Module):
    """Logits over the vocabulary; the projection is the word embedding table itself, so only the bias is here."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.transform = Transform(config)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, hidden_MD: Tensor, word_embeddings_VD: Tensor) -> Tensor:
        return F.linear(self.transform(hidden_MD), word_embeddings_VD, self.bias)


class Transform(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.activation = ACTIVATIONS[config.hidden_act]
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=LAYER_NORM_EPS)

    def forward(self, hidden_MD: Tensor) -> Tensor:
        transformed_MD: Tensor = self.LayerNorm(self.activation(self.dense(hidden_MD)))
        return transformed_MD
