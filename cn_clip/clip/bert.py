"""The Chinese BERT (RoBERTa) text tower, with the parameter names of the published checkpoints."""

# B batch, L tokens, D width

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cn_clip.clip.layers import LayerNorm, attend
from cn_clip.errors import ConfigError
from cn_clip.zoo import TextConfig

LAYER_NORM_EPS = 1e-12
# Added to the attention scores of padding. Finite, as in BERT: a row of nothing but padding stays a number.
MASKED_SCORE = -10000.0
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "relu": F.relu, "silu": F.silu, "swish": F.silu}


class BertEmbeddings(nn.Module):
    """Sum of word, position and token type (always 0) embeddings, normalised."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        width = config.text_hidden_size
        self.word_embeddings = nn.Embedding(config.vocab_size, width, padding_idx=0)
        self.position_embeddings = nn.Embedding(config.text_max_position_embeddings, width)
        self.token_type_embeddings = nn.Embedding(config.text_type_vocab_size, width)
        self.LayerNorm = LayerNorm(width, eps=LAYER_NORM_EPS)
        self.dropout = nn.Dropout(config.text_hidden_dropout_prob)

    def forward(self, token_ids_BL: Tensor) -> Tensor:
        length = token_ids_BL.shape[1]
        positions_LD = self.position_embeddings.weight[:length] + self.token_type_embeddings.weight[0]
        embedded: Tensor = self.dropout(self.LayerNorm(self.word_embeddings(token_ids_BL) + positions_LD))
        return embedded


class BertSelfAttention(nn.Module):
    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        width = config.text_hidden_size
        if width % config.text_num_attention_heads:
            heads = config.text_num_attention_heads
            raise ConfigError(f"text_hidden_size {width} is not a multiple of text_num_attention_heads {heads}")
        self.heads = config.text_num_attention_heads
        self.dropout_prob = config.text_attention_probs_dropout_prob
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)

    def forward(self, query_BQD: Tensor, x_BLD: Tensor, score_bias: Tensor) -> Tensor:
        dropout_p = self.dropout_prob if self.training else 0.0
        rows = self.query(query_BQD), self.key(x_BLD), self.value(x_BLD)
        return attend(*rows, self.heads, attn_mask=score_bias.to(rows[0].dtype), dropout_p=dropout_p)


class BertAddNorm(nn.Module):
    """Projection, dropout, residual sum and normalisation: the end of both halves of a layer."""

    def __init__(self, input_width: int, config: TextConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(input_width, config.text_hidden_size)
        self.LayerNorm = LayerNorm(config.text_hidden_size, eps=LAYER_NORM_EPS)
        self.dropout = nn.Dropout(config.text_hidden_dropout_prob)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        normed: Tensor = self.LayerNorm(self.dropout(self.dense(x)) + residual)
        return normed


class BertAttention(nn.Module):
    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.self = BertSelfAttention(config)
        self.output = BertAddNorm(config.text_hidden_size, config)


class BertIntermediate(nn.Module):
    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.text_hidden_size, config.text_intermediate_size)
        if config.text_hidden_act not in ACTIVATIONS:
            raise ConfigError(f"text_hidden_act: expected one of {sorted(ACTIVATIONS)}, got {config.text_hidden_act!r}")
        self.activation = ACTIVATIONS[config.text_hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        activated: Tensor = self.activation(self.dense(x))
        return activated


class BertLayer(nn.Module):
    """Post-norm transformer layer."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.attention = BertAttention(config)
        self.intermediate = BertIntermediate(config)
        self.output = BertAddNorm(config.text_intermediate_size, config)

    def forward(self, x_BLD: Tensor, score_bias: Tensor, first_only: bool = False) -> Tensor:
        query = x_BLD[:, :1] if first_only else x_BLD
        attended = self.attention.output(self.attention.self(query, x_BLD, score_bias), query)
        output: Tensor = self.output(self.intermediate(attended), attended)
        return output


class BertEncoder(nn.Module):
    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.grad_checkpointing = False
        self.layer = nn.ModuleList([BertLayer(config) for _ in range(config.text_num_hidden_layers)])

    def forward(self, x_BLD: Tensor, score_bias: Tensor, *, first_only: bool = False) -> Tensor:
        last = len(self.layer) - 1
        for number, layer in enumerate(self.layer):
            arguments = (x_BLD, score_bias, first_only and number == last)
            if self.grad_checkpointing and self.training:
                x_BLD = checkpoint(layer, *arguments, use_reentrant=False)
            else:
                x_BLD = layer(*arguments)
        return x_BLD


class BertModel(nn.Module):
    """Token ids to hidden states. No pooler: the class token's last state is the sentence."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = BertEmbeddings(config)
        self.encoder = BertEncoder(config)
        self.apply(self._initialise)

    def _initialise(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=self.config.text_initializer_range)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.encoder.grad_checkpointing = enable

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> tuple[Tensor]:
        """Last hidden states in a tuple of one, (B, L, D).

        input_ids: int64 (B, L). attention_mask: (B, L), 1 for tokens and 0 for padding; default all tokens.
        """
        return (self.hidden_states(input_ids, attention_mask),)

    def hidden_states(
        self, token_ids_BL: Tensor, attention_mask: Tensor | None = None, *, first_only: bool = False
    ) -> Tensor:
        """Last hidden states (B, L, D); with `first_only` the class token's alone, (B, 1, D), computed alone.

        Raises ConfigError for rows longer than the position table.
        """
        longest = self.config.text_max_position_embeddings
        if token_ids_BL.shape[1] > longest:
            raise ConfigError(f"texts of {token_ids_BL.shape[1]} tokens; this model takes at most {longest}")
        if attention_mask is None:
            attention_mask = torch.ones_like(token_ids_BL)
        embedded = self.embeddings(token_ids_BL)
        score_bias = (1.0 - attention_mask.to(embedded.dtype))[:, None, None, :] * MASKED_SCORE
        hidden: Tensor = self.encoder(embedded, score_bias, first_only=first_only)
        return hidden
