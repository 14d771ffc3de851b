"""The import path and names of Chinese-CLIP's tokenizer (`FullTokenizer`), over `cn_clip.clip.tokenizer`."""

import re
from collections import OrderedDict
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from cn_clip.clip.tokenizer import (
    MAX_WORD_CHARS,
    UNKNOWN,
    VOCAB_FILE,
    basic_words,
    cleaned,
    punctuation_apart,
    read_vocab,
    without_accents,
    word_pieces,
)

__all__ = [
    "BasicTokenizer",
    "FullTokenizer",
    "WordpieceTokenizer",
    "convert_by_vocab",
    "convert_ids_to_tokens",
    "convert_to_unicode",
    "convert_tokens_to_ids",
    "default_vocab",
    "load_vocab",
    "printable_text",
    "validate_case_matches_checkpoint",
    "whitespace_tokenize",
]

# Left to right: the order matters where one spelling contains another.
_ENGLISH_SPACING = (
    (" .", "."),
    (" ?", "?"),
    (" !", "!"),
    (" ,", ","),
    (" ' ", "'"),
    (" n't", "n't"),
    (" 'm", "'m"),
    (" 's", "'s"),
    (" 've", "'ve"),
    (" 're", "'re"),
)


def default_vocab() -> str:
    """The path of the vocabulary in the package."""
    return str(VOCAB_FILE)


def load_vocab(vocab_file: str | Path) -> "OrderedDict[str, int]":
    """Token to line number, from 0, of any text file in UTF-8. Raises what opening and decoding raise."""
    return OrderedDict(read_vocab(vocab_file))


def convert_to_unicode(text: str | bytes) -> str:
    """Bytes decoded as UTF-8, what is not UTF-8 left out; a str as it is. Raises ValueError for anything else."""
    if isinstance(text, bytes):
        return text.decode("utf-8", "ignore")
    if not isinstance(text, str):
        raise ValueError(f"text: expected a str or bytes, got {type(text).__name__}")
    return text


printable_text = convert_to_unicode


def whitespace_tokenize(text: str) -> list[str]:
    """The words between blanks."""
    return text.split()


def convert_by_vocab(vocab: Mapping[Any, Any], items: Iterable[Any]) -> list[Any]:
    """What `vocab` has for each item. Raises KeyError for an item it does not hold."""
    return [vocab[item] for item in items]


def convert_tokens_to_ids(vocab: Mapping[str, int], tokens: Iterable[str]) -> list[int]:
    """As `convert_by_vocab`."""
    return convert_by_vocab(vocab, tokens)


def convert_ids_to_tokens(inv_vocab: Mapping[int, str], ids: Iterable[int]) -> list[str]:
    """As `convert_by_vocab`."""
    return convert_by_vocab(inv_vocab, ids)


def validate_case_matches_checkpoint(do_lower_case: bool, init_checkpoint: str | None) -> None:
    """Raises ValueError if a checkpoint of Google's BERT, known by its folder, was trained on the other case."""
    found = re.match(r".*?([A-Za-z0-9_-]+)/bert_model.ckpt", init_checkpoint or "")
    is_lower = _IS_LOWER_CASE.get(found[1]) if found else None
    if is_lower is not None and is_lower != bool(do_lower_case):
        raise ValueError(
            f"do_lower_case={bool(do_lower_case)}: {init_checkpoint} was trained on "
            f"{'lower-case' if is_lower else 'cased'} text; pass do_lower_case={is_lower}"
        )


# By the names of Google's BERT checkpoints.
_IS_LOWER_CASE = {
    "uncased_L-24_H-1024_A-16": True,
    "uncased_L-12_H-768_A-12": True,
    "multilingual_L-12_H-768_A-12": True,
    "chinese_L-12_H-768_A-12": True,
    "cased_L-12_H-768_A-12": False,
    "cased_L-24_H-1024_A-16": False,
    "multi_cased_L-12_H-768_A-12": False,
}


def _is_whitespace(char: str) -> bool:
    return cleaned(char) == " "


def _is_control(char: str) -> bool:
    return cleaned(char) == "" and char != "\ufffd"


def _is_punctuation(char: str) -> bool:
    return punctuation_apart(char) != char


class BasicTokenizer:
    """Text to words: cleaned, split at blanks, Han characters and punctuation."""

    def __init__(self, do_lower_case: bool = True) -> None:
        self.do_lower_case = do_lower_case

    def tokenize(self, text: str | bytes) -> list[str]:
        """The words of a text; a Chinese character is a word."""
        return basic_words(convert_to_unicode(text), lower=self.do_lower_case)

    # The steps by themselves, under the names of Chinese-CLIP.

    def _clean_text(self, text: str) -> str:
        return "".join(char if self._is_chinese_char(ord(char)) else cleaned(char) for char in text)

    def _tokenize_chinese_chars(self, text: str) -> str:
        return "".join(cleaned(char) if self._is_chinese_char(ord(char)) else char for char in text)

    def _is_chinese_char(self, cp: int) -> bool:
        return cleaned(chr(cp)) == f" {chr(cp)} "

    def _run_strip_accents(self, text: str) -> str:
        return without_accents(text)

    def _run_split_on_punc(self, text: str) -> list[str]:
        marked = "".join(f"\0{char}\0" if _is_punctuation(char) else char for char in text)
        return [part for part in marked.split("\0") if part]


class WordpieceTokenizer:
    """Words between blanks to the longest pieces of a vocabulary."""

    def __init__(
        self,
        vocab: Collection[str],
        unk_token: str = UNKNOWN,
        max_input_chars_per_word: int = MAX_WORD_CHARS,
    ) -> None:
        self.vocab = vocab
        self.unk_token = unk_token
        self.max_input_chars_per_word = max_input_chars_per_word

    @cached_property
    def _longest(self) -> int:
        return max(map(len, self.vocab), default=0)

    def tokenize(self, text: str | bytes) -> list[str]:
        """The pieces of words that blanks separate; a word that has none is the unknown token."""
        limit = self.max_input_chars_per_word
        return [
            piece
            for word in convert_to_unicode(text).split()
            for piece in word_pieces(word, self.vocab, longest=self._longest, unknown=self.unk_token, max_chars=limit)
        ]


class FullTokenizer:
    """Text to word pieces and ids. The vocabulary file is read on first use."""

    def __init__(self, vocab_file: str | Path = VOCAB_FILE, do_lower_case: bool = True) -> None:
        self.vocab_file = vocab_file
        self.basic_tokenizer = BasicTokenizer(do_lower_case)

    @cached_property
    def vocab(self) -> dict[str, int]:
        """Token -> id."""
        return load_vocab(self.vocab_file)

    @cached_property
    def inv_vocab(self) -> dict[int, str]:
        """Id -> token."""
        return {number: token for token, number in self.vocab.items()}

    @cached_property
    def wordpiece_tokenizer(self) -> WordpieceTokenizer:
        """What cuts words into pieces of the vocabulary."""
        return WordpieceTokenizer(self.vocab)

    def tokenize(self, text: str | bytes) -> list[str]:
        """The word pieces of a text, without [CLS] and [SEP]."""
        return self.wordpiece_tokenizer.tokenize(" ".join(self.basic_tokenizer.tokenize(text)))

    def convert_tokens_to_ids(self, tokens: Iterable[str]) -> list[int]:
        """Raises KeyError for a token the vocabulary does not hold."""
        return [self.vocab[token] for token in tokens]

    def convert_ids_to_tokens(self, ids: Iterable[int]) -> list[str]:
        """Raises KeyError for an id outside the vocabulary."""
        return [self.inv_vocab[number] for number in ids]

    @staticmethod
    def convert_tokens_to_string(tokens: Sequence[str], clean_up_tokenization_spaces: bool = True) -> str:
        """Joins pieces into words and words with blanks; closes English punctuation and short forms up on request."""
        text = " ".join(tokens).replace(" ##", "").strip()
        for spaced, closed in _ENGLISH_SPACING if clean_up_tokenization_spaces else ():
            text = text.replace(spaced, closed)
        return text

    def vocab_size(self) -> int:
        """The number of tokens."""
        return len(self.vocab)
