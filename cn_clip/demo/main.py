"""The whole job on embedded emoji pictures, each step a command you can type: `cn-clip demo`."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from cn_clip import command, terminal
from cn_clip.settings import Range, check


@dataclass(frozen=True)
class Options:
    """Emoji-Tiny meets drawings it has never seen: found by text and named, classified, shown, then fine-tuned on."""

    output: str = "demo-output"
    """Folder for everything the demo writes"""
    steps: Annotated[int, Range(least=0)] = 100
    """Fine-tuning steps of 256 pairs; 100 take about a minute on two cores; 0: only look at the bundled model"""
    seed: int = 123
    """Seed of the sentences and the data order"""
    json: bool = False
    """Print the result as one JSON object at the end"""

    def __post_init__(self) -> None:
        check(self)


def run(options: Options) -> None:
    """Runs every step; the results lie in `options.output`. Raises OSError when that is no folder."""
    from cn_clip.demo.tour import MODEL, Tour

    started = time.monotonic()
    tour = Tour(Path(options.output), seed=options.seed, steps=options.steps)
    with command.stdout_to_stderr(when=options.json):
        tour.make_dataset()
        before, after = tour.recalls(MODEL), None
        accuracy, grid = tour.classify(MODEL), tour.draw(MODEL)
        if options.steps:
            tour.train()
            after = tour.recalls(tour.checkpoint)
        summary = {"before": before, "after": after, "zeroshot": accuracy, "grid": str(grid), "steps": options.steps}
        summary["seconds"] = round(time.monotonic() - started, 1)
        tour.print_summary(summary)
    if options.json:
        terminal.print_json(summary)


def main(args: Sequence[str] | None = None) -> None:
    """The command line."""
    command.execute(run, Options, args)


if __name__ == "__main__":
    main()
