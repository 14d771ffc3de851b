"""Keeps an index up with a folder: `cn-clip index watch pictures --output photos.index`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from cn_clip import command
from cn_clip.errors import ConfigError
from cn_clip.index import build
from cn_clip.index.options import execute
from cn_clip.settings import Range

# The least of --settle with --poll: a file that changes twice within what a file system takes for one moment (two
# seconds at most, on FAT) is reported once, so that it may be read only when that moment is over.
WHOLE_SECONDS = 2.0


@dataclass(frozen=True, kw_only=True)
class Options(build.Options):
    """Brings an index up to a folder as `cn-clip index build` does, and again whenever pictures come, change or go.

    Between two updates nothing is locked: `index add` and `serve` go on. Ctrl-C or SIGTERM ends it.
    """

    settle: Annotated[float, Range(least=0.1, most=600)] = 2.0
    """Seconds without a change after which the index is brought up; at least 2 with --poll"""
    poll: bool = False
    """Look at the folder every few seconds instead of waiting for the system to tell; network drives need it"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.poll and self.settle < WHOLE_SECONDS:
            raise ConfigError(
                f"--settle {self.settle:g}: with --poll, which compares the times of files in whole seconds, "
                f"expected at least {WHOLE_SECONDS:g}"
            )
        for name in ("replace_source", "renew", "retry", "prune"):
            if getattr(self, name):
                flag = f"--{name.replace('_', '-')}"
                raise ConfigError(f"{flag}: is for one run; give it to cn-clip index build, and watch then")


def run(options: Options) -> None:
    """Follows; raises CnClipError for what the first update refuses."""
    from cn_clip.index import following

    following.follow(options, command.Speaker(quiet=options.json))


def main(args: Sequence[str] | None = None) -> None:
    """The command line."""
    execute(run, Options, args, "--output")


if __name__ == "__main__":
    main()
