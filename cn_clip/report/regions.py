"""Where in a picture a text is found, and which of its tokens matter: two ways to look into a pair."""

# H, W regions of the last feature map, S regions in a row, L tokens, D width, E embedding

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from cn_clip.clip import tokenizer
from cn_clip.clip.backends.pytorch import TorchBackend
from cn_clip.clip.encoder import Encoder
from cn_clip.clip.model import CLIP
from cn_clip.clip.pictures import open_picture
from cn_clip.clip.resnet import ModifiedResNet
from cn_clip.clip.vit import ResidualAttentionBlock, VisualTransformer
from cn_clip.errors import DataError
from cn_clip.report.thumbnails import flattened


@dataclass(frozen=True)
class PairView:
    """A picture and a text, and what the model makes of them.

    similarity: their cosine. map_HW: cosine of each region with the text. tokens: each piece of the text in order, and
    how much the cosine of the pair falls without it; below 0, the piece stands in the way.
    """

    path: str
    text: str
    image: Image.Image
    similarity: float
    map_HW: NDArray[np.float32]
    tokens: list[tuple[str, float]]


def examine(encoder: Encoder, path: str, text: str) -> PairView:
    """Looks into one pair; raises DataError for a picture that cannot be read and a text without tokens."""
    assert isinstance(encoder.backend, TorchBackend), "the report opens models in PyTorch"
    image = open_picture(Path(path), name=path)
    ids = encoder.texts.rows([text])[0]
    if len(ids) <= 2:
        raise DataError(f"--text {text!r}: no token is left of it; expected words")
    pixels_3RR = torch.from_numpy(encoder.transform.array(image))
    rows = without_each(ids)
    texts_LE = torch.from_numpy(encoder.backend.encode_tokens(tokenizer.pad(rows, len(ids))))
    image_E, places_HWE = region_vectors(encoder.backend.model, pixels_3RR.to(encoder.backend.device))
    image_E, places_HWE = image_E.cpu(), places_HWE.cpu()
    cosines = (texts_LE @ image_E).tolist()
    drops = [cosines[0] - cosine for cosine in cosines[1:]]
    names = {number: piece for piece, number in tokenizer.vocab().items()}
    pieces = [names[number] for number in ids[1:-1]]
    map_HW: NDArray[np.float32] = (places_HWE @ texts_LE[0]).numpy()
    return PairView(path, text, image, cosines[0], map_HW, list(zip(pieces, drops, strict=True)))


def without_each(ids: list[int]) -> list[list[int]]:
    """The row of ids itself, then the rows that lack one of the ids between the first and the last."""
    return [ids, *(ids[:region] + ids[region + 1 :] for region in range(1, len(ids) - 1))]


@torch.inference_mode()
def region_vectors(model: CLIP, pixels_3RR: Tensor) -> tuple[Tensor, Tensor]:
    """(unit vector of the picture (E,), unit vectors of its regions (H, W, E)), float32.

    A region goes through the last attention as if it looked at itself alone: its own value, through the layers behind.
    Source: MaskCLIP, arXiv:2112.01071, section 3.2.
    """
    visual = model.visual
    layer = visual.attnpool if isinstance(visual, ModifiedResNet) else visual.transformer.resblocks[-1]
    seen: list[Tensor] = []
    hook = layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    try:
        image_E = model.encode_image(pixels_3RR[None])[0]
    finally:
        hook.remove()
    side, places_SE = (
        _regions_of_resnet(visual, seen[0]) if isinstance(visual, ModifiedResNet) else _regions_of_vit(visual, seen[0])
    )
    places_HWE = F.normalize(places_SE.float(), dim=-1).reshape(side, side, -1)
    return F.normalize(image_E.float(), dim=-1), places_HWE


def _regions_of_vit(visual: VisualTransformer, x_L1D: Tensor) -> tuple[int, Tensor]:
    block = visual.transformer.resblocks[-1]
    assert isinstance(block, ResidualAttentionBlock)
    x_SD, width = x_L1D[1:, 0], x_L1D.shape[-1]
    value_SD = F.linear(block.ln_1(x_SD), block.attn.in_proj_weight[-width:], block.attn.in_proj_bias[-width:])
    x_SD = x_SD + block.attn.out_proj(value_SD)
    x_SD = x_SD + block.mlp(block.ln_2(x_SD))
    return visual.grid_size[0], visual.ln_post(x_SD) @ visual.proj


def _regions_of_resnet(visual: ModifiedResNet, features_1CHW: Tensor) -> tuple[int, Tensor]:
    pool = visual.attnpool
    x_SC = features_1CHW[0].flatten(1).T + pool.positional_embedding[1:].to(features_1CHW.dtype)
    return features_1CHW.shape[-1], pool.c_proj(pool.v_proj(x_SC))


# Dark blue over green to yellow: brightness alone tells the order, in grey print too.
_COLOURS = np.array([(68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37)], dtype=np.float32)
OPACITY = 0.62


def overlaid(image: Image.Image, map_HW: NDArray[np.float32]) -> Image.Image:
    """The picture in grey under the map in colours, lowest value dark, highest bright; RGB, in the picture's size.

    Each region is one tile: a smooth map would promise more than there is.
    """
    low, high = float(map_HW.min()), float(map_HW.max())
    shares_HW = (map_HW - low) / (high - low) if high > low else np.zeros_like(map_HW)
    whole = Image.fromarray(shares_HW.astype(np.float32)).resize(image.size, Image.Resampling.NEAREST)
    region = np.clip(np.asarray(whole), 0.0, 1.0) * (len(_COLOURS) - 1)
    stops = np.arange(len(_COLOURS))
    channels = [np.interp(region, stops, _COLOURS[:, channel]) for channel in range(3)]
    colours = Image.fromarray(np.stack(channels, axis=-1).round().astype(np.uint8))
    return Image.blend(flattened(image).convert("L").convert("RGB"), colours, OPACITY)
