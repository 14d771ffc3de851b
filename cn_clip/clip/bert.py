"""The Chinese BERT (RoBERTa) text tower, with the parameter names of the published checkpoints.

Its parts take and return what Chinese-CLIP's do; `modeling_bert` is the import path its users know.
"""

# B batch, L tokens, D width, H heads

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cn_clip.clip.configuration_bert import BertConfig
from cn_clip.clip.layers import (
    LayerNorm,
    aligned,
    attend,
    attention_scores,
    in_mixed_type,
    may_draw,
    split_heads,
    unhooked,
    unwatched,
)
from cn_clip.errors import ConfigError

# Added to the attention scores of padding. Finite, as in BERT: a row of nothing but padding stays a number.
MASKED_SCORE = -10000.0
Activation = Callable[[Tensor], Tensor]


def gelu_new(x: Tensor) -> Tensor:
    """The GELU by its approximation with tanh. Source: arXiv:1606.08415, section 2."""
    return F.gelu(x, approximate="tanh")


ACT2FN: dict[str, Activation] = {"gelu": F.gelu, "relu": F.relu, "silu": F.silu, "swish": F.silu, "gelu_new": gelu_new}


def activation(name: str | Activation) -> Activation:
    """The function of a key of `ACT2FN`; a function as it is. Raises ConfigError for another name."""
    if callable(name):
        return name
    if name not in ACT2FN:
        raise ConfigError(f"text_hidden_act: expected one of {sorted(ACT2FN)}, got {name!r}")
    return ACT2FN[name]


class BertEmbeddings(nn.Module):
    """Sum of word, position and token type embeddings, normalised."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.word_embeddings = nn.Embedding(config.vocab_size, width, padding_idx=0)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, width)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, width)
        self.LayerNorm = LayerNorm(width, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(
        self, input_ids: Tensor, token_type_ids: Tensor | None = None, position_ids: Tensor | None = None
    ) -> Tensor:
        """(B, L, D) of int64 ids (B, L); types are 0 and positions count from 0 where none are given.

        Raises ConfigError for rows longer than the position table.
        """
        length, table, kinds = input_ids.shape[1], self.position_embeddings, self.token_type_embeddings
        if position_ids is None and token_type_ids is None and unwatched(table, kinds):
            longest = table.weight.shape[0]
            if length > longest:
                raise ConfigError(f"texts of {length} tokens; this model takes at most {longest}")
            added = table.weight[:length] + kinds.weight[0]
        else:
            if position_ids is None:
                position_ids = torch.arange(length, device=input_ids.device).expand_as(input_ids)
            added = table(position_ids) + kinds(
                torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids
            )
        embedded: Tensor = self.dropout(self.LayerNorm(self.word_embeddings(input_ids) + added))
        return embedded


class BertSelfAttention(nn.Module):
    """Multi-head attention, without the projection behind it."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        width, heads = config.hidden_size, config.num_attention_heads
        if width % heads:
            raise ConfigError(f"text_hidden_size {width} is not a multiple of text_num_attention_heads {heads}")
        self.output_attentions = config.output_attentions
        self.num_attention_heads = heads
        self.attention_head_size = width // heads
        self.all_head_size = width
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.dropout = nn.Dropout(config.attention_probs_dropout_prob)

    def transpose_for_scores(self, x: Tensor) -> Tensor:
        """(B, L, D) as (B, H, L, D / H)."""
        return split_heads(x, self.num_attention_heads)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        head_mask: Tensor | None = None,
        *,
        looking: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """(context (B, Q, D),), with `output_attentions` (context, shares (B, H, Q, L)).

        attention_mask: added to the scores. head_mask: multiplies the shares. looking: the rows (B, Q, D) that attend
        to `hidden_states` (B, L, D); default those themselves.
        """
        query = self.query(hidden_states if looking is None else looking)
        key, value = self.key(hidden_states), self.value(hidden_states)
        bias = None if attention_mask is None else attention_mask.to(query.dtype)
        if not self.output_attentions and head_mask is None and unwatched(self.dropout):
            dropout_p = self.dropout.p if self.dropout.training else 0.0
            heads = self.num_attention_heads
            return (attend(query, key, value, heads, lengths_vary=True, attn_mask=bias, dropout_p=dropout_p),)
        shares_BHQL = self.dropout(attention_scores(query, key, self.num_attention_heads, bias))
        if head_mask is not None:
            shares_BHQL = shares_BHQL * head_mask
        context = (shares_BHQL @ self.transpose_for_scores(value)).transpose(1, 2).flatten(2)
        return (context, shares_BHQL) if self.output_attentions else (context,)


class BertAddNorm(nn.Module):
    """Projection, dropout, residual sum and normalisation: the end of both halves of a layer."""

    def __init__(self, input_width: int, config: BertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(input_width, config.hidden_size)
        self.LayerNorm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        """LayerNorm(dense(hidden_states) + input_tensor); both (B, L, width)."""
        normed: Tensor = self.LayerNorm(self.dropout(self.dense(hidden_states)) + input_tensor)
        return normed


class BertSelfOutput(BertAddNorm):
    """What follows the attention: dense, dropout, residual, LayerNorm."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config.hidden_size, config)


class BertOutput(BertAddNorm):
    """What follows the intermediate layer: dense, dropout, residual, LayerNorm."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config.intermediate_size, config)


class BertAttention(nn.Module):
    """Attention, projection and sum: the first half of a layer. Returns a tuple, as `BertSelfAttention`."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.self = BertSelfAttention(config)
        self.output = BertSelfOutput(config)
        self.pruned_heads: set[int] = set()
        self.config = config

    def get_key_padding_mask(self, attention_mask: Tensor) -> Tensor:
        """Of scores to add (B, 1, 1, L), where nothing is added, bool (B, L)."""
        return attention_mask.squeeze(1).squeeze(1) == 0

    def forward(
        self,
        input_tensor: Tensor,
        attention_mask: Tensor | None = None,
        head_mask: Tensor | None = None,
        *,
        first_only: bool = False,
    ) -> tuple[Tensor, ...]:
        """Attention over input_tensor (B, L, H) with its residual; returns a tuple as BERT's."""
        if first_only:
            first = input_tensor[:, :1]
            return (self.output(self.self(input_tensor, attention_mask, head_mask, looking=first)[0], first),)
        context, *shares = self.self(input_tensor, attention_mask, head_mask)
        return (self.output(context, input_tensor), *shares)


class BertIntermediate(nn.Module):
    """The wide layer of a block with its activation."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.intermediate_size)
        self.intermediate_act_fn = activation(config.hidden_act)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(B, L, H) to (B, L, intermediate size)."""
        return self.intermediate_act_fn(self.dense(hidden_states))


class BertLayer(nn.Module):
    """Post-norm transformer layer. Returns a tensor; with attention shares, a tuple of both."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.attention = BertAttention(config)
        self.intermediate = BertIntermediate(config)
        self.output = BertOutput(config)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        head_mask: Tensor | None = None,
        **options: Any,
    ) -> Any:
        """One block: attention, then the two dense layers; returns a tuple as BERT's."""
        attended, *shares = self.attention(hidden_states, attention_mask, head_mask, **options)
        output: Tensor = self.output(self.intermediate(attended), attended)
        return (output, *shares) if shares else output


class BertEncoder(nn.Module):
    """The layers. `output_hidden_states` and `output_attentions` may be changed at any time."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.output_attentions = config.output_attentions
        self.output_hidden_states = config.output_hidden_states
        self.grad_checkpointing = False
        self.layer = nn.ModuleList([BertLayer(config) for _ in range(config.num_hidden_layers)])

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        head_mask: Sequence[Tensor | None] | Tensor | None = None,
        *,
        first_only: bool = False,
    ) -> tuple[Any, ...]:
        """(last states (B, L, D), then a tuple of the states before, between and after the layers, and of the shares).

        attention_mask: added to the scores. head_mask: one for each layer. first_only: states of the first token.
        """
        states = [hidden_states]
        attentions: list[Tensor] = []
        last = len(self.layer) - 1
        for number, layer in enumerate(self.layer):
            arguments = (states[-1], attention_mask, None if head_mask is None else head_mask[number])
            options: dict[str, Any] = {"first_only": True} if first_only and number == last else {}
            if self.grad_checkpointing and self.training:
                options["preserve_rng_state"] = may_draw(layer)
                output = checkpoint(layer, *arguments, use_reentrant=False, **options)
            else:
                output = layer(*arguments, **options)
            if isinstance(output, tuple):
                attentions += output[1:2]
                output = output[0]
            states = [*states, output] if self.output_hidden_states else [output]
        outputs: tuple[Any, ...] = (states[-1],)
        if self.output_hidden_states:
            outputs += (tuple(states),)
        return (*outputs, tuple(attentions)) if self.output_attentions else outputs


class BertPreTrainedModel(nn.Module):
    """What models with a `BertConfig` share: how their weights are drawn."""

    config_class = BertConfig
    base_model_prefix = "bert"

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.config = config

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)


class BertModel(BertPreTrainedModel):
    """Token ids to hidden states. No pooler: the class token's last state is the sentence."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.embeddings = BertEmbeddings(config)
        self.encoder = BertEncoder(config)
        self.apply(self._init_weights)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Whether blocks are computed again in the backward pass, which takes less memory and more time."""
        self.encoder.grad_checkpointing = enable

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        head_mask: Tensor | None = None,
        **options: Any,
    ) -> tuple[Any, ...]:
        """(last hidden states (B, L, D), None for the pooler there is not, what else `encoder` returns).

        input_ids: int64 (B, L). attention_mask: (B, L), 1 for tokens and 0 for padding; default all tokens.
        head_mask: (H,) or (layers, H), 0 for heads left out. `first_only`, for the states (B, 1, D) of the first token.
        Raises ConfigError for rows longer than the position table.
        """
        embedded = self.embeddings(input_ids, position_ids=position_ids, token_type_ids=token_type_ids)
        if embedded.is_cuda:
            embedded = in_mixed_type(embedded)
        score_bias = None
        if attention_mask is not None or not embedded.is_cuda:
            attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            score_bias = (1.0 - attention_mask.to(embedded.dtype))[:, None, None, :] * MASKED_SCORE
            score_bias = aligned(score_bias) if embedded.is_cuda else score_bias
        count = len(self.encoder.layer)
        heads: Sequence[Tensor | None] = [None] * count
        if head_mask is not None:
            rows = head_mask.expand(count, -1) if head_mask.ndim == 1 else head_mask
            heads = [row[None, :, None, None].to(embedded.dtype) for row in rows]
        sequence, *rest = self.encoder(embedded, score_bias, head_mask=heads, **options)
        return (sequence, None, *rest)

    def class_token_suffices(self) -> bool:
        """Whether no program looks at the other tokens of the last layer, or has put its own code there."""
        encoder, layers = self.encoder, getattr(self.encoder, "layer", None)
        if not layers or not (unhooked(self) and unhooked(encoder) and unwatched(layers[-1])):
            return False
        if encoder.output_hidden_states or encoder.output_attentions or not isinstance(layers[-1], BertLayer):
            return False
        return all(kind.forward is forward for kind, forward in _FORWARDS)


# As they are here: a program may replace them by others, which know no `first_only`.
_FORWARDS = [
    (kind, kind.forward) for kind in (BertModel, BertEncoder, BertLayer, BertAttention, BertSelfAttention, BertAddNorm)
]
