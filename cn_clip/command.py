"""What every command shares: options from the command line, log set-up, errors as one line, exit status."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any, TypeVar

from cn_clip.errors import CnClipError

OptionsT = TypeVar("OptionsT")


def parse(options: type[OptionsT], args: Sequence[str] | None, *, prog: str | None = None) -> OptionsT:
    """Parses `args` (default: sys.argv) into the frozen dataclass `options`; exits with status 2 when it cannot."""
    import tyro

    try:
        return tyro.cli(options, args=args, prog=prog, config=(tyro.conf.FlagCreatePairsOff,))
    except CnClipError as error:
        _fail(error, status=2)


def execute(run: Callable[[OptionsT], int | None], options: type[OptionsT], args: Sequence[str] | None = None) -> None:
    """Runs a command and exits: status 0, the status `run` returns, 1 with one line for a CnClipError."""
    parsed = parse(options, args)
    try:
        status = run(parsed) or 0
    except CnClipError as error:
        _fail(error, status=1)
    except KeyboardInterrupt:
        print("已中断 / interrupted", file=sys.stderr)
        status = 130
    except BrokenPipeError:
        sys.stderr.close()
        status = 141
    if status:
        sys.exit(status)


def _fail(error: CnClipError, *, status: int) -> Any:
    print(f"错误 / error: {error}", file=sys.stderr)
    sys.exit(status)


def print_params(options: Any) -> None:
    """Prints the settings in use, sorted by name, as the reference's scripts do."""
    print("Params:")
    for name in sorted(field.name for field in fields(options)):
        print(f"  {name}: {getattr(options, name)}")
