"""Records tests/golden from the reference; run it with the interpreter of an environment that has cn_clip 1.6.0:

REFERENCE/bin/python tools/golden/record_model.py [features|pixels|names] …
"""

import gzip
import io
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
sys.path.insert(0, str(ROOT / "tests"))

import numpy as np  # noqa: E402
import reference_shim  # noqa: E402, F401  (before anything that imports torchvision)
import torch  # noqa: E402
from deterministic import TEXT_TOWER, TEXTS, picture_bytes, state_dict  # noqa: E402
from PIL import Image  # noqa: E402

import cn_clip.clip as clip  # noqa: E402
from cn_clip.clip.utils import create_model, image_transform  # noqa: E402

GOLDEN = ROOT / "tests" / "golden"


def load(vision: str) -> torch.nn.Module:
    model = create_model(f"{vision}@{TEXT_TOWER[vision]}")
    shapes = [(name, tuple(value.shape)) for name, value in model.state_dict().items()]
    weights = {name: torch.from_numpy(value) for name, value in state_dict(shapes).items()}
    model.load_state_dict(weights)
    return model.float().eval()


def record_features() -> None:
    for vision in TEXT_TOWER:
        model = load(vision)
        resolution = model.visual.input_resolution
        pixels = torch.stack([image_transform(resolution)(Image.fromarray(picture_bytes(n))) for n in (1, 2)])
        with torch.no_grad():
            images, texts = model.encode_image(pixels), model.encode_text(clip.tokenize(TEXTS))
            logits, _ = model.get_similarity(pixels, clip.tokenize(TEXTS))
        path = GOLDEN / "features" / f"{vision}.npz"
        np.savez_compressed(path, images=images.numpy(), texts=texts.numpy(), logits=logits.numpy())
        print(path, images.shape, texts.shape)
        del model


def record_names() -> None:
    """Names and shapes in the order of parameters(), the order of the optimizer's state, and of state_dict()."""
    names = {}
    for vision in TEXT_TOWER:
        model = create_model(f"{vision}@{TEXT_TOWER[vision]}")
        names[vision] = {
            "parameters": [[name, list(value.shape)] for name, value in model.named_parameters()],
            "state_dict": [[name, list(value.shape)] for name, value in model.state_dict().items()],
        }
    content = gzip.compress(json.dumps(names).encode(), mtime=0)
    (GOLDEN / "parameter_names.json.gz").write_bytes(content)


def record_pixels() -> None:
    """What the reference's preprocessing makes of each file in golden/pictures."""
    folder = GOLDEN / "pictures"
    folder.mkdir(exist_ok=True)
    for name, content in sorted(pictures().items()):
        (folder / name).write_bytes(content)
    transform = image_transform(64)
    arrays = {path.name: transform(Image.open(path)).numpy() for path in sorted(folder.iterdir())}
    np.savez_compressed(GOLDEN / "pixels.npz", **arrays)
    print(len(arrays), "pictures")


def pictures() -> dict[str, bytes]:
    """One small file of each kind users have."""
    base = Image.fromarray(picture_bytes(3, 40, 52))
    alpha = Image.fromarray(picture_bytes(4, 40, 52)[:, :, 0])
    rgba = base.copy()
    rgba.putalpha(alpha)
    grey16 = Image.fromarray(picture_bytes(5, 40, 52)[:, :, 0].astype(np.uint16) * 257)
    exif = Image.Exif()
    exif[0x0112] = 6
    transparent_palette = base.quantize(16)
    transparent_palette.info["transparency"] = 3
    files: dict[str, bytes] = {}

    def save(name: str, image: Image.Image, **options: object) -> None:
        buffer = io.BytesIO()
        image.save(buffer, **options)
        files[name] = buffer.getvalue()

    save("rgb.png", base, format="PNG")
    save("rgb.jpg", base, format="JPEG")
    save("same_size.png", base.resize((64, 64)), format="PNG")
    save("rgba.png", rgba, format="PNG")
    save("grey.png", base.convert("L"), format="PNG")
    save("grey_alpha.png", rgba.convert("LA"), format="PNG")
    save("bilevel.png", base.convert("1"), format="PNG")
    save("palette.png", base.quantize(32), format="PNG")
    save("palette_transparent.png", transparent_palette, format="PNG", transparency=3)
    save("grey16.png", grey16, format="PNG")
    save("cmyk.jpg", base.convert("CMYK"), format="JPEG")
    save("exif_rotated.jpg", base, format="JPEG", exif=exif)
    save("animated.gif", base, format="GIF", save_all=True, append_images=[base.rotate(90)])
    save("animated.webp", rgba, format="WEBP", save_all=True, append_images=[rgba.rotate(90)], lossless=True)
    return files


if __name__ == "__main__":
    for part in sys.argv[1:] or ["features", "names", "pixels"]:
        {"features": record_features, "names": record_names, "pixels": record_pixels}[part]()
