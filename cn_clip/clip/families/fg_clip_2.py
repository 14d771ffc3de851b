"""FG-CLIP 2, for which transformers has no class: its picture tower and its texts, written after its paper and config.

It is SigLIP 2 with pictures in patches (NaFlex). Texts are read in two ways: short ones as those of SigLIP 2, and long
ones with position embeddings and a head of their own. Source: arXiv 2510.10921, and the code that its authors published
with the weights; heads of regions and boxes, which no whole picture goes through, are left out.
"""

# B batch, L tokens, D embedding

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

# Patches of 16 pixels a side, in steps, so that a small picture is hardly scaled up: what the authors advise.
PATCH_SIDE = 16
PATCH_STEPS = (128, 256, 576, 784, 1024)
# Of a text that is read as a long one, the first tokens have the position embeddings of short ones, kept in training.
KEPT_LENGTH = 20
LONG_LENGTH = 196


def num_patches(width: int, height: int) -> int:
    """The most patches that a picture is scaled to: the first step that has room for those it has."""
    own = (width // PATCH_SIDE) * (height // PATCH_SIDE)
    return next((step for step in PATCH_STEPS if own <= step), PATCH_STEPS[-1])


def read_config(transformers: Any, config: Mapping[str, Any]) -> Any:
    """The values of config.json as a config of SigLIP 2."""
    text, vision = (dict(config.get(name) or {}) for name in ("text_config", "vision_config"))
    for values in (text, vision):
        values.pop("model_type", None)
    made = transformers.Siglip2Config(text_config=text, vision_config=vision)
    made.text_config.longtext_len = int(text.get("longtext_len", LONG_LENGTH))
    made.text_config.keep_len = int(text.get("keep_len", KEPT_LENGTH))
    return made


def load(
    transformers: Any, folder: Path, config: Mapping[str, Any], context_length: int, **settings: Any
) -> tuple[Any, Any]:
    """(the model, what transformers says of its weights). context_length: that of long texts for reading them so."""
    found = read_config(transformers, config)
    long = found.text_config.longtext_len
    model, info = model_class(transformers).from_pretrained(folder, config=found, **settings)
    model.reads_long_texts = context_length == long and context_length != found.text_config.max_position_embeddings
    return model, info


@cache
def model_class(transformers: Any) -> Any:
    """The class of the model: it stands on transformers', which is imported only when such a folder is opened."""

    class FgClip2Model(transformers.Siglip2Model):  # type: ignore[misc]
        """Names of parameters are those of the published weights."""

        reads_long_texts = False

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            width, long = config.text_config.hidden_size, config.text_config.longtext_len
            self.text_model.embeddings.position_embedding_res = nn.Embedding(long, width)
            self.text_model.embeddings.position_embedding_ori = nn.Embedding(long, width)
            self.longtext_head = nn.Linear(width, width)
            self.post_init()

        def get_text_features(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
            """As of SigLIP 2; of long texts with their own positions and head."""
            if not self.reads_long_texts:
                return super().get_text_features(input_ids=input_ids, attention_mask=attention_mask)
            text = self.text_model
            hidden_BLD = text.embeddings.token_embedding(input_ids) + self._long_positions()
            mask = transformers.masking_utils.create_bidirectional_mask(
                config=text.config, inputs_embeds=hidden_BLD, attention_mask=attention_mask
            )
            hidden_BLD = text.encoder(inputs_embeds=hidden_BLD, attention_mask=mask).last_hidden_state
            # The last token, padding or not, as of short texts.
            pooled_BD = self.longtext_head(text.final_layer_norm(hidden_BLD)[:, -1])
            return transformers.modeling_outputs.BaseModelOutputWithPooling(pooler_output=pooled_BD)

        def _long_positions(self) -> Tensor:
            embeddings, kept = self.text_model.embeddings, self.config.text_config.keep_len
            return torch.cat(
                [embeddings.position_embedding_ori.weight[:kept], embeddings.position_embedding_res.weight[kept:]]
            )

    return FgClip2Model
