"""Token ids to text by a table of tiktoken, for clients that send the ids of OpenAI's tokenizer in place of words."""

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path

from cn_clip.errors import DataError


class TokenTable:
    """bytes_of: those of each token id. They need not end where a character ends."""

    def __init__(self, bytes_of: Mapping[int, bytes]) -> None:
        self._bytes_of = bytes_of

    def text(self, token_ids: Sequence[int]) -> str:
        """The text of some ids; raises KeyError for one that is not in the table, as special ones are."""
        return b"".join([self._bytes_of[one] for one in token_ids]).decode(errors="replace")


def read_token_table(path: Path) -> TokenTable:
    """The table in a file such as cl100k_base.tiktoken: on each line a token in base64, and its id.

    The lines `IQ== 0` and `5L2g 1` make [1, 0] the text 你!. Raises DataError for another file.
    """
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error
    bytes_of = dict[int, bytes]()
    for number, line in enumerate(lines, 1):
        token, _, token_id = line.partition(b" ")
        try:
            bytes_of[int(token_id)] = base64.b64decode(token, validate=True)
        except ValueError as error:
            raise DataError(
                f"{path}:{number}: expected a token in base64 and its id, as in tiktoken's cl100k_base.tiktoken, "
                f"got {line[:40]!r}"
            ) from error
    if not bytes_of:
        raise DataError(f"{path}: an empty table; expected one such as tiktoken's cl100k_base.tiktoken")
    return TokenTable(bytes_of)
