"""The whole job on embedded emoji pictures, each step a command you can type, ending in a page: `cn-clip demo`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from cn_clip import command, terminal
from cn_clip.language import both
from cn_clip.settings import Range, check


@dataclass(frozen=True)
class Options:
    """Emoji-Tiny meets drawings it has never seen: it finds and classifies them, learns from most of them, and is
    measured on the rest. Ends in a page, index.html."""

    output: str = "demo-output"
    """Folder for everything the demo writes"""
    steps: Annotated[int, Range(least=0)] = 60
    """Fine-tuning steps of 128 pairs; 0: only look at the bundled model"""
    seed: int = 123
    """Seed: which drawings are held out of training, the captions, and the data order"""
    json: bool = False
    """Print the result as one JSON object at the end"""

    def __post_init__(self) -> None:
        check(self)


def run(options: Options) -> None:
    """Runs every step; the results lie in `options.output`. Raises OSError when that is no folder."""
    say = command.Speaker(quiet=options.json)
    # At once: the imports below take seconds.
    say(
        both(
            "随包的小模型 Emoji-Tiny 没见过 Twemoji 这套表情图片：先考它，再教它一会儿，再考一次。离线运行，约一分钟。",
            "The bundled model Emoji-Tiny has never seen the Twemoji drawings: it is tested, fine-tuned for a moment, "
            "and tested again. Offline, about a minute.",
        )
    )
    from cn_clip.demo.tour import Tour

    with Tour(Path(options.output), seed=options.seed, steps=options.steps, say=say) as tour:
        summary = tour.take()
    if options.json:
        terminal.print_json(summary)


def main(args: Sequence[str] | None = None) -> None:
    """The command line."""
    command.execute(run, Options, args)


if __name__ == "__main__":
    main()
