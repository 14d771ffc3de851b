"""The kinds of address that an index may have, and what reads each; light, for options. `addresses` opens them."""

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import tyro

from cn_clip.errors import ConfigError
from cn_clip.retrieval import postgres_address
from cn_clip.retrieval.milvus_address import Address, is_lite, lite_address, parse_address
from cn_clip.secret import AddressText, as_typed, without_secrets
from cn_clip.spelling import meant

ServerAddress: TypeAlias = Address | postgres_address.Address
IndexAddress: TypeAlias = Path | ServerAddress

# Scheme -> what reads its addresses, given them and a file of settings. https and http are those of Milvus's own uri.
_SCHEMES: dict[str, Callable[[str, str | None], IndexAddress]] = {
    **dict.fromkeys(("milvus", "https", "http"), parse_address),
    "pgvector": lambda text, _: postgres_address.parse_address(text),
}


def address_of(text: str | os.PathLike[str], milvus_config: str | None = None) -> IndexAddress:
    """milvus://… and pgvector://… are addresses, all else folders, but photos.db is one of Milvus Lite unless a folder
    with an index is there.

    milvus_config: a file with what the address leaves out, see `parse_address`. Raises ConfigError for a faulty
    address, a scheme that is not known, a file where Milvus Lite would keep its folder, and a `milvus_config` for
    what is not on a server.
    """
    return addresses_of([text], milvus_config)[0]


def addresses_of(texts: Sequence[str | os.PathLike[str]], milvus_config: str | None = None) -> list[IndexAddress]:
    """As `address_of`; of several, one at least must be on a Milvus server for `milvus_config`."""
    found = [_read(as_typed(os.fspath(text)), milvus_config) for text in texts]
    if milvus_config is not None and not any(isinstance(one, Address) and one.lite is None for one in found):
        named = ", ".join(map(str, found)) or "no index"
        raise ConfigError(f"{milvus_config}: is for indexes on a Milvus server, got {named}; leave it out")
    return found


def _read(text: str, milvus_config: str | None) -> IndexAddress:
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)(:/{0,2})", text)
    if scheme is None or (scheme[2] != "://" and scheme[1].lower() not in _SCHEMES):
        folder = Path(text)
        return lite_address(folder) if is_lite(folder) else folder
    read = _SCHEMES.get(scheme[1]) if scheme[2] == "://" else None
    if read is None:
        known = [f"{name}://" for name in _SCHEMES]
        raise ConfigError(
            f"{without_secrets(text)}: {scheme[0]} is no address of an index{meant(scheme[0], known)}; known are "
            f"{', '.join(known)} and folders"
        )
    return read(text, milvus_config)


# --- on the command line

_TYPED: Any = tyro.constructors.PrimitiveConstructorSpec(
    nargs=1,
    metavar="STR",
    instance_from_str=lambda words: AddressText(words[0]),
    is_instance=lambda value: value is None or isinstance(value, str),
    str_from_instance=lambda value: [str(value)],
)
# The address as `AddressText`: whatever prints it leaves its password out.
TypedAddress: TypeAlias = Annotated[str, _TYPED]
TypedAddressOrNone: TypeAlias = Annotated[str | None, _TYPED]
