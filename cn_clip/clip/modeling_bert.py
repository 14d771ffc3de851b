"""The import path and names of Chinese-CLIP's BERT, over `cn_clip.clip.bert`; the heads no model here has live here."""

# B batch, L tokens, D width, V vocabulary

import logging

import torch
from torch import Tensor, nn

from cn_clip.clip.bert import (
    ACT2FN,
    BertAttention,
    BertEmbeddings,
    BertEncoder,
    BertIntermediate,
    BertLayer,
    BertModel,
    BertOutput,
    BertPreTrainedModel,
    BertSelfAttention,
    BertSelfOutput,
    activation,
    gelu_new,
)
from cn_clip.clip.configuration_bert import BertConfig
from cn_clip.clip.layers import LayerNorm as BertLayerNorm

__all__ = [
    "ACT2FN",
    "BertAttention",
    "BertConfig",
    "BertEmbeddings",
    "BertEncoder",
    "BertIntermediate",
    "BertLMPredictionHead",
    "BertLayer",
    "BertLayerNorm",
    "BertModel",
    "BertOnlyMLMHead",
    "BertOnlyNSPHead",
    "BertOutput",
    "BertPooler",
    "BertPreTrainedModel",
    "BertPreTrainingHeads",
    "BertPredictionHeadTransform",
    "BertSelfAttention",
    "BertSelfOutput",
    "BertSelfOutputForFlashAttention",
    "gelu",
    "gelu_new",
    "swish",
]

logger = logging.getLogger(__name__)


def gelu(x: Tensor) -> Tensor:
    """`ACT2FN["gelu"]`, by its name."""
    return ACT2FN["gelu"](x)


def swish(x: Tensor) -> Tensor:
    """`ACT2FN["swish"]`, by its name."""
    return ACT2FN["swish"](x)


class BertPooler(nn.Module):
    """The first token's state (B, D), projected, through tanh. Chinese-CLIP publishes no weights of it."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.activation = nn.Tanh()

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(B, L, H) to (B, H), from the first token."""
        pooled: Tensor = self.activation(self.dense(hidden_states[:, 0]))
        return pooled


class BertPredictionHeadTransform(nn.Module):
    """Dense, activation and LayerNorm before the scores of the vocabulary."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.transform_act_fn = activation(config.hidden_act)
        self.LayerNorm = BertLayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(B, L, H) to the same shape."""
        transformed: Tensor = self.LayerNorm(self.transform_act_fn(self.dense(hidden_states)))
        return transformed


class BertLMPredictionHead(nn.Module):
    """Scores (B, L, V) of the words at each position."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.transform = BertPredictionHeadTransform(config)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(B, L, H) to scores (B, L, vocabulary)."""
        scores: Tensor = self.decoder(self.transform(hidden_states)) + self.bias
        return scores


class BertOnlyMLMHead(nn.Module):
    """Scores of the vocabulary at each position."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.predictions = BertLMPredictionHead(config)

    def forward(self, sequence_output: Tensor) -> Tensor:
        """(B, L, H) to scores (B, L, vocabulary)."""
        scores: Tensor = self.predictions(sequence_output)
        return scores


class BertOnlyNSPHead(nn.Module):
    """Scores (B, 2) of whether one sentence follows the other."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.seq_relationship = nn.Linear(config.hidden_size, 2)

    def forward(self, pooled_output: Tensor) -> Tensor:
        """(B, H) to scores (B, 2)."""
        scores: Tensor = self.seq_relationship(pooled_output)
        return scores


class BertPreTrainingHeads(nn.Module):
    """(scores of words (B, L, V), scores of sentences (B, 2))."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.predictions = BertLMPredictionHead(config)
        self.seq_relationship = nn.Linear(config.hidden_size, 2)

    def forward(self, sequence_output: Tensor, pooled_output: Tensor) -> tuple[Tensor, Tensor]:
        """Scores (B, L, vocabulary) and (B, 2)."""
        return self.predictions(sequence_output), self.seq_relationship(pooled_output)


class BertSelfOutputForFlashAttention(nn.Module):
    """`BertSelfOutput` without its projection."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.LayerNorm = BertLayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        """LayerNorm(dropout(hidden_states) + input_tensor)."""
        normed: Tensor = self.LayerNorm(self.dropout(hidden_states) + input_tensor)
        return normed
