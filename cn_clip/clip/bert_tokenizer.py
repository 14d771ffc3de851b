"""The import path and names of Chinese-CLIP's tokenizer (`FullTokenizer`), over `cn_clip.clip.tokenizer`."""

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path

from cn_clip.clip.tokenizer import MAX_WORD_CHARS, UNKNOWN, VOCAB_FILE, basic_words, load_vocab, word_pieces

__all__ = ["BasicTokenizer", "FullTokenizer", "WordpieceTokenizer", "default_vocab", "load_vocab"]

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


class BasicTokenizer:
    """Text to words: cleaned, split at blanks, Han characters and punctuation."""

    def __init__(self, do_lower_case: bool = True) -> None:
        self.do_lower_case = do_lower_case

    def tokenize(self, text: str) -> list[str]:
        return basic_words(text, lower=self.do_lower_case)


class WordpieceTokenizer:
    """Words between blanks to the longest pieces of a vocabulary."""

    def __init__(
        self,
        vocab: Mapping[str, int],
        unk_token: str = UNKNOWN,
        max_input_chars_per_word: int = MAX_WORD_CHARS,
    ) -> None:
        self.vocab = vocab
        self.unk_token = unk_token
        self.max_input_chars_per_word = max_input_chars_per_word

    @cached_property
    def _longest(self) -> int:
        return max(map(len, self.vocab), default=0)

    def tokenize(self, text: str) -> list[str]:
        return [piece for word in text.split() for piece in self._pieces(word)]

    def _pieces(self, word: str) -> list[str]:
        limit = self.max_input_chars_per_word
        return word_pieces(word, self.vocab, longest=self._longest, unknown=self.unk_token, max_chars=limit)


class FullTokenizer:
    """Text to word pieces and ids. The vocabulary file is read on first use."""

    def __init__(self, vocab_file: str | Path = VOCAB_FILE, do_lower_case: bool = True) -> None:
        self.vocab_file = vocab_file
        self.basic_tokenizer = BasicTokenizer(do_lower_case)

    @cached_property
    def vocab(self) -> dict[str, int]:
        return load_vocab(self.vocab_file)

    @cached_property
    def inv_vocab(self) -> dict[int, str]:
        return {number: token for token, number in self.vocab.items()}

    @cached_property
    def wordpiece_tokenizer(self) -> WordpieceTokenizer:
        return WordpieceTokenizer(self.vocab)

    def tokenize(self, text: str) -> list[str]:
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
        return len(self.vocab)
