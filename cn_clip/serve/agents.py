"""Tools for agents, over the Model Context Protocol: Claude Desktop or Cursor start `cn-clip mcp photos.index`."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated

import tyro

from cn_clip import command, extras, settings
from cn_clip.clip import choice
from cn_clip.errors import ConfigError
from cn_clip.index.options import MilvusConfig
from cn_clip.retrieval.schemes import TypedAddress
from cn_clip.serve.limits import Limits
from cn_clip.settings import Range


@dataclass(frozen=True)
class Options(choice.ModelSettings):
    """Gives an agent tools over indexes of pictures: search, similar, thumbnail, classify, index_facts.

    The agent starts it and speaks MCP with it on stdin and stdout. Nothing is changed, and no path or address is opened
    because a request names it.
    """

    index: Annotated[tyro.conf.Positional[tuple[TypedAddress, ...]], tyro.conf.arg(metavar="INDEX ...")] = ()
    """Indexes to search: folders, milvus://HOST:PORT/COLLECTION or photos.db of Milvus Lite; the first is meant where
    a call names none"""
    model: choice.ModelOfIndex = None
    paths: bool = False
    """Tell the agent where the files of the items lie"""
    decode: choice.DecodingOfIndex = None
    milvus_config: MilvusConfig = None
    timeout: Annotated[float, Range(least=1)] = 30.0
    """Seconds for one call"""

    def __post_init__(self) -> None:
        if not self.index:
            raise ConfigError("INDEX: expected one or more indexes; make one with: cn-clip index build")
        choice.check(self.chosen)
        settings.check(self)

    @property
    def chosen(self) -> choice.Choice:
        """The model asked for."""
        return replace(super().chosen, decode=self.decode)


def run(options: Options) -> None:
    """Answers until the agent closes stdin; raises CnClipError for what cannot be opened."""
    for module in ("mcp", "fastapi", "prometheus_client"):
        extras.require(module, extra="mcp", purpose="tools for agents")
    from cn_clip.serve import agent_server

    limits = Limits(timeout=options.timeout)
    agent_server.serve(
        options.chosen,
        limits,
        model=options.model,
        indexes=options.index,
        milvus_config=options.milvus_config,
        with_paths=options.paths,
    )


def main(args: Sequence[str] | None = None) -> None:
    """The command line."""
    command.execute(run, Options, args)


if __name__ == "__main__":
    main()
