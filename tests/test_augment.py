"""The variation of training pictures: exact values worked by hand on tiny pictures, and what it depends on."""

import base64
import math
import pickle
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from dataset_files import CodePoints, picture
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from cn_clip.clip.transforms import image_transform
from cn_clip.data import augment
from cn_clip.data.augment import FILL, OPERATIONS, POLICY, Augmentation, auto_augment, crop_box
from cn_clip.data.datasets import LmdbPairs, PairDataset, make_loader
from cn_clip.data.lmdb_store import Pair, SplitWriter
from cn_clip.errors import ConfigError
from cn_clip.training.inputs import EpochNumbers, EpochSampler

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")

RED = (255, 0, 0)


class Draws(random.Random):
    """A generator whose random() is always the same."""

    def __init__(self, value: float) -> None:
        super().__init__(0)
        self.value = value

    def random(self) -> float:
        return self.value


PLUS, MINUS = Draws(0.0), Draws(0.9)


def grey(rows: list[list[int]]) -> Image.Image:
    return Image.fromarray(np.array(rows, dtype=np.uint8)).convert("RGB")


def apply(name: str, rows: list[list[int]], magnitude: int = 0, rng: random.Random = PLUS) -> list[list[int]]:
    """The red channel after an operation on a grey picture, whose other channels must be equal."""
    red, green, blue = OPERATIONS[name](grey(rows), magnitude, rng).split()
    assert red.tobytes() == green.tobytes() == blue.tobytes()
    values: list[list[int]] = np.asarray(red).tolist()
    return values


@pytest.mark.parametrize(
    ("name", "magnitude", "before", "after"),
    [
        ("invert", 4, [0, 10, 255], [255, 245, 0]),
        ("solarize", 5, [0, 127, 128, 200], [0, 127, 127, 55]),  # threshold 128
        ("solarize", 4, [101, 102], [101, 153]),  # 102
        ("solarize", 3, [75, 76], [75, 179]),  # 76
        ("solarize", 8, [203, 204], [203, 51]),  # 204
        ("solarize", 7, [178, 179], [178, 76]),  # 179
        ("solarize", 10, [0, 255], [0, 255]),  # 256: nothing
        ("posterize", 8, [1, 3, 255], [0, 2, 254]),  # 7 bits
        ("posterize", 7, [3, 7, 255], [0, 4, 252]),  # 6 bits
        ("posterize", 6, [255], [252]),
        ("posterize", 5, [255], [252]),
        ("posterize", 0, [31, 255], [16, 240]),  # 4 bits
        ("autocontrast", 5, [102, 110, 187], [0, 24, 255]),
        # mean 151.5, rounded to 152; factor 1.54: 152 - 1.54 * 52 = 71.92, 152 + 1.54 * 51 = 230.54
        ("contrast", 8, [100, 203], [71, 230]),
        ("contrast", 5, [100, 203], [100, 203]),  # factor 1
    ],
)
def test_an_operation_gives_the_values_worked_by_hand(
    name: str, magnitude: int, before: list[int], after: list[int]
) -> None:
    assert apply(name, [before], magnitude) == [after]


def test_equalize_spreads_four_equally_frequent_levels_over_the_range() -> None:
    # 256 pixels each: step (1024 - 256) // 255 = 3, then (1 + 256 k) // 3
    rows = [[level] * 32 for level in (10, 20, 30, 40) for _ in range(8)]
    assert [row[0] for row in apply("equalize", rows)[::8]] == [0, 85, 171, 255]


@pytest.mark.parametrize(
    ("magnitude", "colour"),
    [
        # grey of red is 76; factor 0.1: 76 + 0.1 * 179 = 93.9, 76 - 0.1 * 76 = 68.4
        (0, (93, 68, 68)),
        # factor 0.82: 76 + 0.82 * 179 = 222.78, 76 - 0.82 * 76 = 13.68
        (4, (222, 13, 13)),
        # factor 1.54: clipped
        (8, (255, 0, 0)),
    ],
)
def test_color_moves_to_or_from_grey(magnitude: int, colour: tuple[int, int, int]) -> None:
    assert OPERATIONS["color"](Image.new("RGB", (1, 1), RED), magnitude, PLUS).getpixel((0, 0)) == colour


def test_sharpness_moves_away_from_the_smoothed_picture() -> None:
    # Smoothed middle: (8 * 48 + 5 * 100) / 13 = 68; factor 1.36: 68 + 1.36 * 32 = 111.52; the rim stays.
    rows = [[48, 48, 48], [48, 100, 48], [48, 48, 48]]
    assert apply("sharpness", rows, 7) == [[48, 48, 48], [48, 111, 48], [48, 48, 48]]


def test_rotate_turns_by_three_degrees_a_magnitude_to_either_side() -> None:
    assert apply("rotate", [[1, 2], [3, 4]], 30) == [[2, 4], [1, 3]]  # 90 degrees, against the clock
    assert apply("rotate", [[1, 2], [3, 4]], 30, MINUS) == [[3, 1], [4, 2]]


def test_corners_left_free_have_the_mean_colour_of_clip() -> None:
    assert FILL == (123, 117, 104)
    turned = OPERATIONS["rotate"](Image.new("RGB", (21, 21), "white"), 9, PLUS)
    assert [turned.getpixel(place) for place in ((0, 0), (20, 20), (10, 10))] == [FILL, FILL, (255, 255, 255)]
    sheared = OPERATIONS["shear_x"](Image.new("RGB", (21, 21), "white"), 5, PLUS)
    assert [sheared.getpixel(place) for place in ((20, 20), (0, 20))] == [FILL, (255, 255, 255)]


def test_shear_shifts_each_row_by_its_share() -> None:
    # Row y by 0.15 (y + 0.5) pixels. PIL's cubic on a ramp of 10 a pixel: v + 20 d - 30 d^2 + 20 d^3, cut to a whole
    # number; rows 0 and 3, to the right d = 0.075 and 0.525 after 40, to the left d = 0.925 and 0.475 after 30.
    ramp = [[10 * x for x in range(9)]] * 4
    sheared = [OPERATIONS["shear_x"](grey(ramp), 5, rng) for rng in (PLUS, MINUS)]
    assert [image.getpixel((4, y))[0] for image in sheared for y in (0, 3)] == [41, 45, 38, 34]


def test_the_policy_has_the_25_rows_of_the_paper() -> None:
    assert len(POLICY) == 25
    assert POLICY[0] == (("posterize", 0.4, 8), ("rotate", 0.6, 9))
    assert POLICY[18] == (("shear_x", 0.6, 5), ("equalize", 1.0, 9))
    assert {name for pair in POLICY for name, _, _ in pair} == set(OPERATIONS)
    assert all(0 <= probability <= 1 and 0 <= magnitude < 10 for pair in POLICY for _, probability, magnitude in pair)
    totals = {name: round(sum(p for pair in POLICY for n, p, _ in pair if n == name), 1) for name in OPERATIONS}
    assert totals == {
        "autocontrast": 1.2, "color": 3.8, "contrast": 2.0, "equalize": 11.2, "invert": 1.8, "posterize": 2.8,
        "rotate": 3.6, "sharpness": 0.4, "shear_x": 0.6, "solarize": 3.6,
    }  # fmt: skip


def test_operations_are_applied_in_order_with_their_probabilities(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(augment, "POLICY", ((("invert", 0.5, 0), ("solarize", 0.2, 5)),))
    white = Image.new("RGB", (1, 1), (200, 200, 200))
    seen = [auto_augment(white, Draws(draw)).getpixel((0, 0)) for draw in (0.1, 0.3, 0.6)]
    assert seen == [(55, 55, 55), (55, 55, 55), (200, 200, 200)]  # inverted first, 55 is below the threshold


@settings(deadline=None)
@given(st.integers(1, 5000), st.integers(1, 5000), st.integers())
def test_a_crop_lies_inside_and_keeps_area_and_shape(width: int, height: int, seed: int) -> None:
    left, upper, right, lower = crop_box(width, height, random.Random(seed))
    assert 0 <= left < right <= width
    assert 0 <= upper < lower <= height
    crop_width, crop_height = right - left, lower - upper
    # Whole pixels: up to half a pixel on each side away from the ideal.
    assert (crop_width - 0.5) / (crop_height + 0.5) <= 4 / 3
    assert (crop_height - 0.5) / (crop_width + 0.5) <= 4 / 3
    if 3 / 4 <= width / height <= 4 / 3:
        assert (crop_width + 0.5) * (crop_height + 0.5) >= 0.9 * width * height


def test_a_picture_too_wide_for_any_crop_is_cut_in_the_middle_to_4_by_3() -> None:
    assert crop_box(1000, 300, random.Random(0)) == (300, 0, 700, 300)
    assert crop_box(300, 1000, random.Random(0)) == (0, 300, 300, 700)


def test_half_of_the_pictures_are_mirrored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(augment, "POLICY", ((("invert", 0.0, 0), ("invert", 0.0, 0)),))
    monkeypatch.setattr(augment, "crop_box", lambda width, height, rng: (0, 0, width, height))
    image = grey([[0, 255], [0, 255]])
    sides = [Augmentation(2)(image, random.Random(seed)).getpixel((0, 0)) for seed in range(400)]
    assert set(sides) == {(0, 0, 0), (255, 255, 255)}
    assert sides.count((0, 0, 0)) == pytest.approx(200, abs=5 * math.sqrt(100))  # five standard deviations


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGBA", "CMYK", "I;16"])
def test_pictures_of_every_mode_become_rgb_of_the_resolution(mode: str) -> None:
    image = Image.new("L" if mode == "I;16" else "RGB", (30, 20)).convert("I" if mode == "I;16" else mode).convert(mode)
    for seed in range(30):
        varied = Augmentation(8)(image, random.Random(seed))
        assert (varied.mode, varied.size) == ("RGB", (8, 8))


def test_a_resolution_below_one_is_refused() -> None:
    with pytest.raises(ConfigError, match="resolution: expected a positive number"):
        Augmentation(0)


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("split") / "train"
    noise = np.random.default_rng(0)
    with SplitWriter(folder) as writer:
        for number in range(12):
            data = noise.integers(0, 256, (24, 32, 3), dtype=np.uint8)
            stream = picture() if number == 3 else _png(data)
            writer.put_image(number, base64.b64encode(stream))
            writer.put_pair(Pair(number, number, "图"))
    return folder


def _png(data: "np.ndarray[tuple[int, ...], np.dtype[np.uint8]]") -> bytes:
    import io

    stream = io.BytesIO()
    Image.fromarray(data).save(stream, "PNG")
    return stream.getvalue()


def epoch_pixels(split: Path, *, num_workers: int = 0, epoch: int = 0, start: int = 0, seed: int = 1) -> torch.Tensor:
    sampler = EpochSampler(12, 4, seed=5)
    sampler.epoch, sampler.start = epoch, start
    dataset = PairDataset(
        LmdbPairs(split),
        image_transform(16),
        CodePoints(),
        augment=Augmentation(16),
        seed=seed,
    )
    loader = make_loader(dataset, 4, num_workers, sampler=EpochNumbers(sampler))
    return torch.cat([batch[0] for batch in loader])


def test_a_variation_depends_on_seed_epoch_and_sample_alone(split: Path) -> None:
    first = epoch_pixels(split)
    random.seed(99), np.random.seed(99), torch.manual_seed(99)
    assert torch.equal(epoch_pixels(split, num_workers=2), first)
    assert torch.equal(epoch_pixels(split, start=2), first[8:])
    assert not torch.equal(epoch_pixels(split, seed=2), first)


def test_each_epoch_varies_a_picture_anew(split: Path) -> None:
    orders = []
    for epoch in (0, 1):
        sampler = EpochSampler(12, 4, seed=5)
        sampler.epoch = epoch
        orders.append(list(sampler))
    first, second = epoch_pixels(split), epoch_pixels(split, epoch=1, num_workers=2)
    same = [torch.equal(first[orders[0].index(n)], second[orders[1].index(n)]) for n in range(12) if n != 3]
    assert not any(same)


@given(st.integers(64, 3000), st.integers(64, 3000), st.sampled_from([32, 64, 224, 336]), st.integers(0, 99))
def test_a_crop_of_a_fast_decoded_picture_has_the_pixels_that_are_asked_for(
    width: int, height: int, resolution: int, seed: int
) -> None:
    """A JPEG is decoded at 1/2, 1/4 or 1/8, the smallest that leaves `draft_size`; a crop keeps 0.9 of each side."""
    draft_size = Augmentation(resolution, "fast").draft_size
    assert draft_size == math.ceil(resolution / 0.9)
    scale = max((s for s in (1, 2, 4, 8) if min(width, height) // draft_size >= s), default=1)
    width, height = math.ceil(width / scale), math.ceil(height / scale)
    left, upper, right, lower = crop_box(width, height, random.Random(seed))
    if min(width, height) >= draft_size:
        assert min(right - left, lower - upper) >= resolution
    assert Augmentation(resolution).draft_size is Augmentation(resolution, "reference").draft_size is None


def test_the_augmentation_is_picklable() -> None:
    image = grey([[0, 50, 100], [150, 200, 250]])
    copy = pickle.loads(pickle.dumps(Augmentation(4)))
    assert copy(image, random.Random(7)).tobytes() == Augmentation(4)(image, random.Random(7)).tobytes()
