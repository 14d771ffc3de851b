"""The numbers of the reference (cn_clip 1.6.0), recorded by tools/golden/record_model.py."""

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from deterministic import TEXT_TOWER, TEXTS, picture_bytes, state_dict
from PIL import Image

import cn_clip.clip as clip
from cn_clip import zoo
from cn_clip.clip.loading import build
from cn_clip.clip.model import CLIP
from cn_clip.clip.transforms import ImageTransform, image_transform
from cn_clip.clip.weights.checkpoint import Checkpoint

GOLDEN = Path(__file__).parent / "golden"
PARAMETERS = {
    "RN50": (76_989_537, None),
    "ViT-B-16": (188_262_913, 86_192_640),
    "ViT-B-32": (189_919_489, None),
    "ViT-L-14": (406_233_089, None),
    "ViT-L-14-336": (406_560_769, None),
    "ViT-H-14": (957_598_209, None),
}


def deterministic_model(vision: str) -> CLIP:
    config = zoo.model_config(vision, TEXT_TOWER[vision])
    with torch.device("meta"):
        shapes = [(name, tuple(value.shape)) for name, value in CLIP.from_config(config).state_dict().items()]
    tensors = {name: torch.from_numpy(value) for name, value in state_dict(shapes).items()}
    return build(config, Checkpoint(Path("deterministic"), tensors))


def relative_error(ours: torch.Tensor, theirs: Any) -> float:
    """Largest distance of a row, as a share of the row's length."""
    difference = np.linalg.norm(ours.cpu().numpy() - theirs, axis=-1)
    return float((difference / np.linalg.norm(theirs, axis=-1)).max())


@pytest.mark.parametrize(
    "vision",
    # The large ones take two minutes.
    [pytest.param(name, marks=pytest.mark.slow if name.startswith(("ViT-L", "ViT-H")) else ()) for name in TEXT_TOWER],
)
def test_features_equal_the_reference_within_1e_4(vision: str, device: torch.device) -> None:
    golden = np.load(GOLDEN / "features" / f"{vision}.npz")
    model = deterministic_model(vision).to(device)
    transform = image_transform(model.resolution)
    pixels = torch.stack([transform(Image.fromarray(picture_bytes(number))) for number in (1, 2)]).to(device)
    tokens = clip.tokenize(TEXTS).to(device)
    with torch.inference_mode():
        assert relative_error(model.encode_image(pixels), golden["images"]) < 1e-4
        assert relative_error(model.encode_text(tokens), golden["texts"]) < 1e-4
        logits, logits_transposed = model.get_similarity(pixels, tokens)
    np.testing.assert_allclose(logits.cpu().numpy(), golden["logits"], atol=54.6 * 1e-4)
    assert torch.equal(logits.t(), logits_transposed)


@pytest.mark.parametrize("vision", TEXT_TOWER)
def test_parameters_have_the_reference_names_shapes_and_order(vision: str) -> None:
    golden = json.loads(gzip.decompress((GOLDEN / "parameter_names.json.gz").read_bytes()))[vision]
    with torch.device("meta"):
        model = CLIP.from_config(zoo.model_config(vision, TEXT_TOWER[vision]))
    # The optimizer's state refers to parameters by position: the order is part of the checkpoint format.
    assert [[name, list(value.shape)] for name, value in model.named_parameters()] == golden["parameters"]
    assert [[name, list(value.shape)] for name, value in model.state_dict().items()] == golden["state_dict"]


@pytest.mark.parametrize("vision", PARAMETERS)
def test_parameter_counts_are_the_published_ones(vision: str) -> None:
    with torch.device("meta"):
        model = CLIP.from_config(zoo.model_config(vision, TEXT_TOWER[vision]))
    total, visual = PARAMETERS[vision]
    assert sum(parameter.numel() for parameter in model.parameters()) == total
    if visual is not None:
        assert sum(parameter.numel() for parameter in model.visual.parameters()) == visual


@pytest.mark.parametrize("name", sorted(path.name for path in (GOLDEN / "pictures").iterdir()))
def test_pixels_of_every_picture_kind_equal_the_reference(name: str) -> None:
    golden = np.load(GOLDEN / "pixels.npz")[name]
    with Image.open(GOLDEN / "pictures" / name) as image:
        # "reference" matters for 16-bit grey only, which it clips to white as Chinese-CLIP does.
        pixels = ImageTransform(64, "reference")(image)
    assert pixels.dtype == torch.float32
    assert np.abs(pixels.numpy() - golden).max() <= 1e-6
