"""Prints what an index holds: `cn-clip index info photos.index`."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from cn_clip import command
from cn_clip.index.options import IndexArgument, execute
from cn_clip.option_types import Json
from cn_clip.retrieval.manifest import Manifest
from cn_clip.terminal import shown


@dataclass(frozen=True, kw_only=True)
class Options:
    """Tells the model, the engine, and how much there is of what."""

    index: IndexArgument
    json: Json = False


def run(options: Options) -> None:
    """Prints the facts; raises DataError when there is no index."""
    from cn_clip.retrieval import addresses

    say = command.Speaker(quiet=options.json)
    facts = addresses.require(addresses.address_of(options.index))
    model, more = facts.model, dict[str, Any]()
    if isinstance(facts, Manifest):
        more = {
            "num_removed": facts.num_rows - facts.num_items,
            "has_graph": facts.graph is not None,
            "num_segments": len(facts.segments),
            "bytes": sum(file.bytes for _, file in facts.files()),
            "generation": facts.generation,
        }
    say(f"模型 / model        {shown(model.name) or '?'} ({model.embed_dim} dimensions, {model.fingerprint or '?'})")
    say(f"条目 / items        {facts.num_items}")
    say(f"引擎 / engine       {facts.engine}{' (graph)' if more.get('has_graph') else ''}")
    say(f"向量 / vectors      {facts.vector_type}")
    if more:
        say(f"大小 / size         {more['bytes'] / 2**20:.1f} MiB, {more['num_segments']} segments")
    seen = facts.pictures
    way = "?" if seen is None else f"{'upright' if seen.upright else 'as stored'}, --decode {seen.decode}"
    say(f"图片 / pictures     {way}")
    say(f"来源 / source       {shown(facts.source) or '?'}")
    if more:
        say(f"版本 / generation   {more['generation']}")
    say.result(
        {
            "index": options.index,
            "model": asdict(model),
            "num_items": facts.num_items,
            "engine": facts.engine,
            "vector_type": facts.vector_type,
            "pictures": None if facts.pictures is None else asdict(facts.pictures),
            "source": facts.source,
            **more,
        }
    )


def main(args: Sequence[str] | None = None) -> None:
    """The command line."""
    execute(run, Options, args)


if __name__ == "__main__":
    main()
