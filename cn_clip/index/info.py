"""Tells what an index holds: `cn-clip index info photos.index`."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from cn_clip import command
from cn_clip.index.options import IndexFolder


@dataclass(frozen=True, kw_only=True)
class Options:
    """Tells the model, the engine, and how much there is of what."""

    index: IndexFolder
    """The folder of the index"""
    json: bool = False
    """Print the result as one JSON object"""


def run(options: Options) -> None:
    """Prints the facts; raises DataError when there is no index."""
    from cn_clip.index.show import shown
    from cn_clip.retrieval import manifest

    say = command.Speaker(quiet=options.json)
    facts = manifest.read(Path(options.index))
    num_bytes = sum(file.bytes for _, file in facts.files())
    model = facts.model
    say(f"模型 / model        {shown(model.name) or '?'} ({model.embed_dim} dimensions, {model.fingerprint or '?'})")
    say(f"条目 / items        {facts.num_items}")
    say(f"引擎 / engine       {facts.engine}{' (graph)' if facts.graph else ''}")
    say(f"向量 / vectors      {facts.vector_type}")
    say(f"大小 / size         {num_bytes / 2**20:.1f} MiB, {len(facts.segments)} segments")
    say(f"来源 / source       {shown(facts.source) or '?'}")
    say(f"版本 / generation   {facts.generation}")
    say.result(
        {
            "index": options.index,
            "model": asdict(model),
            "num_items": facts.num_items,
            "num_removed": facts.num_rows - facts.num_items,
            "engine": facts.engine,
            "has_graph": facts.graph is not None,
            "vector_type": facts.vector_type,
            "num_segments": len(facts.segments),
            "bytes": num_bytes,
            "source": facts.source,
            "generation": facts.generation,
        }
    )


def main(args: Sequence[str] | None = None) -> None:
    """The command line."""
    command.execute(run, Options, args)


if __name__ == "__main__":
    main()
