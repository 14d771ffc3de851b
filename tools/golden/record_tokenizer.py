"""Records `tests/golden/tokenizer/ids.json.gz`: what Chinese-CLIP 1.6 makes of 15,000 fuzzed strings.

Run with a Python that has Chinese-CLIP installed: `python tools/golden/record_tokenizer.py`.
The tests take `fuzzed_strings` from here, so the file holds ids only: a digest per block of strings, and the first
blocks in full, to explain a failure.
"""

import gzip
import hashlib
import importlib.util
import json
import random
import runpy
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

GOLDEN_FILE = Path(__file__).resolve().parents[2] / "tests" / "golden" / "tokenizer" / "ids.json.gz"
SEED = 20221103
NUM_STRINGS = 15_000
BLOCK = 100
FULL_BLOCKS = 6
CONTEXT_LENGTHS = (52, 3, 4, 77, 5, 24, 512, 52, 7)

# Only characters as old as Unicode 13 that have not changed since: the answer is the same on Python 3.10 to 3.13.
RANGES = {
    "ascii": [(0x20, 0x7E)],
    "digits": [(0x30, 0x39)],
    "lower": [(0x61, 0x7A)],
    "upper": [(0x41, 0x5A)],
    "latin with accents": [(0xC0, 0x24F), (0x1E00, 0x1EF9)],
    "combining accents": [(0x300, 0x34E)],
    "greek and cyrillic": [(0x386, 0x38A), (0x391, 0x3A1), (0x3A3, 0x3CE), (0x400, 0x45F)],
    "hebrew, arabic, thai": [(0x5D0, 0x5EA), (0x621, 0x652), (0xE01, 0xE3A)],
    "common han": [(0x4E00, 0x9FA5)],
    "first han": [(0x4E00, 0x4FFF), (0x5927, 0x5999)],
    "rare han": [
        (0x3400, 0x4DB5),
        (0x20000, 0x2A6D6),
        (0x2A700, 0x2B734),
        (0x2B740, 0x2B81D),
        (0x2B820, 0x2CEA1),
        (0x2F800, 0x2FA1D),
        (0xF900, 0xFA2D),
        (0x30000, 0x3134A),
    ],
    "cjk punctuation": [(0x3000, 0x303F)],
    "full-width forms": [(0xFF01, 0xFF5E), (0xFFE0, 0xFFE6)],
    "kana": [(0x3041, 0x3096), (0x3099, 0x30FF), (0xFF65, 0xFF9F)],
    "hangul": [(0xAC00, 0xD7A3), (0x1100, 0x1112), (0x3131, 0x3163)],
    "punctuation": [(0x2010, 0x205E), (0xA1, 0xBF), (0x20A0, 0x20BF), (0x2E00, 0x2E2E), (0xFE30, 0xFE4F)],
    "symbols": [(0x2190, 0x23FA), (0x2460, 0x24FF), (0x2500, 0x27BF), (0x3220, 0x3243), (0x1D400, 0x1D454)],
    "emoji": [(0x1F300, 0x1F5FF), (0x1F600, 0x1F64F), (0x1F680, 0x1F6C5), (0x1F910, 0x1F93A), (0x1F1E6, 0x1F1FF)],
    "control": [(0x00, 0x1F), (0x7F, 0x9F)],
    "blanks": [
        *[(0x09, 0x0D), (0x1C, 0x20), (0x85, 0x85), (0xA0, 0xA0), (0x1680, 0x1680), (0x2000, 0x200A)],
        *[(0x2028, 0x2029), (0x202F, 0x202F), (0x205F, 0x205F), (0x3000, 0x3000)],
    ],
    "format": [
        *[(0xAD, 0xAD), (0x200B, 0x200F), (0x202A, 0x202E), (0x2060, 0x2064), (0xFEFF, 0xFEFF)],
        *[(0xFE00, 0xFE0F), (0xE0020, 0xE007F)],
    ],
    "private use": [(0xE000, 0xF8FF), (0xF0000, 0xF00FF), (0x10FF00, 0x10FFFD)],
    "surrogates and never assigned": [(0xD800, 0xDFFF), (0xFDD0, 0xFDEF), (0xFFFD, 0xFFFF), (0x1FFFE, 0x1FFFF)],
}
FRAGMENTS = (
    *("[SEP]", "[PAD]", "[MASK]", "[CLS]", "[UNK]", "[unused1]", "##", "##ing", "\ufffd", "\x00", "\r\n"),
    *("\U0001f469\u200d\U0001f469\u200d\U0001f467", "\U0001f3f3\ufe0f\u200d\U0001f308"),  # joined: a family, a flag
    *("\U0001f44d\U0001f3fd", "\U0001f1e8\U0001f1f3", "\u2764\ufe0f", "1\ufe0f\u20e3", "がぎ", "か\u3099", "한국어"),
    *("ΟΔΥΣΣΕΥΣ", "ΣΑΣ Σ", "Σ.", "İstanbul", "ı", "ẞ", "straße", "ﬁ", "①", "㈱", "\u212b", "ά", "Ǆ", "\u1fef"),
    *("unaffable", "it's", "don't", "U.S.A.", "3.14", "2,000", "http://a.b/c?d=e", "facebook", "iPhone14"),
    *("杰尼龟", "妙蛙种子", "，", "。", "“两只狗”", "……", "——", "《》", "１２３", "ＡＢＣ", "𠮷野家", "龥", "鿃"),
    *("a" * 150, "b" * 199, "c" * 200, "d" * 201, "e" * 250, "é" * 100 + "f" * 100, "Ｇ" * 201, "각" * 67, "が" * 200),
)


def fuzzed_strings(count: int = NUM_STRINGS, seed: int = SEED) -> list[str]:
    """The same strings on every Python: `random()` is the one method whose sequence Python promises to keep."""
    rng = random.Random(seed)
    return [*FRAGMENTS, "", " ", *(_string(rng) for _ in range(count))][:count]


def _string(rng: random.Random) -> str:
    """1 to 40 parts: runs of one class of characters, fixed fragments, blanks."""
    num_parts = 1 + int(40 * rng.random() ** 3)
    classes = [_pick(rng, list(RANGES)) for _ in range(1 + int(4 * rng.random()))]
    return "".join(_part(rng, classes) for _ in range(num_parts))


def _part(rng: random.Random, classes: list[str]) -> str:
    kind = rng.random()
    if kind < 0.1:
        return str(_pick(rng, FRAGMENTS))
    if kind < 0.2:
        return " "
    ranges = RANGES[_pick(rng, classes)]
    return "".join(_character(rng, ranges) for _ in range(1 + int(8 * rng.random() ** 2)))


def _character(rng: random.Random, ranges: list[tuple[int, int]]) -> str:
    low, high = _pick(rng, ranges)
    return chr(low + int((high - low + 1) * rng.random()))


def _pick(rng: random.Random, choices: Any) -> Any:
    return choices[int(len(choices) * rng.random())]


def context_length_of(index: int) -> int:
    """The context_length that string number `index` is cut to."""
    return CONTEXT_LENGTHS[index % len(CONTEXT_LENGTHS)]


def digest(rows: list[list[int]]) -> str:
    """A digest of one block of rows of ids."""
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def blocks(rows: list[list[int]]) -> list[list[list[int]]]:
    return [rows[start : start + BLOCK] for start in range(0, len(rows), BLOCK)]


def main() -> None:
    rows = [_reference_row(text, context_length_of(index)) for index, text in enumerate(fuzzed_strings())]
    answer = {"digests": [digest(block) for block in blocks(rows)], "rows": rows[: FULL_BLOCKS * BLOCK]}
    GOLDEN_FILE.parent.mkdir(parents=True, exist_ok=True)
    GOLDEN_FILE.write_bytes(gzip.compress(json.dumps(answer).encode(), mtime=0))
    print(f"{GOLDEN_FILE}: {len(rows)} strings, {GOLDEN_FILE.stat().st_size} bytes")


def _reference_row(text: str, context_length: int) -> list[int]:
    """[CLS] ids [SEP] as Chinese-CLIP's `tokenize` builds them, before padding."""
    tokenizer = _reference_tokenizer()
    ids = tokenizer.convert_tokens_to_ids(tokenizer.tokenize(text))
    return [tokenizer.vocab["[CLS]"], *ids[: context_length - 2], tokenizer.vocab["[SEP]"]]


@lru_cache(maxsize=1)
def _reference_tokenizer() -> Any:
    """Chinese-CLIP's tokenizer from its file alone: importing the package would need torchvision."""
    package = importlib.util.find_spec("cn_clip")
    folder = Path(package.submodule_search_locations[0]) / "clip" if package else Path("absent")
    if not (folder / "bert_tokenizer.py").exists() or (folder / "tokenizer.py").exists():
        raise SystemExit(f"expected Chinese-CLIP 1.6 as the installed cn_clip of {sys.executable}, found {package}")
    return runpy.run_path(str(folder / "bert_tokenizer.py"))["FullTokenizer"]()


if __name__ == "__main__":
    main()
