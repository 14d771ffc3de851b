"""Passwords, tokens and keys: values that no output shows, and addresses without them; for all that connects."""

import hmac
import re
from typing import Any, NoReturn

from cn_clip.errors import ConfigError

# What stands in their place.
HIDDEN = "***"
# Settings behind the `?` of an address whose values are secret, whatever else is in their names: a misspelt one is too.
NAMES = ("passw", "pwd", "token", "secret", "_key", "credential", "sig")

# With a slash before the `@` only if a colon is there too: hf://datasets/a/b@main has no user.
_USER = re.compile(r"([a-zA-Z][a-zA-Z0-9+.-]*://+)(?:[^\s/'\"]*|[^\s'\"]*:[^\s'\"]*)@")
_SETTING = re.compile(rf"([?&;][\w.-]*(?:{'|'.join(NAMES)})[\w.-]*=)[^&;\s'\"]*", re.IGNORECASE)


class Secret:
    """A text that only `reveal` gives: printed, logged, formatted or in the repr of what holds it, it is `***`.

    It is copied as itself, and refuses to be pickled: another process reads it where this one did.
    """

    __slots__ = ("_value",)

    def __init__(self, value: str = "") -> None:
        self._value = value

    def reveal(self) -> str:
        """The text; only for the call that needs it."""
        return self._value

    def __bool__(self) -> bool:
        return bool(self._value)

    def __str__(self) -> str:
        return HIDDEN if self._value else ""

    __repr__ = __str__

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and hmac.compare_digest(self._value.encode(), other._value.encode())

    def __hash__(self) -> int:
        return hash((Secret, self._value))

    def __copy__(self) -> "Secret":
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> "Secret":
        return self

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise ConfigError("a password or token is not written into a pickle; the other process reads its own settings")


NO_SECRET = Secret()


class AddressText(str):
    """An address as it was typed, without its secrets wherever it is shown; `given` holds all of it.

    str(AddressText("milvus://me:pw@h/photos")) is "milvus://***@h/photos"; a path is itself.
    """

    __slots__ = ("given",)
    given: Secret

    def __new__(cls, text: str) -> "AddressText":
        """text: may be one already."""
        made = super().__new__(cls, without_secrets(text))
        made.given = text.given if isinstance(text, AddressText) else Secret(text)
        return made

    def __reduce_ex__(self, protocol: Any) -> Any:
        return (AddressText if self == self.given.reveal() else str), (str(self),)


def as_typed(text: str) -> str:
    """All of an address, for the one that parses it."""
    return text.given.reveal() if isinstance(text, AddressText) else text


def without_secrets(address: str) -> str:
    """The whole text is one address, whose password may hold anything, `@`, `/` and line breaks too."""
    scheme = re.match(r"[a-zA-Z][a-zA-Z0-9+.-]*:(?=//|.*@)", address, re.DOTALL)
    if scheme is None:
        return address
    rest = address[scheme.end() :]
    _user, at, place = rest.rpartition("@")
    return scheme[0] + hidden_in(f"//{HIDDEN}@{place}" if at else rest)


def hidden_in(text: str) -> str:
    """A sentence or a log line, with the users and passwords of all addresses in it left out."""
    return _SETTING.sub(rf"\1{HIDDEN}", _USER.sub(rf"\1{HIDDEN}@", text))
