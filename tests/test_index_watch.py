"""`cn-clip index watch`: an index follows a folder, whatever happens to it, and is free for others between updates."""

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cn_clip import cli, extras
from cn_clip.command import Speaker
from cn_clip.demo import emoji
from cn_clip.errors import ConfigError, MissingExtraError
from cn_clip.index import following
from cn_clip.index.watch import Options
from cn_clip.retrieval.store import open_index
from cn_clip.stopping import StopRequest

pytest.importorskip("watchfiles")

EMOJI = emoji.load("twemoji")
MODEL = ("--model", "Emoji-Tiny", "--num-threads", "1", "--num-workers", "0")


class Listener(Speaker):
    """Keeps what is said."""

    def __init__(self) -> None:
        super().__init__(quiet=False)
        self.lines: list[str] = []

    def __call__(self, line: str) -> None:
        self.lines.append(line)

    note = __call__


class Watch:
    """A folder, and an index in it that follows it in a thread of this process."""

    def __init__(self, root: Path, stop: StopRequest, *, poll: bool = False) -> None:
        self.folder, self.index = root / "pictures", root / "pictures" / "i"
        self.folder.mkdir()
        self.stop, self.say = stop, Listener()
        for number in range(4):
            self.draw(f"{number}.png", number)
        self.options = Options(
            source=str(self.folder),
            output=str(self.index),
            model="Emoji-Tiny",
            num_threads=1,
            num_workers=0,
            settle=2.0 if poll else 0.1,
            poll=poll,
        )
        self.thread = threading.Thread(target=following.follow, args=(self.options, self.say))
        self.thread.start()
        self.wait(lambda: self.told("waiting for changes"))

    def draw(self, name: str, number: int) -> None:
        """Puts a picture into the folder."""
        path = self.folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(emoji.png(EMOJI[number]))

    def told(self, words: str) -> int:
        """Lines with these words."""
        return sum(words in line for line in self.say.lines)

    def ids(self) -> list[str]:
        """The items, sorted."""
        return sorted(map(str, open_index(self.index).ids))

    def wait(self, is_so: Callable[[], object]) -> None:
        """Until it is so; the test fails when that takes far longer than it should, or the watch has ended."""
        deadline = time.monotonic() + 60
        while not is_so():
            assert time.monotonic() < deadline, self.say.lines
            assert self.thread.is_alive(), self.say.lines
            time.sleep(0.05)


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Watch]]:
    """Starts a watch that ends with the test."""
    stop, started = StopRequest(), list[Watch]()
    monkeypatch.setattr(following, "StopRequest", lambda: stop)
    for name, value in (("LOOK", 0.05), ("RETRY", 0.2), ("POLL_MS", 50)):
        monkeypatch.setattr(following, name, value)

    def begin(*, poll: bool = False) -> Watch:
        started.append(Watch(tmp_path, stop, poll=poll))
        return started[0]

    yield begin
    stop.number = signal.SIGTERM
    for one in started:
        one.thread.join(30)
        assert not one.thread.is_alive()
        assert one.told("stopped") == 1


FIRST = ["0.png", "1.png", "2.png", "3.png"]


@pytest.mark.parametrize("poll", [False, True])
def test_pictures_come_change_and_go(start: Callable[..., Watch], poll: bool) -> None:
    watch = start(poll=poll)
    assert watch.ids() == FIRST
    watch.draw("new/4.png", 4)
    watch.wait(lambda: watch.ids() == [*FIRST, "new/4.png"])
    before = open_index(watch.index).vector("0.png").tolist()
    watch.draw("0.png", 30)
    watch.wait(lambda: open_index(watch.index).vector("0.png").tolist() != before)
    (watch.folder / "1.png").unlink()
    watch.wait(lambda: watch.ids() == ["0.png", "2.png", "3.png", "new/4.png"])
    watch.wait(lambda: watch.told(" items") >= 3 and "removed 1; 4 items" in watch.say.lines[-1])


def test_a_change_within_the_second_of_another_is_seen_by_polling(start: Callable[..., Watch]) -> None:
    """Polling compares the times of files in whole seconds: a picture may be found before the rest of it is written."""
    watch = start(poll=True)
    path = watch.folder / "4.png"

    def draw(number: int, nanoseconds: int) -> None:
        path.write_bytes(emoji.png(EMOJI[number]))
        os.utime(path, ns=(1_700_000_000_000_000_000 + nanoseconds,) * 2)

    draw(4, 0)
    time.sleep(0.5)
    draw(30, 900_000_000)
    watch.wait(lambda: watch.ids() == [*FIRST, "4.png"])
    found = open_index(watch.index).vector("4.png")
    (watch.folder / "5.png").write_bytes(emoji.png(EMOJI[30]))
    watch.wait(lambda: watch.ids() == [*FIRST, "4.png", "5.png"])
    assert found.tolist() == pytest.approx(open_index(watch.index).vector("5.png").tolist(), abs=1e-5)


def test_others_change_the_index_meanwhile_and_its_own_changes_wake_no_one(
    start: Callable[..., Watch], tmp_path: Path
) -> None:
    watch = start()
    time.sleep(0.5)  # the look that follows the start is over
    generation = open_index(watch.index).generation
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "x.png").write_bytes(emoji.png(EMOJI[9]))
    cli.main(["index", "add", str(watch.index), str(tmp_path / "more"), "--id-prefix", "more/", *MODEL[2:]])
    added = open_index(watch.index).generation
    assert added > generation
    time.sleep(0.5)
    assert open_index(watch.index).generation == added
    watch.draw("4.png", 4)
    watch.wait(lambda: watch.ids() == [*FIRST, "4.png", "more/x.png"])


def test_a_folder_that_is_away_for_a_while_loses_nothing(start: Callable[..., Watch], tmp_path: Path) -> None:
    watch = start()
    watch.index.rename(tmp_path / "i")
    watch.folder.rename(tmp_path / "away")
    watch.wait(lambda: watch.told("is gone; waiting for it"))
    (tmp_path / "away" / "4.png").write_bytes(emoji.png(EMOJI[4]))
    (tmp_path / "i").rename(tmp_path / "away" / "i")
    (tmp_path / "away").rename(watch.folder)
    watch.wait(lambda: watch.told("is there again"))
    watch.wait(lambda: watch.ids() == [*FIRST, "4.png"])


def test_a_folder_that_is_empty_all_at_once_is_an_error_and_the_watch_goes_on(
    start: Callable[..., Watch], tmp_path: Path
) -> None:
    watch = start()
    for name in FIRST:
        (watch.folder / name).rename(tmp_path / name)
    watch.wait(lambda: watch.told("not updated, trying again later"))
    time.sleep(0.6)  # it is tried again, and said once
    assert watch.told("not updated") <= 2
    assert watch.ids() == FIRST
    for name in FIRST:
        (tmp_path / name).rename(watch.folder / name)
    watch.draw("4.png", 4)
    watch.wait(lambda: watch.ids() == [*FIRST, "4.png"])


def test_sigterm_ends_it_with_one_line_and_all_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, index = tmp_path / "pictures", tmp_path / "i"
    folder.mkdir()
    (folder / "a.png").write_bytes(emoji.png(EMOJI[0]))

    def end() -> None:
        while not (index / "manifest.json").exists() or not len(open_index(index)):
            time.sleep(0.05)
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, lambda *_: pytest.fail("nobody took the signal"))
    ender = threading.Thread(target=end)
    ender.start()
    try:
        cli.main(["index", "watch", str(folder), "--output", str(index), *MODEL, "--json"])
    finally:
        ender.join()
        signal.signal(signal.SIGTERM, before)
    out = capsys.readouterr()
    assert out.err.splitlines()[-1] == f"stopped: {index}"
    assert [json.loads(line)["num_items"] for line in out.out.splitlines()] == [1]
    assert open_index(index).ids == ["a.png"]


def test_what_cannot_be_watched_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = Options(source=str(tmp_path / "absent"), output=str(tmp_path / "i"))
    with pytest.raises(ConfigError, match="absent: expected a folder to watch"):
        following.follow(options, Listener())
    with pytest.raises(ConfigError, match=r"^--prune: is for one run; give it to cn-clip index build"):
        Options(source="a", output="i", prune=True)
    with pytest.raises(ConfigError, match=r"^--settle 1: with --poll, .* expected at least 2$"):
        Options(source="a", output="i", poll=True, settle=1)

    def require(*_: object, **__: object) -> object:
        raise MissingExtraError("cn-clip index watch needs the package `watchfiles`")

    monkeypatch.setattr(extras, "require", require)
    with pytest.raises(MissingExtraError, match="watchfiles"):
        following.follow(options, Listener())
