"""The reader's language: which it is, that every sentence of the catalogue is found, and what is still to translate."""

import importlib
import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import warm_python

from cn_clip import help_page, language, terminal
from cn_clip.errors import ConfigError, DataError, Where
from cn_clip.progress import cells_of

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))
count_languages: Any = importlib.import_module("count_languages")

# The least share of each kind that must have Chinese; only ever raised.
LEAST = {"help": 1.0, "errors": 0.95}
# Sentences that changed in the source since; only ever lowered.
MOST_STALE = 4


def run(*words: str, python: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    """A command in a process of its own."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "100", **environment}
    line = [python or warm_python.program(), "-m", "cn_clip", *words]
    return subprocess.run(line, env=env, capture_output=True, encoding="utf-8")


# --- which language


@pytest.mark.parametrize(
    ("set_to", "expected"),
    [
        ({"CN_CLIP_LANG": "zh"}, "zh"),
        ({"CN_CLIP_LANG": "en", "LANG": "zh_CN.UTF-8"}, "en"),
        ({"LANG": "zh_CN.UTF-8"}, "zh"),
        ({"LC_ALL": "C", "LANG": "zh_CN.UTF-8"}, "en"),
        ({"LC_MESSAGES": "zh_TW", "LANG": "en_US.UTF-8"}, "zh"),
        ({"LC_ALL": "", "LANG": "zh_CN"}, "zh"),
        ({"LANG": "C"}, "en"),
    ],
)
def test_the_language_is_that_of_the_setting_or_the_locale(
    set_to: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (language.CHOICE, *language.LOCALES):
        monkeypatch.delenv(name, raising=False)
    for name, value in set_to.items():
        monkeypatch.setenv(name, value)
    assert language.language() == expected
    assert language.both("猫", "cat") == ("猫" if expected == "zh" else "cat")


def test_a_stream_that_cannot_write_chinese_gets_english(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(language.CHOICE, "zh")
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    assert language.language() == "en"
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="gbk"))
    assert language.language() == "zh"


def test_another_language_is_refused_in_a_sentence() -> None:
    done = run("models", CN_CLIP_LANG="fr")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: CN_CLIP_LANG: expected zh or en, got 'fr'\n"


# --- the catalogue


@pytest.fixture
def words(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """A catalogue of the test's own, in Chinese."""
    known: dict[str, str] = {}
    monkeypatch.setenv(language.CHOICE, "zh")
    monkeypatch.setattr(language, "catalogue", lambda: known)
    monkeypatch.setattr(language, "templates", language.templates.__wrapped__)
    return known


def test_values_take_their_places_in_the_chinese(words: dict[str, str]) -> None:
    words["{}: expected {} columns, got {}"] = "{0}：应有 {1} 列，实际为 {2} 列"
    assert language.translated("t.tsv: expected 3 columns, got 2") == "t.tsv：应有 3 列，实际为 2 列"
    assert language.translated("expected 3 columns") == "expected 3 columns"


def test_the_sentence_with_more_text_of_its_own_counts(words: dict[str, str]) -> None:
    words |= {"expected {}": "应为 {0}", "expected {} or less": "最多为 {0}"}
    assert language.translated("expected 3 or less") == "最多为 3"


def test_values_are_translated_if_they_are_sentences(words: dict[str, str]) -> None:
    words |= {"{}: expected {}, got {}": "{0}：应为{1}，实际为 {2}", "at least {}": "至少 {0}"}
    assert language.translated("--k: expected at least 1, got 0") == "--k：应为至少 1，实际为 0"
    assert language.translated("--k: expected at least, got 0") == "--k：应为at least，实际为 0"


def test_advice_at_the_end_of_a_value_is_translated(words: dict[str, str]) -> None:
    words["{}: unknown; expected one of {}{}"] = "{0}：不认识；可选：{1}{2}"
    words["; did you mean {}?"] = "；是否想写 {0}？"
    assert language.translated("x: unknown; expected one of a, b; did you mean 'a'?") == (
        "x：不认识；可选：a, b；是否想写 'a'？"
    )


def test_a_reason_and_a_next_step_may_come_from_two_sentences(words: dict[str, str]) -> None:
    words |= {"no such folder": "没有这个文件夹", "check the path": "请检查路径"}
    assert language.translated("a/b: no such folder; check the path") == "a/b: 没有这个文件夹；请检查路径"
    assert language.translated("no such folder; ask again") == "no such folder; ask again"  # never half and half


def test_braces_of_a_sentence_are_text(words: dict[str, str]) -> None:
    words["each with one {}: {} is not"] = "每行一个 {0}，而 {1} 不是"
    assert language.translated('each with one {}: {"a": "{0}"} is not') == '每行一个 {}，而 {"a": "{0}"} 不是'


def test_where_an_error_is_stays_and_the_rest_is_told(words: dict[str, str]) -> None:
    words |= {"expected a list of int, got {}": "应为整数列表，实际为 {0}", "image id {}": "图片 {0}"}
    error = DataError("expected a list of int, got 'x'", at=Where("a: b.jsonl", line=7, field="image_ids"))
    assert error.sentence == "expected a list of int, got 'x'"
    assert str(error) == "a: b.jsonl:7 image_ids: expected a list of int, got 'x'"
    assert terminal.told(error) == "a: b.jsonl:7 image_ids: 应为整数列表，实际为 'x'"
    assert terminal.told(DataError("expected a list of int, got 1", at=Where("l", part="image id 3"))) == (
        "l: 图片 3: 应为整数列表，实际为 1"
    )
    assert terminal.told(ConfigError("unknown")) == "unknown"


def test_a_long_hostile_text_is_matched_in_time(words: dict[str, str]) -> None:
    words["{} a {} a {} a {} a {} a {} a {} b"] = "{0}"
    began = time.perf_counter()
    assert language.translated("x a " * 5000 + "c; " * 2000).startswith("x a x")
    assert time.perf_counter() - began < 5


def test_every_sentence_of_the_catalogue_is_found() -> None:
    for english, chinese in language.catalogue().items():
        filled = count_languages.filled(english)
        values = language.values_of(language.cut(english), filled)
        assert values is not None, english
        assert "".join(values) == "".join(f"<{number}>" for number in range(len(values)))
        assert language.chinese(filled) == language.filled(chinese, values), english


def test_a_sentence_that_fits_anything_is_taken_only_if_what_it_holds_is_known(words: dict[str, str]) -> None:
    words |= {"{}, got {}": "{0}，实际为 {1}", "expected a list": "应为列表"}
    assert language.translated("expected a list, got 3") == "应为列表，实际为 3"
    assert language.translated("the disk was lost, got nothing") == "the disk was lost, got nothing"


def test_what_is_proposed_is_a_value_of_its_own(words: dict[str, str]) -> None:
    words |= {"unknown {}; expected one of {}{}": "没有 {0}；可用的有 {1}{2}", "; did you mean {}?": "；是否想用 {0}？"}
    assert language.translated("unknown x; expected one of y, z; did you mean 'y'?") == (
        "没有 x；可用的有 y, z；是否想用 'y'？"
    )
    assert language.translated("unknown x; expected one of y, z") == "没有 x；可用的有 y, z"


@pytest.mark.parametrize("path", sorted(language.CATALOGUE.glob("*.json")), ids=lambda path: path.stem)
def test_the_catalogue_is_in_order(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    known = json.loads(text)
    assert text == json.dumps(dict(sorted(known.items())), ensure_ascii=False, indent=1) + "\n"
    for english, chinese in known.items():
        assert any("一" <= one <= "鿿" for one in chinese), english
        assert set(language.numbers(chinese)) <= set(range(english.count("{}"))), english


def test_the_catalogue_has_no_sentence_that_the_source_lost() -> None:
    assert len(count_languages.stale()) <= MOST_STALE


def test_help_and_errors_have_chinese() -> None:
    """`python tools/count_languages.py --missing ROOM` prints those of a room that lack it."""
    shares = count_languages.shares()
    for kind, least in LEAST.items():
        have, total = shares[kind]
        assert have / total >= least, f"{kind}: {have} of {total}"


# --- on a terminal


@pytest.mark.parametrize(
    ("text", "cells", "expected"),
    [
        ("one two three", 8, ["one two", "three"]),
        ("图片和文字，各一行。", 10, ["图片和文", "字，各一", "行。"]),
        ("一个（可选）参数", 8, ["一个（可", "选）参数"]),
        ("{alpha,beta,gamma}", 12, ["{alpha,beta,", "gamma}"]),
        ("abcdefghij", 4, ["abcd", "efgh", "ij"]),
        ("", 10, [""]),
    ],
)
def test_text_is_wrapped_by_cells(text: str, cells: int, expected: list[str]) -> None:
    assert terminal.wrap(text, cells) == expected
    assert all(cells_of(line) <= cells for line in expected)


@pytest.mark.parametrize("chosen", ["zh", "en"])
@pytest.mark.parametrize("columns", [40, 80])
def test_help_fits_the_terminal(
    chosen: str, columns: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(language.CHOICE, chosen)
    monkeypatch.setenv("COLUMNS", str(columns))
    for name, command in count_languages.cli.COMMANDS.items():
        text = help_page.page(help_page.of(importlib.import_module(command.module).Options))
        assert max(cells_of(line) for line in text.splitlines()) <= columns, name
        assert "\x1b" not in text


def test_an_error_is_one_line_in_the_readers_language() -> None:
    for chosen, begins in (
        ("zh", "错误：没有命令 'modles'；是否想用"),
        ("en", "error: no command 'modles'; did you mean"),
    ):
        done = run("modles", CN_CLIP_LANG=chosen)
        assert done.returncode == 2
        (line,) = done.stderr.splitlines()
        assert line.startswith(begins)


def test_what_the_parser_refuses_is_one_sentence_with_the_next_step() -> None:
    lines = {
        ("topk",): "missing: --image-feats, --text-feats, --output; each is required; see `cn-clip topk --help`",
        ("models", "--jason"): "--jason: no such option or argument; did you mean --json? See `cn-clip models --help`",
        ("demo", "--steps", "x"): "--steps: expected a whole number, got 'x'; see `cn-clip demo --help`",
        ("demo", "--steps"): "--steps: expected a value; see `cn-clip demo --help`",
        ("demo", "--steps", "-1"): "--steps: expected at least 0, got -1",
        ("topk", "--query", "txt"): "--query: expected one of text, image, got 'txt'; did you mean text? "
        "See `cn-clip topk --help`",
    }
    for words, expected in lines.items():
        done = run(*words)
        assert (done.returncode, done.stdout, done.stderr) == (2, "", f"error: {expected}\n")


CHINESE = {
    ("topk",): "缺少必填的 --image-feats, --text-feats, --output；用法见 `cn-clip topk --help`",
    ("demo", "--steps", "x"): "--steps：应为整数，实际为 'x'；用法见 `cn-clip demo --help`",
    ("demo", "--steps", "-1"): "--steps：应不小于 0，实际为 -1",
    (
        "topk",
        "--query",
        "txt",
    ): "--query：应为 text, image 之一，实际为 'txt'；是否想用 text？用法见 `cn-clip topk --help`",
    ("models", "--jason"): "--jason：没有这个选项或参数；是否想用 --json？用法见 `cn-clip models --help`",
    ("checkpoint", "info", "nothing.pt"): "nothing.pt: 没有这个文件；请给出检查点的路径或模型名",
    (
        "search",
        "nothing.index",
        "猫",
    ): "nothing.index: 不是索引；建立一个：cn-clip index build PICTURES --output nothing.index",
    ("download", "ViT-B16", "--json"): "；是否想用 'ViT-B-16'？",
}


@pytest.mark.parametrize("words", CHINESE, ids=" ".join)
def test_what_a_beginner_meets_is_one_chinese_sentence(words: tuple[str, ...], tmp_path: Path) -> None:
    done = run(*words, CN_CLIP_LANG="zh")
    assert (done.returncode, done.stdout) in ((1, ""), (2, ""))
    (line,) = done.stderr.splitlines()
    assert line.startswith("错误：")
    assert line.endswith(CHINESE[words])


@pytest.mark.parametrize("chosen", ["zh", "en"])
def test_a_hub_name_that_does_not_exist_is_one_sentence_with_the_next_step(chosen: str) -> None:
    """Nothing listens at the address of the hub, so it cannot be reached."""
    words = ("features", "--model", "OFA-Sys/chinese-clip-vit-base-patch99", "--extract-text-feats", "--text-data", "t")
    done = run(*words, CN_CLIP_LANG=chosen, HF_ENDPOINT="http://127.0.0.1:9", HF_HUB_OFFLINE="0")
    assert done.returncode == 1
    line = done.stderr.splitlines()[-1]
    if chosen == "zh":
        assert line.startswith("错误：OFA-Sys/chinese-clip-vit-base-patch99：这里没有这个文件夹")
        assert line.endswith("；请给出本机的文件夹，或用 HF_ENDPOINT 指定镜像")
    else:
        assert line.startswith("error: OFA-Sys/chinese-clip-vit-base-patch99: no such folder here")
        assert line.endswith("; give a local folder, or set HF_ENDPOINT to a mirror")


def test_the_locale_c_gets_readable_english() -> None:
    """In ASCII, whatever the language is set to."""
    for environment in ({"LC_ALL": "C", "CN_CLIP_LANG": ""}, {"CN_CLIP_LANG": "zh", "PYTHONIOENCODING": "ascii"}):
        for words in ((), ("topk", "--help"), ("modles",)):
            done = run(*words, python=sys.executable, **environment)
            printed = done.stdout + done.stderr
            assert printed.isascii(), printed
            assert "\\u" not in printed
            assert printed


@pytest.mark.parametrize("chosen", ["zh", "en"])
def test_nothing_is_coloured_in_a_pipe(chosen: str) -> None:
    for words in ((), ("index", "build", "--help"), ("topk",)):
        done = run(*words, CN_CLIP_LANG=chosen, COLUMNS="40")
        assert "\x1b" not in done.stdout + done.stderr
