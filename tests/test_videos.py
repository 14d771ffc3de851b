"""Frames of videos: which are taken, that they are upright, and what faulty files say."""

import sys
import time
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from video_files import BLUE, GREEN, RED, write_sound, write_video

from cn_clip.data import videos
from cn_clip.errors import DataError, MissingExtraError


def seconds(path: Path, every: float = 10) -> list[float]:
    """When the frames are that are taken."""
    return [frame.seconds for frame in videos.frames(path, every)]


def test_a_histogram_counts_shares_of_the_pixels_and_a_change_how_many_moved() -> None:
    black, red = np.zeros((2, 2, 3), np.uint8), np.zeros((2, 2, 3), np.uint8)
    red[0, :, 0] = 255  # half of the pixels
    assert videos.histogram(red)[0].tolist() == [0.5, 0, 0, 0, 0, 0, 0, 0.5]
    assert videos.histogram(red)[1].tolist() == [1, 0, 0, 0, 0, 0, 0, 0]
    # Half of the pixels moved in one colour of three.
    assert videos.changed_share(videos.histogram(black), videos.histogram(red)) == pytest.approx(1 / 6)
    white = np.full((2, 2, 3), 255, np.uint8)
    assert videos.changed_share(videos.histogram(black), videos.histogram(white)) == 1


@pytest.mark.parametrize("name", ["a.mp4", "a.mov", "a.m4v", "a.mkv", "a.avi"])
def test_a_frame_is_taken_where_the_scene_changes(tmp_path: Path, name: str) -> None:
    path = write_video(tmp_path / name, [RED, RED, GREEN, BLUE])
    found = list(videos.frames(path, 10))
    assert [frame.seconds for frame in found] == [0, 2, 3]
    for frame, colour in zip(found, (RED, GREEN, BLUE), strict=True):
        assert frame.image.size == (64, 48)
        np.testing.assert_allclose(frame.image.getpixel((60, 40)), colour, atol=4)


def test_a_scene_that_does_not_change_gives_a_frame_every_so_many_seconds(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", [RED] * 7)
    assert seconds(path, 3) == [0, 3, 6]
    assert seconds(path, 10) == [0]


def test_key_frames_far_apart_have_the_frames_between_them_decoded(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", [RED, RED, GREEN, GREEN, BLUE, BLUE, BLUE], key_every=600)
    # Key frames alone would give the first; a scene that begins less than a second after a frame waits for that.
    assert seconds(path, 3) == [0, 2, 4]
    assert seconds(path, 100) == [0]


def test_a_long_video_gives_as_many_frames_as_any_may_over_all_of_its_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_video(tmp_path / "a.mp4", [RED, GREEN] * 6)
    monkeypatch.setattr(videos, "MAX_FRAMES", 4)
    assert seconds(path, 1) == [0, 3, 6, 9]


@pytest.mark.parametrize(
    ("rotation", "size", "corner"), [(90, (48, 64), (4, 60)), (-90, (48, 64), (44, 4)), (180, (64, 48), (60, 44))]
)
def test_a_frame_is_turned_as_the_phone_was_held(
    tmp_path: Path, rotation: int, size: tuple[int, int], corner: tuple[int, int]
) -> None:
    """The white quarter is stored at the upper left; an angle is counted against the clock."""
    (frame,) = videos.frames(write_video(tmp_path / "a.mp4", [RED], rotation=rotation), 10)
    assert frame.image.size == size == (frame.fields["width"], frame.fields["height"])
    np.testing.assert_allclose(frame.image.getpixel(corner), (255, 255, 255), atol=6)
    opposite = (size[0] - 1 - corner[0], size[1] - 1 - corner[1])
    np.testing.assert_allclose(frame.image.getpixel(opposite), RED, atol=6)


def test_pixels_that_are_no_squares_are_drawn_out(tmp_path: Path) -> None:
    (frame,) = videos.frames(write_video(tmp_path / "a.mp4", [RED], aspect=Fraction(3, 2)), 10)
    assert frame.image.size == (96, 48)


def test_large_frames_are_made_smaller_and_keep_their_size_as_fields(tmp_path: Path) -> None:
    (frame,) = videos.frames(write_video(tmp_path / "a.mp4", [RED], size=(1280, 640), fps=1), 10)
    assert (frame.image.size, frame.fields["width"], frame.fields["height"]) == ((1024, 512), 1280, 640)


def test_what_the_phone_wrote_becomes_date_camera_and_place(tmp_path: Path) -> None:
    tags = {
        "com.apple.quicktime.creationdate": "2021-05-03T14:22:10+0800",
        "com.apple.quicktime.make": "Apple",
        "com.apple.quicktime.model": "iPhone 13",
        "com.apple.quicktime.location.ISO6709": "+31.2304-121.4737+010.000/",
    }
    (frame,) = videos.frames(write_video(tmp_path / "a.mov", [RED], tags=tags), 10)
    assert frame.fields == {
        "width": 64,
        "height": 48,
        "date": "2021-05-03T14:22:10",
        "camera": "Apple iPhone 13",
        "latitude": 31.2304,
        "longitude": -121.4737,
    }


def test_the_time_of_the_container_is_told_in_the_zone_of_this_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_video(tmp_path / "a.mp4", [RED], tags={"creation_time": "2021-05-03T06:22:10.000000Z"})
    monkeypatch.setenv("TZ", "Asia/Shanghai")
    time.tzset()
    try:
        assert next(videos.frames(path, 10)).fields["date"] == "2021-05-03T14:22:10"
    finally:
        monkeypatch.undo()
        time.tzset()
    unset = write_video(tmp_path / "b.mp4", [RED], tags={"creation_time": "1970-01-01T00:00:00.000000Z"})
    assert "date" not in next(videos.frames(unset, 10)).fields


def test_faulty_videos_say_what_they_are_and_print_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    whole = write_video(tmp_path / "whole.mp4", [RED]).read_bytes()
    faulty = {
        "empty.mp4": (b"", "is empty"),
        "cut.mp4": (whole[:600], "damaged or cut short"),
        "noise.mkv": (b"\x1a\x45\xdf\xa3" + b"noise" * 99, "cannot be read"),
        # A list of addresses, which libav would open one after the other.
        "list.mp4": (b"#EXTM3U\n#EXTINF:9,\nfile:///etc/hostname\n#EXT-X-ENDLIST\n", "cannot be read"),
        "sound.mp4": (write_sound(tmp_path / "a.m4a").read_bytes(), "sound but no pictures"),
    }
    for name, (data, reason) in faulty.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(DataError, match=reason):
            list(videos.frames(tmp_path / name, 10))
    assert capfd.readouterr() == ("", "")


def test_a_video_that_takes_too_long_ends_with_the_frames_so_far(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_video(tmp_path / "a.mp4", [RED, GREEN, BLUE])
    now, upright = [0.0], videos._upright

    def slow(*given: Any) -> Any:
        now[0] += 1000
        return upright(*given)

    monkeypatch.setattr(videos, "_upright", slow)
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    found = []
    with pytest.raises(DataError, match="takes longer than 300 s"):
        found.extend(one.seconds for one in videos.frames(path, 10))
    assert len(found) == 1


def test_the_time_in_which_frames_are_used_is_not_that_of_the_video(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, now, found = write_video(tmp_path / "a.mp4", [RED, GREEN, BLUE]), [0.0], []
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    for frame in videos.frames(path, 10):
        now[0] += 1000  # a large model on a slow processor
        found.append(frame.seconds)
    assert found == [0, 1, 2]


def test_lies_in_the_tags_of_a_video_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tags = {"creation_time": "9999-12-31T23:59:59.000000Z", "com.android.model": "x " * 5000}
    path = write_video(tmp_path / "a.mp4", [RED], tags=tags)
    monkeypatch.setenv("TZ", "Asia/Shanghai")
    time.tzset()
    try:
        found = next(videos.frames(path, 10)).fields
        assert "date" not in found
        assert len(str(found.get("camera", ""))) <= 64
    finally:
        monkeypatch.undo()
        time.tzset()


def test_an_error_of_python_over_a_video_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(tags: object) -> None:
        raise TypeError("no time base")

    monkeypatch.setattr(videos, "_known", refuse)
    with pytest.raises(DataError, match=r"the video cannot be read \(no time base\)"):
        seconds(write_video(tmp_path / "a.mp4", [RED]))


def test_damage_in_the_middle_of_a_video_costs_the_frames_that_it_hits(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.avi", [RED, GREEN, BLUE], fps=1, key_every=1)
    data = bytearray(path.read_bytes())
    at = data.rindex(b"\0\0\x01\xb6")  # the head of a frame of MPEG-4
    data[at : at + 64] = bytes(64)
    path.write_bytes(data)
    assert seconds(path) == [0, 1]


def test_without_av_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_video(tmp_path / "a.mp4", [RED])
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'cn-clip-next\[video\]'"):
        next(videos.frames(path, 10))
