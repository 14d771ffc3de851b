"""Secrets: what shows them nowhere."""

import copy
import json
import pickle
from dataclasses import asdict, dataclass

import pytest

from cn_clip.errors import ConfigError
from cn_clip.secret import AddressText, Secret, as_typed, hidden_in, without_secrets


@dataclass(frozen=True)
class Login:
    """Something that holds one."""

    user: str
    password: Secret


def test_a_secret_is_shown_by_nothing_but_reveal() -> None:
    login = Login("me", Secret("hunter2"))
    shown = [str(login), repr(login), f"{login.password}", f"{login.password!r:>20}", format(login.password)]
    shown += [str(asdict(login)), str(vars(login)), str(copy.deepcopy(login)), str(copy.copy(login.password))]
    assert not [one for one in shown if "hunter2" in one]
    assert login.password.reveal() == "hunter2"
    assert (login.password == Secret("hunter2"), login.password == Secret("hunter"), bool(Secret())) == (
        True,
        False,
        False,
    )
    assert str(Secret()) == ""
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        with pytest.raises(ConfigError, match="not written into a pickle"):
            pickle.dumps(login, protocol)
    with pytest.raises(TypeError):
        json.dumps(asdict(login))


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("photos.index", "photos.index"),
        ("a@b/photos", "a@b/photos"),
        (r"C:\photos", r"C:\photos"),
        ("milvus://h:1/c", "milvus://h:1/c"),
        ("milvus://me:pw@h/c", "milvus://***@h/c"),
        ("milvus://me:p/w@d@h/c?timeout=2", "milvus://***@h/c?timeout=2"),
        ("milvus://me:p\nw@h/c", "milvus://***@h/c"),
        ("milvus:me:pw@h/c", "milvus://***@h/c"),
        ("https://h/c?token=pw&timeout=2", "https://h/c?token=***&timeout=2"),
        ("pgvector://h/c?user=me&password=pw", "pgvector://h/c?user=me&password=***"),
    ],
)
def test_addresses_are_shown_without_their_secrets(address: str, shown: str) -> None:
    text = AddressText(address)
    assert without_secrets(address) == shown
    assert (str(text), f"{text}", json.loads(json.dumps(text)), as_typed(text)) == (shown, shown, shown, address)
    assert repr(text) == repr(shown)
    assert as_typed(AddressText(text)) == address
    assert str(pickle.loads(pickle.dumps(text))) == shown
    assert "pw" not in repr(pickle.dumps(text))


def test_addresses_in_sentences_are_shown_without_their_secrets() -> None:
    assert hidden_in("s3://a:pw@b/c, pgvector://u:p%40w@h:1/d?token=pw&x=1; see me@home, hf://a/b@main") == (
        "s3://***@b/c, pgvector://***@h:1/d?token=***&x=1; see me@home, hf://a/b@main"
    )


def test_values_of_misspelt_settings_are_not_shown() -> None:
    text = "milvus://h/c?tokens=pw&Passwort=pw&access_key=pw&X-Goog-Signature=pw&key=ca.pem&timeout=3"
    assert hidden_in(text) == (
        "milvus://h/c?tokens=***&Passwort=***&access_key=***&X-Goog-Signature=***&key=ca.pem&timeout=3"
    )
