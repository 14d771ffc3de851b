"""Certificates for tests of TLS, made by openssl: an authority, a server's, a client's, and others that do not fit."""

import subprocess
from pathlib import Path
from typing import NamedTuple

NAMES = "DNS:milvus.test,DNS:localhost,IP:127.0.0.1"


class Certificate(NamedTuple):
    """Its two files, in PEM."""

    cert: Path
    key: Path


def authority(folder: Path, name: str = "authority") -> Certificate:
    """One that signs others."""
    made = Certificate(folder / f"{name}.pem", folder / f"{name}.key")
    _openssl("req", "-x509", *_new(made.key), "-days", "2", "-out", made.cert, "-subj", f"/CN={name}")
    return made


def signed(folder: Path, name: str, by: Certificate, names: str = NAMES) -> Certificate:
    """A certificate of these names."""
    made = Certificate(folder / f"{name}.pem", folder / f"{name}.key")
    request, more = folder / f"{name}.csr", folder / f"{name}.ext"
    more.write_text(f"subjectAltName={names}", encoding="utf-8")
    _openssl("req", *_new(made.key), "-out", request, "-subj", "/CN=milvus.test")
    options = ("-CA", by.cert, "-CAkey", by.key, "-CAcreateserial", "-days", "2", "-extfile", more)
    _openssl("x509", "-req", "-in", request, "-out", made.cert, *options)
    return made


def _new(key: Path) -> tuple[object, ...]:
    return ("-newkey", "rsa:2048", "-nodes", "-keyout", key)


def _openssl(*args: object) -> None:
    subprocess.run(["openssl", *map(str, args)], check=True, capture_output=True)
