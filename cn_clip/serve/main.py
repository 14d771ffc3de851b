"""The HTTP service: `cn-clip serve photos.index --model ViT-B-16`."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated

import tyro

from cn_clip import command, extras, settings
from cn_clip.clip import choice
from cn_clip.errors import ConfigError
from cn_clip.index.options import MilvusConfig
from cn_clip.retrieval.schemes import TypedAddress
from cn_clip.serve.limits import API_KEY_VARIABLE, Limits
from cn_clip.settings import Range

_ADDRESS = re.compile(r"https?://[^\s/?#@]+(/[^\s?#]*)?")


@dataclass(frozen=True)
class Options(choice.ModelSettings, Limits):
    """Answers over HTTP: /v1/embeddings as OpenAI's clients ask, /v1/classify, /v1/search; /metrics, /readyz."""

    index: Annotated[tyro.conf.Positional[tuple[TypedAddress, ...]], tyro.conf.arg(metavar="INDEX ...")] = ()
    """Indexes that /v1/search searches: folders, milvus://HOST:PORT/COLLECTION, photos.db of Milvus Lite or
    pgvector://HOST:PORT/DATABASE/NAME; requests name one by the folder's name without its suffix, else the first is
    meant. Changes are noticed by themselves"""
    model: choice.ModelOfIndex = None
    name: str | None = None
    """What the model is called in requests, where there is one; default: its name, or that of its file"""
    host: str = "127.0.0.1"
    """Address to listen at; 0.0.0.0 for all of this machine's"""
    allowed_host: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Name by which people reach the service, such as that of a reverse proxy. Without a key, others than localhost
    and --host are refused"""
    root_path: str = ""
    """Path below which a proxy shows the service, such as /photos; addresses in answers begin with it"""
    cors_origin: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Other site whose pages may ask, such as https://photos.example.com; may be given several times"""
    port: Annotated[int, Range(least=0, most=65535)] = 8000
    """Port to listen at; 0: any that is free"""
    api_key: str | None = None
    """Key that requests must bear; better set in the environment as CN_CLIP_API_KEY, where `ps` does not show it"""
    label_sets: tuple[Path, ...] = ()
    """Files of labels, one a line; /v1/classify calls each by its file name without the suffix"""
    token_table: Path | None = None
    """Table of tiktoken (cl100k_base.tiktoken) by which token ids become text, which LangChain sends by default"""
    immich_forward: str | None = None
    """Address of Immich's own machine learning, such as http://127.0.0.1:3003: faces and words in pictures are asked
    of it, vectors are computed here"""
    no_page: bool = False
    """Serve no web page"""
    originals: bool = False
    """Give the files of the items too, at /v1/index/items/ID, and their paths to those who ask; only files that the
    index names"""
    decode: choice.DecodingOfIndex = None
    milvus_config: MilvusConfig = None
    access_log: bool = False
    """Print a line for each request"""
    drain_timeout: float = 30.0
    """Seconds that requests in hand have to finish after SIGTERM"""

    def __post_init__(self) -> None:
        super().__post_init__()
        choice.check(self.chosen)
        settings.check(self)
        if self.immich_forward is not None and not _ADDRESS.fullmatch(self.immich_forward):
            raise ConfigError(f"--immich-forward: expected http://HOST:PORT, got {self.immich_forward!r}")
        if not self.drain_timeout > 0:
            raise ConfigError(f"{settings.flag('drain_timeout')}: expected a positive number, got {self.drain_timeout}")

    @property
    def chosen(self) -> choice.Choice:
        """The model asked for."""
        return replace(super().chosen, decode=self.decode)

    @property
    def limits(self) -> Limits:
        """The limits among the options."""
        return Limits(**{field.name: getattr(self, field.name) for field in fields(Limits)})


def run(options: Options) -> None:
    """Serves until it is told to stop; raises CnClipError for what cannot be opened."""
    for module in ("fastapi", "uvicorn", "prometheus_client", "httpx", "python_multipart"):
        extras.require(module, extra="serve", purpose="the HTTP service")
    from cn_clip.serve import server

    server.launch(
        options.chosen,
        options.limits,
        model=options.model,
        name=options.name,
        index_addresses=options.index,
        milvus_config=options.milvus_config,
        label_sets=options.label_sets,
        token_table=options.token_table,
        immich_forward=options.immich_forward,
        host=options.host,
        port=options.port,
        allowed_hosts=options.allowed_host,
        api_key=key_of(options),
        cors_origins=options.cors_origin,
        root_path=options.root_path.rstrip("/"),
        with_page=not options.no_page,
        with_originals=options.originals,
        access_log=options.access_log,
        drain_timeout=options.drain_timeout,
    )


def key_of(options: Options) -> str | None:
    """The API key of the flag, else of the environment; raises ConfigError for an empty one."""
    key = options.api_key if options.api_key is not None else os.environ.get(API_KEY_VARIABLE)
    if key is not None and not key.strip():
        raise ConfigError(f"--api-key: expected a key, got an empty one; unset {API_KEY_VARIABLE} to serve without")
    return None if key is None else key.strip()


def main(args: Sequence[str] | None = None) -> None:
    """The command line."""
    command.execute(run, Options, args)


if __name__ == "__main__":
    main()
