"""Text to token ids by the rules of Chinese BERT: what `clip.tokenize`, the encoder and the datasets call.

`tokenize` and `encode` take a text as it is; `ChineseTexts` prepares it first, as Chinese-CLIP's commands do.
"""

import logging
import operator
import re
import unicodedata
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from cn_clip import zoo
from cn_clip.errors import ConfigError, DataError

if TYPE_CHECKING:
    import tokenizers
    import torch

logger = logging.getLogger(__name__)

VOCAB_FILE = Path(__file__).parent / "vocab.txt"
CONTEXT_LENGTH = 52
MAX_WORD_CHARS = 200
UNKNOWN, START, END = "[UNK]", "[CLS]", "[SEP]"
PAD_ID = 0

# Only strings of these characters go through Rust. Rust and Python disagree on other characters: unassigned,
# private-use and control ones, the bounds of rare Han, line separators, the sigma at the end of a word, and all that
# entered Unicode after the tables of one of them. These ranges are as old as Unicode 3.2 and hold no combining mark.
FAST_CHARACTERS = (
    "\t\n\r\x20-\x7e"
    "\xa0-\xac\xae-\xff"  # Latin-1 without the soft hyphen
    "\u2010-\u2027\u2030-\u2051"  # general punctuation: dashes, quotation marks, dots
    "\u3000-\u3003\u3005-\u301f"  # CJK punctuation
    "\u3041-\u3094\u309b-\u309e\u30a1-\u30fe"  # kana without the combining sound marks
    "\u4e00-\u9fa5"  # CJK unified ideographs of Unicode 1.1
    "\uff01-\uff5e"  # full-width forms
)
_FAST_TEXT = re.compile(f"[{FAST_CHARACTERS}]*")

_HAN = (
    (0x3400, 0x4DBF),
    (0x4E00, 0x9FFF),
    (0xF900, 0xFAFF),
    (0x20000, 0x2A6DF),
    (0x2A700, 0x2B73F),
    (0x2B740, 0x2B81F),
    (0x2B820, 0x2CEAF),
    (0x2F800, 0x2FA1F),
)
_ASCII_PUNCTUATION = frozenset("!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~")


def tokenize(texts: str | Iterable[str], context_length: int = CONTEXT_LENGTH) -> "torch.Tensor":
    """Token ids (N, context_length) int64 of one text or several: [CLS] ids [SEP], cut to fit, zeros behind.

    Raises TypeError for a text that is not a str, ConfigError for a context_length below 2.
    """
    import torch

    return torch.from_numpy(pad(encode(texts, context_length), context_length))


def encode(texts: str | Iterable[str], context_length: int = CONTEXT_LENGTH) -> list[list[int]]:
    """The rows of `tokenize` before padding: [CLS] ids [SEP], 2 to context_length ids each."""
    try:
        length = operator.index(context_length)
    except TypeError:
        length = 0
    if length < 2:
        raise ConfigError(
            f"context_length: expected an integer of at least 2, for [CLS] and [SEP], got {context_length!r}"
        )
    start, end = _default().vocab[START], _default().vocab[END]
    return [[start, *_default().ids(text)[: length - 2], end] for text in checked_texts(texts)]


def pad(rows: Sequence[Sequence[int]], length: int) -> NDArray[np.int64]:
    """Rows of ids as one int64 array (N, length), zeros behind. Raises ConfigError for a row longer than that."""
    longest = max(map(len, rows), default=0)
    if longest > length:
        raise ConfigError(f"a row of {longest} token ids does not fit a length of {length}")
    filled = [[*row, *[PAD_ID] * (length - len(row))] for row in rows]
    return np.array(filled, dtype=np.int64).reshape(len(rows), length)


def vocab() -> dict[str, int]:
    """A copy of the vocabulary: token to id."""
    return dict(_default().vocab)


class Tokenizer:
    """Text to ids with one vocabulary file. Reads it on first use; safe to share by threads, to fork and to pickle."""

    def __init__(self, vocab_file: str | Path = VOCAB_FILE) -> None:
        self.vocab_file = Path(vocab_file)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.vocab_file,)

    @cached_property
    def vocab(self) -> dict[str, int]:
        """Token -> id."""
        return load_vocab(self.vocab_file)

    @cached_property
    def _longest(self) -> int:
        return max(map(len, self.vocab))

    @cached_property
    def rust(self) -> "tokenizers.Tokenizer":
        """The rules as a tokenizer of Rust; shared, so not to be changed."""
        import tokenizers  # takes a while, and exact_ids does without

        # No special token is added: the text "[SEP]" is three words, not the separator.
        word_piece = tokenizers.models.WordPiece(self.vocab, unk_token=UNKNOWN, max_input_chars_per_word=MAX_WORD_CHARS)
        rust = tokenizers.Tokenizer(word_piece)
        rust.normalizer = tokenizers.normalizers.BertNormalizer(
            clean_text=True, handle_chinese_chars=True, strip_accents=True, lowercase=True
        )
        rust.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
        return rust

    def ids(self, text: str) -> list[int]:
        """Ids of the word pieces of `text`, without [CLS] and [SEP]."""
        if _FAST_TEXT.fullmatch(text):
            return self.fast_ids(text)
        return self.exact_ids(text)

    def fast_ids(self, text: str) -> list[int]:
        """The ids by Rust; right only for text of FAST_CHARACTERS."""
        # One call a text rather than encode_batch: that starts a thread pool, which does not survive the fork of a
        # DataLoader worker and warns about it.
        ids: list[int] = self.rust.encode(text, add_special_tokens=False).ids
        return ids

    def exact_ids(self, text: str) -> list[int]:
        """The ids by the Python rules; right for every text."""
        return [self.vocab[piece] for piece in self.pieces(text)]

    def pieces(self, text: str) -> list[str]:
        """The word pieces of `text` by the Python rules."""
        return [piece for word in basic_words(text) for piece in word_pieces(word, self.vocab, longest=self._longest)]


def load_vocab(path: str | Path) -> dict[str, int]:
    """Token to line number, from 0; blanks around a token are dropped and the last of equal tokens counts.

    Raises DataError when the file cannot be read or lacks [UNK], [CLS] or [SEP].
    """
    try:
        tokens = read_vocab(path)
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"cannot be read as a vocabulary ({error}); expected UTF-8, one token a line", at=path
        ) from error
    missing = [token for token in (UNKNOWN, START, END) if token not in tokens]
    if missing:
        raise DataError(f"not a BERT vocabulary, {', '.join(missing)} is missing; expected one token a line", at=path)
    return tokens


def read_vocab(path: str | Path) -> dict[str, int]:
    """`load_vocab` without its checks: raises what reading raises, and takes any lines."""
    with open(path, encoding="utf-8") as lines:
        return {line.strip(): number for number, line in enumerate(lines)}


def basic_words(text: str, *, lower: bool = True) -> list[str]:
    """Words of a text: cleaned, each Han and punctuation character a word of its own; lower case without accents."""
    text = "".join(map(cleaned, text))
    if lower:
        # Lower first: İ becomes i and a dot above, and only then loses the dot.
        text = without_accents(text.lower())
    return "".join(map(punctuation_apart, text)).split()


def without_accents(text: str) -> str:
    """The text with its characters taken apart (NFD) and what combines with them left out."""
    return "".join(char for char in unicodedata.normalize("NFD", text) if unicodedata.category(char) != "Mn")


def word_pieces(
    word: str, vocab: Container[str], *, longest: int, unknown: str = UNKNOWN, max_chars: int = MAX_WORD_CHARS
) -> list[str]:
    """Greedy longest-match pieces of one word, `##` before all but the first; [unknown] if any part has none.

    longest: characters of the longest token of `vocab`, the bound of the search.
    """
    if len(word) > max_chars:
        return [unknown]
    pieces: list[str] = []
    start = 0
    while start < len(word):
        prefix, ends = "##" if start else "", range(min(len(word), start + longest), start, -1)
        found = next((piece for end in ends if (piece := prefix + word[start:end]) in vocab), None)
        if found is None:
            return [unknown]
        pieces.append(found)
        start += len(found) - (2 if start else 0)
    return pieces


@lru_cache(maxsize=1 << 16)
def cleaned(char: str) -> str:
    """What a character becomes before the split: nothing, a blank, itself, or itself between blanks (Han)."""
    if char in " \t\n\r":
        return " "
    category = unicodedata.category(char)
    if category in ("Cc", "Cf") or char == "\ufffd":
        return ""
    if category == "Zs":
        return " "
    return f" {char} " if any(low <= ord(char) <= high for low, high in _HAN) else char


@lru_cache(maxsize=1 << 16)
def punctuation_apart(char: str) -> str:
    """A punctuation character between blanks; any other as it is."""
    is_punctuation = char in _ASCII_PUNCTUATION or unicodedata.category(char).startswith("P")
    return f" {char} " if is_punctuation else char


@lru_cache(maxsize=1)
def _default() -> Tokenizer:
    return Tokenizer()


def checked_texts(texts: str | Iterable[str]) -> list[str]:
    """The texts as a list; raises TypeError naming the first that is not a str."""
    if isinstance(texts, str):
        return [texts]
    if isinstance(texts, (bytes, bytearray)) or not isinstance(texts, Iterable):
        raise TypeError(f"texts: expected a str or a list of str, got {type(texts).__name__}")
    checked = list(texts)
    for index, text in enumerate(checked):
        if not isinstance(text, str):
            raise TypeError(f"texts[{index}]: expected a str, got {type(text).__name__} {text!r:.80}")
    return checked


# --- texts as people write them


class TextTransform(Protocol):
    """From texts, as people wrote them, to token ids; called by several threads at once."""

    @property
    def context_length(self) -> int:
        """The longest row, special tokens included; longer texts are cut."""
        ...

    def rows(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, special tokens included, before padding. Raises TypeError for what is not a str."""
        ...

    def pad(self, rows: Sequence[Sequence[int]]) -> NDArray[np.int64]:
        """Rows of ids as the text tower takes them: int64 (B, L), padded to the longest or to a fixed length."""
        ...


def preprocess_text(text: str) -> str:
    """Lower-cased, curly double quotes straightened: how Chinese-CLIP adapts text to its vocabulary."""
    return text.lower().replace("\N{LEFT DOUBLE QUOTATION MARK}", '"').replace("\N{RIGHT DOUBLE QUOTATION MARK}", '"')


@dataclass(frozen=True)
class ChineseTexts:
    """Chinese-CLIP's: `preprocess_text`, its tokenizer, zeros up to the longest row. `clip.tokenize` skips the first.

    context_length: the longest row. Raises ConfigError from `rows` where it is below 2.
    """

    context_length: int

    def rows(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, prepared, [CLS] and [SEP] included, cut at context_length; raises TypeError."""
        return encode(map(preprocess_text, checked_texts(texts)), self.context_length)

    def pad(self, rows: Sequence[Sequence[int]]) -> NDArray[np.int64]:
        """Rows of different lengths as one int64 array (B, longest row), padded with 0."""
        return pad(rows, max(map(len, rows), default=0))


def text_length(asked: int, trained: int | None, model: object) -> int:
    """The longest text in tokens: `asked`, but when nobody asked (zoo.CONTEXT_LENGTH) what the model was trained with.

    trained: what its checkpoint says, None for one that says nothing. Warns when another length is asked for.
    """
    if trained is None or trained == asked:
        return int(asked)
    if isinstance(asked, zoo.UsualLength):
        logger.info("texts are cut at %d tokens, as %s was trained", trained, model)
        return trained
    logger.warning("context length %d: %s was trained with texts of at most %d tokens", asked, model, trained)
    return asked
