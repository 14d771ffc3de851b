"""What every command shares: options from the command line, what it prints, its exit status."""

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from typing import Annotated, Any, TypeAlias, TypeVar

import tyro

from cn_clip import terminal

OptionsT = TypeVar("OptionsT")

# A flag that the check of the options asks for: it says what is expected, the parser only that something is missing.
Required: TypeAlias = Annotated[str | None, tyro.conf.arg(help_behavior_hint="(required)")]


def parse(options: type[OptionsT], args: Sequence[str] | None, *, prog: str | None = None) -> OptionsT:
    """Parses `args` (default: sys.argv) into the frozen dataclass `options`; exits with status 2 when it cannot."""
    with terminal.ending(status=2):
        return tyro.cli(options, args=args, prog=prog, config=(tyro.conf.FlagCreatePairsOff,))


def execute(run: Callable[[OptionsT], int | None], options: type[OptionsT], args: Sequence[str] | None = None) -> None:
    """Runs a command and exits: status 0, the status `run` returns, or as `terminal.ending` says."""
    parsed = parse(options, args)
    with terminal.ending():
        status = run(parsed) or 0
    if status:
        sys.exit(status)


class Speaker:
    """Tells people how a command goes on; with `quiet` (--json) only `result` speaks, in one JSON object."""

    def __init__(self, *, quiet: bool) -> None:
        self.quiet = quiet

    def __call__(self, line: str) -> None:
        if not self.quiet:
            print(line, flush=True)

    def note(self, line: str) -> None:
        """What takes long, or went wrong and was mended: on stderr where only JSON goes to stdout."""
        print(line, file=sys.stderr if self.quiet else sys.stdout, flush=True)

    def params(self, options: Any) -> None:
        """The settings in use."""
        if not self.quiet:
            print_params(options)

    def result(self, values: dict[str, Any]) -> None:
        """The result for programs."""
        if self.quiet:
            terminal.print_json(values)


@contextlib.contextmanager
def stdout_to_stderr(*, when: bool) -> Iterator[None]:
    """Sends what is printed inside to stderr, so that stdout holds JSON alone."""
    with contextlib.redirect_stdout(sys.stderr) if when else contextlib.nullcontext():
        yield


def print_params(options: Any) -> None:
    """Prints the settings in use, sorted by name, as the reference's scripts do."""
    print("Params:")
    for name in sorted(field.name for field in fields(options)):
        print(f"  {name}: {getattr(options, name)}")
