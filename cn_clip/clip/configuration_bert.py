"""The settings of a BERT under the names of Chinese-CLIP; the models' own are in `cn_clip.zoo`."""

import logging
from collections.abc import Callable
from typing import Any

logger = logging.getLogger(__name__)


class BertConfig:
    """Sizes and rates of a `BertModel`. Every argument is an attribute of its name; the first is `vocab_size`.

    hidden_act: a key of `modeling_bert.ACT2FN`, or a function of a tensor. output_attentions, output_hidden_states:
    whether the model returns them too. `use_flash_attention` changes nothing.
    """

    def __init__(
        self,
        vocab_size_or_config_json_file: int = 30522,
        hidden_size: int = 768,
        num_hidden_layers: int = 12,
        num_attention_heads: int = 12,
        intermediate_size: int = 3072,
        hidden_act: str | Callable[[Any], Any] = "gelu",
        hidden_dropout_prob: float = 0.1,
        attention_probs_dropout_prob: float = 0.1,
        max_position_embeddings: int = 512,
        type_vocab_size: int = 2,
        initializer_range: float = 0.02,
        layer_norm_eps: float = 1e-12,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        use_flash_attention: bool = False,
    ) -> None:
        self.vocab_size = vocab_size_or_config_json_file
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.intermediate_size = intermediate_size
        self.hidden_act = hidden_act
        self.hidden_dropout_prob = hidden_dropout_prob
        self.attention_probs_dropout_prob = attention_probs_dropout_prob
        self.max_position_embeddings = max_position_embeddings
        self.type_vocab_size = type_vocab_size
        self.initializer_range = initializer_range
        self.layer_norm_eps = layer_norm_eps
        self.output_attentions = output_attentions
        self.output_hidden_states = output_hidden_states
        self.use_flash_attention = use_flash_attention
