"""What every command shares: options from the command line, log set-up, errors as one line, exit status."""

import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from typing import Annotated, Any, NoReturn, TypeAlias, TypeVar

import tyro

from cn_clip.errors import CnClipError, ConfigError, lacked_memory

OptionsT = TypeVar("OptionsT")

# A flag that the check of the options asks for: it says what is expected, the parser only that something is missing.
Required: TypeAlias = Annotated[str | None, tyro.conf.arg(help_behavior_hint="(required)")]


def parse(options: type[OptionsT], args: Sequence[str] | None, *, prog: str | None = None) -> OptionsT:
    """Parses `args` (default: sys.argv) into the frozen dataclass `options`; exits with status 2 when it cannot."""
    try:
        return tyro.cli(options, args=args, prog=prog, config=(tyro.conf.FlagCreatePairsOff,))
    except CnClipError as error:
        _fail(error, status=2)
    except BrokenPipeError:  # --help into a pager that closed
        sys.stderr.close()
        sys.exit(141)


def execute(run: Callable[[OptionsT], int | None], options: type[OptionsT], args: Sequence[str] | None = None) -> None:
    """Runs a command and exits: status 0, the status `run` returns, 1 with one line for a CnClipError."""
    parsed = parse(options, args)
    try:
        status = run(parsed) or 0
    except CnClipError as error:
        _fail(error, status=1)
    except (MemoryError, RuntimeError) as error:
        if not lacked_memory(error):
            raise
        _fail(_out_of_memory(error, parsed), status=1)
    except KeyboardInterrupt:
        print("已中断 / interrupted", file=sys.stderr)
        status = 130
    except BrokenPipeError:
        sys.stderr.close()
        status = 141
    if status:
        sys.exit(status)


def _out_of_memory(error: BaseException, options: Any) -> ConfigError:
    """The first line of what a library says, and the options of this command that need less."""
    names = [field.name for field in fields(options)]
    less = [f"a smaller --{name.replace('_', '-')}" for name in names if "batch" in name]
    less += [f"--{name} {value}" for name, value in (("precision", "bf16"), ("device", "cpu")) if name in names]
    advice = f"; these need less: {', '.join(less)}" if less else ""
    reason = (str(error).splitlines() or ["no details"])[0].split(" If reserved")[0]
    return ConfigError(f"显存或内存不够 / out of memory ({reason}){advice}")


def _fail(error: CnClipError, *, status: int) -> NoReturn:
    print(f"错误 / error: {error}", file=sys.stderr)
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
            # File names that are no UTF-8 hold lone surrogates: these come out as JSON's own escapes.
            print(json.dumps(values, ensure_ascii=False).encode(errors="backslashreplace").decode())


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
