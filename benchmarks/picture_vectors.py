"""Vectors of pictures and of captions, of a model that is trained here: what people search, for `ann.py` and others.

python benchmarks/picture_vectors.py --data FLICKR8K_CN --output FOLDER

A caption never lies among the pictures (the two towers leave a gap), so searching with it is harder for a graph than
searching with one more picture. About 20 minutes of one core.
"""

import io
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
import trained  # noqa: E402
from numpy.typing import NDArray  # noqa: E402
from PIL import Image  # noqa: E402
from torch import Tensor  # noqa: E402

from cn_clip import command, ranks, zoo  # noqa: E402
from cn_clip.clip.model import CLIP  # noqa: E402
from cn_clip.clip.tokenizer import tokenize  # noqa: E402
from cn_clip.clip.transforms import normalised  # noqa: E402
from cn_clip.errors import ConfigError  # noqa: E402
from cn_clip.retrieval.recall import recall_from_features  # noqa: E402
from cn_clip.settings import Range  # noqa: E402
from cn_clip.training.distributed import Parallel  # noqa: E402
from cn_clip.training.loss import Objective  # noqa: E402
from cn_clip.training.scheduler import build_optimizer, clamp_logit_scale, cosine_lr  # noqa: E402
from cn_clip.training.step import Batch, Learner, cut_to_longest  # noqa: E402

# B pairs or pictures of a batch, R resolution, S side of the pictures kept, L tokens, N rows, D dimensions

TOWERS = ("RN-Tiny-64", "BERT-Tiny-chinese")
WIDTH = 24
BATCH = 256
SIDE = 96
CONTEXT = 32
LR = 1e-3

Rows = NDArray[np.float32]


@dataclass(frozen=True)
class Options:
    """Trains a small model on flickr8k-cn and writes pictures.npy, texts.npy: float32 rows of unit length."""

    data: Path
    """The folder of flickr8k-cn: train_imgs.tsv, train_texts.jsonl, valid_imgs.tsv, valid_texts.jsonl."""
    output: Path
    """Where the two files are written."""
    pictures: Annotated[int, Range(least=1000)] = 200_000
    """How many picture vectors: the photos, then random crops of them."""
    dimensions: Annotated[int, Range(least=8)] = 512
    """Their length."""
    steps: Annotated[int, Range(least=1)] = 900
    """Steps of training, 256 pairs each."""
    seed: int = 0
    """Of the weights, the order of the pairs and the crops."""


@dataclass(frozen=True)
class Part:
    """A split in memory: pictures (B, 3, S, S) uint8, token ids, and the pairs of their numbers."""

    pixels: Tensor
    tokens: Tensor
    pairs: NDArray[np.int64]


def run(options: Options) -> None:
    """Trains, measures, and writes."""
    say = command.Speaker(quiet=False)
    torch.set_num_threads(1)
    torch.manual_seed(options.seed)
    train, valid = (load(options.data, name) for name in ("train", "valid"))
    config = zoo.model_config(*TOWERS)
    vision = replace(config.vision, embed_dim=options.dimensions, vision_width=WIDTH)
    model = CLIP.from_config(replace(config, vision=vision))
    fit(model, train, options, say)
    model.eval()
    texts_TD = np.concatenate([encoded_texts(model, part.tokens) for part in (train, valid)])
    say(recall_line(model, valid))
    pixels = torch.cat([train.pixels, valid.pixels])
    pictures_ND = encoded_pictures(model, pixels, options)
    options.output.mkdir(parents=True, exist_ok=True)
    # The captions of pictures that the model has not seen come first.
    texts_TD = np.roll(texts_TD, len(valid.tokens), axis=0)
    np.save(options.output / "pictures.npy", pictures_ND)
    np.save(options.output / "texts.npy", texts_TD)
    say(cosine_line(pictures_ND, texts_TD))


def load(data: Path, name: str) -> Part:
    """A split, its pictures scaled down; raises ConfigError when it is not there."""
    if not (data / f"{name}_imgs.tsv").is_file():
        raise ConfigError(f"--data {data}: has no {name}_imgs.tsv; give the folder of flickr8k-cn")
    files, texts, pairs = trained.split(data, name)
    pixels = np.stack([np.asarray(Image.open(io.BytesIO(one)).convert("RGB").resize((SIDE, SIDE))) for one in files])
    return Part(torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), tokenize(texts, CONTEXT), pairs)


def fit(model: CLIP, part: Part, options: Options, say: command.Speaker) -> None:
    """Trains with the package's own learner, optimizer and schedule."""
    model.train()
    device = torch.device("cpu")
    optimizer = build_optimizer(model, lr=LR, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.1)
    adjust = cosine_lr(optimizer, LR, 50, options.steps)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    learner = Learner(Parallel(model, device), Objective("clip"), scaler, arithmetic)
    started = time.process_time()
    for step, batch in zip(range(options.steps), batches(part, options.seed), strict=False):
        adjust(step)
        optimizer.zero_grad()
        scores = learner.backward([batch])
        optimizer.step()
        clamp_logit_scale(model.logit_scale)
        if step % 100 == 99 or step < 2:
            seconds = time.process_time() - started
            say(f"step {step + 1}: loss {float(scores.loss):.3f}, {seconds:.0f} s of processor time")


def arithmetic() -> AbstractContextManager[object]:
    """Products in bfloat16 where the processor has them."""
    dtype = ranks.autocast_dtype("auto", torch.device("cpu"))
    return nullcontext() if dtype is None else torch.autocast("cpu", dtype=dtype)


def batches(part: Part, seed: int) -> Iterator[Batch]:
    """Pairs in random order, for ever."""
    generator = np.random.default_rng(seed)
    pairs = np.concatenate([generator.permutation(part.pairs) for _ in range(2)])
    while True:
        for start in range(0, len(pairs) - BATCH, BATCH):
            images, texts = pairs[start : start + BATCH].T
            pixels = varied(part.pixels[torch.from_numpy(images)], generator, least=0.7)
            tokens = cut_to_longest(part.tokens[torch.from_numpy(texts)])
            yield Batch(pixels, tokens, list(zip(images.tolist(), texts.tolist(), strict=True)), None)
        pairs = generator.permutation(part.pairs)


def varied(pixels_B3SS: Tensor, generator: np.random.Generator, *, least: float) -> Tensor:
    """Random crops of a side of at least `least`, half of them mirrored, in changed light: (B, 3, 64, 64)."""
    count, resolution = len(pixels_B3SS), zoo.vision_config(TOWERS[0]).image_resolution
    scale = generator.uniform(least, 1, (count, 1)) * generator.uniform(0.9, 1, (count, 2))
    moved = (1 - scale) * generator.uniform(-1, 1, (count, 2))
    theta = np.zeros((count, 2, 3))
    theta[:, 0, 0], theta[:, 1, 1] = scale[:, 0] * generator.choice([-1, 1], count), scale[:, 1]
    theta[:, :, 2] = moved
    grid = F.affine_grid(torch.from_numpy(theta).float(), [count, 3, resolution, resolution], align_corners=False)
    cropped = F.grid_sample(normalised(pixels_B3SS), grid, padding_mode="reflection", align_corners=False)
    gain, shift = (
        torch.from_numpy(generator.normal(mean, spread, (count, 3, 1, 1))).float()
        for mean, spread in ((1.0, 0.1), (0.0, 0.1))
    )
    return cropped * gain + shift


@torch.no_grad()
def encoded_pictures(model: CLIP, pixels: Tensor, options: Options) -> Rows:
    """Unit rows (options.pictures, D): each photo whole, then crops of them, the photos in turn."""
    generator = np.random.default_rng(options.seed + 1)
    rows = np.empty((options.pictures, options.dimensions), dtype=np.float32)
    for start in range(0, len(rows), BATCH):
        numbers = torch.arange(start, min(start + BATCH, len(rows)))
        chosen = pixels[numbers % len(pixels)]
        is_whole = int(numbers[-1]) < len(pixels)
        taken = whole(chosen) if is_whole else varied(chosen, generator, least=0.4)
        with arithmetic():
            features = model.encode_image(taken)
        rows[start : start + len(taken)] = F.normalize(features.float(), dim=1).numpy()
    return rows


def whole(pixels_B3SS: Tensor) -> Tensor:
    """Pictures at the resolution of the model."""
    resolution = zoo.vision_config(TOWERS[0]).image_resolution
    return F.interpolate(normalised(pixels_B3SS), size=[resolution, resolution], mode="bilinear", antialias=True)


@torch.no_grad()
def encoded_texts(model: CLIP, tokens: Tensor) -> Rows:
    """Unit rows (T, D)."""
    parts = [model.encode_text(cut_to_longest(part)) for part in tokens.split(BATCH)]
    rows: Rows = F.normalize(torch.cat(parts), dim=1).numpy()
    return rows


@torch.no_grad()
def recall_line(model: CLIP, part: Part) -> str:
    """What the model finds among pictures that it has not seen."""
    images = [F.normalize(model.encode_image(whole(one)), dim=1).numpy() for one in part.pixels.split(BATCH)]
    ways = recall_from_features(np.concatenate(images), encoded_texts(model, part.tokens), part.pairs)
    shares = [f"R@{k} {100 * share:.1f} %" for way in ways for k, share in way.at.items()]
    return f"on {len(part.pixels):,} unseen pictures: {', '.join(shares)}"


def cosine_line(pictures_ND: Rows, texts_TD: Rows) -> str:
    """The gap: how alike pictures are to pictures, captions to captions, and captions to pictures."""
    generator = np.random.default_rng(0)
    some = pictures_ND[generator.choice(len(pictures_ND), 2000, replace=False)]
    texts = texts_TD[generator.choice(len(texts_TD), 2000, replace=False)]
    within, within_texts = (float((one @ one.T)[np.triu_indices(len(one), 1)].mean()) for one in (some, texts))
    across, best = texts @ some.T, (texts[:200] @ pictures_ND.T).max(axis=1)
    return (
        f"{len(pictures_ND):,} pictures, {len(texts_TD):,} captions; mean cosine: between pictures {within:.3f}, "
        f"between captions {within_texts:.3f}, of a caption to a picture {float(across.mean()):.3f}, "
        f"to the nearest of all {float(best.mean()):.3f}"
    )


if __name__ == "__main__":
    command.execute(run, Options)
