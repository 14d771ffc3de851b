"""The tokenizer gives Chinese-CLIP's ids for any string, by either of its two paths."""

import gzip
import json
import os
import pickle
import re
import runpy
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cn_clip.clip.bert_tokenizer import BasicTokenizer, FullTokenizer, WordpieceTokenizer
from cn_clip.clip.tokenizer import FAST_CHARACTERS, Tokenizer, basic_words, encode, pad, tokenize, vocab
from cn_clip.errors import ConfigError, DataError

ROOT = Path(__file__).parent.parent
RECORDER = runpy.run_path(str(ROOT / "tools" / "golden" / "record_tokenizer.py"))
CLS, SEP, UNK = 101, 102, 100
SHARED = Tokenizer()


@pytest.fixture(scope="module")
def fuzzed() -> list[str]:
    return RECORDER["fuzzed_strings"]()


def _fast_characters() -> list[str]:
    allowed = re.compile(f"[{FAST_CHARACTERS}]")
    return [char for char in map(chr, range(sys.maxunicode + 1)) if allowed.match(char)]


def _rows(texts: list[str]) -> list[list[int]]:
    """What `tokenize` gives each text at its context length, padding cut off and checked."""
    rows = []
    for index, text in enumerate(texts):
        length = RECORDER["context_length_of"](index)
        tensor = tokenize(text, length)
        assert tensor.shape == (1, length)
        row = tensor[0].tolist()
        end = row.index(SEP) + 1
        assert not any(row[end:])
        rows.append(row[:end])
    return rows


def test_15000_fuzzed_strings_have_the_ids_of_the_reference(fuzzed: list[str]) -> None:
    golden = json.loads(gzip.decompress(RECORDER["GOLDEN_FILE"].read_bytes()))
    assert len(set(fuzzed)) >= 10_000
    rows = _rows(fuzzed)
    for text, row, expected in zip(fuzzed, rows, golden["rows"], strict=False):
        assert row == expected, ascii(text)
    assert [RECORDER["digest"](block) for block in RECORDER["blocks"](rows)] == golden["digests"]


def test_the_exact_path_alone_has_the_ids_of_the_reference(fuzzed: list[str]) -> None:
    golden = json.loads(gzip.decompress(RECORDER["GOLDEN_FILE"].read_bytes()))
    rows = [
        [CLS, *SHARED.exact_ids(text)[: RECORDER["context_length_of"](index) - 2], SEP]
        for index, text in enumerate(fuzzed)
    ]
    assert [RECORDER["digest"](block) for block in RECORDER["blocks"](rows)] == golden["digests"]


def test_every_fast_character_has_equal_ids_by_both_paths() -> None:
    characters = _fast_characters()
    assert len(characters) > 21_000
    differing = []
    for char in characters:
        text = f"a{char}b {char} {char}{char} 中{char}9 {char}A É{char}"
        if SHARED.fast_ids(text) != SHARED.exact_ids(text):
            differing.append(hex(ord(char)))
    assert differing == []


@settings(max_examples=400, deadline=None)
@given(st.text(st.sampled_from(_fast_characters()) | st.sampled_from("aB9中。 ＡÉが"), max_size=80))
def test_both_paths_agree_on_strings_of_fast_characters(text: str) -> None:
    assert SHARED.ids(text) == SHARED.fast_ids(text) == SHARED.exact_ids(text)


@settings(max_examples=400, deadline=None)
@given(st.text(st.characters() | st.sampled_from("aB9中。 ＡÉ\u0301"), max_size=80))
def test_the_dispatch_agrees_with_the_exact_path_on_any_string(text: str) -> None:
    assert SHARED.ids(text) == SHARED.exact_ids(text)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Two dogs，running", ["two", "dogs", "，", "running"]),
        ("两只狗run", ["两", "只", "狗", "run"]),
        ("[SEP]", ["[", "sep", "]"]),
        ("Café ÎLE", ["cafe", "ile"]),
        ("İ", ["i"]),
        ("ΟΔΟΣ ΣΑΣ.", ["οδος", "σας", "."]),
        ("a\u2028b\x1cc\x85d\u3000e", ["a", "bcd", "e"]),
        ("\ue000x\x00y\u200dz\ufffd", ["\ue000xyz"]),
        ("\U0002b81f\U0002b820\U0002ceb0", ["\U0002b81f", "\U0002b820", "\U0002ceb0"]),
        ("\u1fef", ["`"]),
        ("\ud800", ["\ud800"]),
        ("\u0301", []),
        ("한", ["\u1112\u1161\u11ab"]),
    ],
)
def test_words_by_the_rules(text: str, words: list[str]) -> None:
    assert basic_words(text) == words


def test_case_and_accents_stay_when_lower_is_off() -> None:
    assert basic_words("Café，A", lower=False) == ["Café", "，", "A"]


def test_a_word_of_200_letters_is_split_and_one_of_201_is_unknown() -> None:
    assert UNK not in SHARED.exact_ids("a" * 200)
    assert SHARED.exact_ids("a" * 201) == SHARED.fast_ids("a" * 201) == [UNK]
    assert SHARED.ids("é" * 200) == SHARED.ids("e" * 200)


def test_ids_of_the_guide_texts() -> None:
    expected = [
        [101, 3345, 2225, 7991, 102, 0, 0, 0],
        [101, 1975, 6032, 4905, 2094, 102, 0, 0],
        [101, 2207, 4125, 7987, 102, 0, 0, 0],
        [101, 4649, 1305, 687, 102, 0, 0, 0],
    ]
    texts = ["杰尼龟", "妙蛙种子", "小火龙", "皮卡丘"]
    assert [row[:8] for row in tokenize(texts).tolist()] == expected
    assert tokenize(texts).shape == (4, 52)
    assert tokenize(texts).dtype == torch.int64


def test_an_empty_text_is_two_ids_and_an_empty_list_no_row() -> None:
    assert tokenize("", 4).tolist() == [[CLS, SEP, 0, 0]]
    assert tokenize([], 7).shape == (0, 7)
    assert tokenize([]).dtype == torch.int64


def test_long_text_is_cut_and_keeps_its_end() -> None:
    assert encode("狗" * 600, 5) == [[CLS, 4318, 4318, 4318, SEP]]
    assert encode("狗", 2) == [[CLS, SEP]]
    assert len(encode("狗" * 600, 600)[0]) == 600


def test_pad_fills_with_zeros_and_refuses_a_row_that_does_not_fit() -> None:
    assert pad([[1, 2], [], [3]], 3).tolist() == [[1, 2, 0], [0, 0, 0], [3, 0, 0]]
    with pytest.raises(ConfigError, match="3 token ids does not fit a length of 2"):
        pad([[1, 2, 3]], 2)


def test_any_iterable_of_str_is_taken() -> None:
    assert encode(text for text in ("狗", "猫")) == encode(("狗", "猫")) == [[CLS, 4318, SEP], [CLS, 4344, SEP]]


@pytest.mark.parametrize("length", [1, 0, -3, 3.5, None, "52"])
def test_a_context_length_without_room_is_refused(length: object) -> None:
    with pytest.raises(ConfigError, match="context_length: expected an integer of at least 2"):
        tokenize("狗", length)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["狗", None], r"texts\[1\]: expected a str, got NoneType"),
        ([3], r"texts\[0\]: expected a str, got int"),
        (["狗", b"dog"], r"texts\[1\]: expected a str, got bytes"),
        (b"dog", "texts: expected a str or a list of str, got bytes"),
        (None, "texts: expected a str or a list of str, got NoneType"),
    ],
)
def test_wrong_input_names_its_place(texts: object, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        tokenize(texts)  # type: ignore[arg-type]


def test_vocabulary_is_a_copy_with_the_ids_of_the_file() -> None:
    words = vocab()
    assert len(words) == 21_128
    assert [words[token] for token in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")] == [0, 100, 101, 102, 103]
    assert words[""] == 343  # a line separator in the file, stripped
    words.clear()
    assert len(vocab()) == 21_128


def test_the_last_of_equal_lines_counts(tmp_path: Path) -> None:
    file = tmp_path / "vocab.txt"
    file.write_text("[UNK]\n[CLS]\n[SEP]\na\n a \nb", encoding="utf-8")
    assert FullTokenizer(file).vocab == {"[UNK]": 0, "[CLS]": 1, "[SEP]": 2, "a": 4, "b": 5}


def test_a_file_that_is_no_vocabulary_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "vocab.txt"
    file.write_text("a\nb\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"vocab.txt: not a BERT vocabulary, \[UNK\], \[CLS\], \[SEP\] is missing"):
        Tokenizer(file).ids("a")
    with pytest.raises(DataError, match="cannot be read as a vocabulary"):
        Tokenizer(tmp_path).ids("a")


def test_a_used_tokenizer_can_be_pickled() -> None:
    SHARED.ids("狗")
    copy = pickle.loads(pickle.dumps(SHARED))
    assert copy.ids("狗 dog é") == SHARED.ids("狗 dog é")
    assert len(pickle.dumps(SHARED)) < 1000


def test_threads_share_one_tokenizer() -> None:
    texts = [f"狗{number} ém" for number in range(200)]
    expected = [SHARED.exact_ids(text) for text in texts]
    fresh, answers = Tokenizer(), {}
    threads = [
        threading.Thread(target=lambda n=n: answers.update({n: [fresh.ids(text) for text in texts]})) for n in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(answers[number] == expected for number in range(8))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
def test_forked_workers_tokenize_in_silence() -> None:
    program = """
import os, sys
from cn_clip.clip.tokenizer import encode
before = encode(["两只狗"] * 5000)
child = os.fork()
if child == 0:
    os._exit(0 if encode(["两只狗"] * 5000) == before else 3)
assert os.waitpid(child, 0)[1] == 0
assert "TOKENIZERS_PARALLELISM" not in os.environ
"""
    environment = {key: value for key, value in os.environ.items() if key != "TOKENIZERS_PARALLELISM"}
    environment["PYTHONPATH"] = str(ROOT)
    # Python 3.12 warns of any fork beside threads, such as torch's; the claim here is about tokenizers.
    command = [sys.executable, "-W", "ignore", "-c", program]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")


def test_importing_reads_no_vocabulary_and_no_rust() -> None:
    program = (
        "import sys, cn_clip.clip.tokenizer as t; print('tokenizers' in sys.modules, t._default.cache_info().currsize)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["False", "0"], done.stderr


def test_full_tokenizer_keeps_the_interface_of_the_reference() -> None:
    full = FullTokenizer()
    tokens = full.tokenize("两只狗 unaffable，[SEP]")
    assert tokens == ["两", "只", "狗", "u", "##na", "##ff", "##able", "，", "[", "sep", "]"]
    ids = full.convert_tokens_to_ids(tokens)
    assert ids == SHARED.ids("两只狗 unaffable，[SEP]")
    assert full.convert_ids_to_tokens(ids) == tokens
    assert full.vocab_size() == len(full.inv_vocab) == 21_128
    with pytest.raises(KeyError):
        full.convert_tokens_to_ids(["no such token"])


def test_full_tokenizer_joins_pieces_as_the_reference_does() -> None:
    join = FullTokenizer.convert_tokens_to_string
    assert join(["una", "##ff", "##able", ",", "it", "'s", "."]) == "unaffable, it's."
    assert join(["do", "n't", "!"], clean_up_tokenization_spaces=False) == "do n't !"
    assert join([]) == ""


def test_parts_of_the_reference_tokenizer_work_alone() -> None:
    assert BasicTokenizer(do_lower_case=False).tokenize("A狗") == ["A", "狗"]
    pieces = WordpieceTokenizer({"un": 0, "##able": 1}, unk_token="?", max_input_chars_per_word=6)
    assert pieces.tokenize("unable un unablex") == ["un", "##able", "un", "?"]
    assert pieces.tokenize("unx") == ["?"]
