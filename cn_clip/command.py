"""What every command shares: options from the command line, what it prints, its exit status."""

import contextlib
import sys
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Annotated, Any, TypeAlias, TypeVar, get_args, get_type_hints

import tyro

from cn_clip import help_page, progress, terminal
from cn_clip.errors import CnClipError, ConfigError, lacked_memory
from cn_clip.language import both
from cn_clip.secret import hidden_in
from cn_clip.settings import flag, flag_of

OptionsT = TypeVar("OptionsT")

# A flag that the check of the options asks for: it says what is expected, the parser only that something is missing.
Required: TypeAlias = Annotated[str | None, tyro.conf.arg(help_behavior_hint="(required)")]
_POSITIONAL = get_args(tyro.conf.Positional[str])[1]


def parse(options: type[OptionsT], args: Sequence[str] | None) -> OptionsT:
    """Parses `args` (default: sys.argv) into the frozen dataclass `options`; exits with status 2 when it cannot.

    Options may be shortened as argparse allows, see `spelled_out`.
    """
    with terminal.ending(status=2):
        return _parsed(options, spelled_out(options, sys.argv[1:] if args is None else args))


def _parsed(options: type[OptionsT], args: list[str]) -> OptionsT:
    """What tyro reads, and what it prints in the reader's language. Raises ConfigError for what it refuses."""
    try:
        with help_page.overheard() as said:
            parsed = tyro.cli(options, args=args, config=help_page.CONFIG)
    except SystemExit as stopped:
        if not stopped.code:
            print(help_page.page(said[0].out))
            raise
        raise _cause(stopped) or ConfigError(hidden_in(help_page.refusal(said[0].err))) from None
    sys.stderr.write(said[0].err)  # warnings of the check of the options
    return parsed


def _cause(error: BaseException) -> CnClipError | None:
    """The error of the check of the options, which tyro tells in its own words."""
    cause = error.__context__
    while cause is not None and not isinstance(cause, CnClipError):
        cause = cause.__cause__ or cause.__context__
    return cause


def spelled_out(options: type[Any], args: Sequence[str]) -> list[str]:
    """The arguments with every shortened option in full: `--vision X` as `--vision-model X`.

    Of several options that begin so, one of Chinese-CLIP comes before ours, which `options.ADDED` names where that
    matters: scripts written for Chinese-CLIP mean it. Raises ConfigError with the candidates when two are left.
    """
    flags = spellings(options)
    written: list[str] = []
    for number, word in enumerate(args):
        if word == "--":
            return [*written, *args[number:]]
        name, equals, value = word.partition("=")
        name = name.replace("_", "-")
        candidates = sorted({full for flag, full in flags.items() if flag.startswith(name)})
        if len(candidates) > 1:
            added = set(map(flag, getattr(options, "ADDED", ())))
            candidates = [full for full in candidates if full not in added] or candidates
        if not name.startswith("--") or name in flags or not candidates:
            written.append(word)
        elif len(candidates) == 1:
            written.append(f"{candidates[0]}{equals}{value}")
        else:
            raise ConfigError(f"{word}: fits {', '.join(candidates)}; write more of the one that is meant")
    return written


def spellings(options: type[Any]) -> dict[str, str]:
    """Every spelling of an option in full -> its first."""
    hints = get_type_hints(options, include_extras=True)
    found = {"--help": "--help"}
    for field in fields(options):
        annotations = getattr(hints[field.name], "__metadata__", ())
        if _POSITIONAL not in annotations:
            first = flag_of(field.name, annotations)
            aliases = [alias for one in annotations for alias in getattr(one, "aliases", None) or ()]
            found |= dict.fromkeys((first, *aliases), first)
    return found


def namespace(options: type[Any], *, required: Sequence[str] = (), **defaults: Any) -> Namespace:
    """What Chinese-CLIP's `parse_args` of a command returns: the options of sys.argv, not checked further.

    defaults: Chinese-CLIP's, where ours differ. required: options that must be given, where ours are checked later.
    Exits with status 2 when sys.argv cannot be parsed.
    """
    hints = get_type_hints(options, include_extras=True)
    changes = {"__post_init__": lambda _: None, "__annotations__": {name: hints[name] for name in defaults}}
    unchecked: Any = dataclass(frozen=True)(
        type(options.__name__, (options,), {"__doc__": options.__doc__, **changes, **defaults})
    )
    given = parse(unchecked, None)
    parsed = Namespace(**_values(given))
    with terminal.ending(status=2):
        for name in required:
            if getattr(parsed, name) is None:
                raise ConfigError(f"{flag(name)}: expected a value; this option is required")
    return parsed


def execute(run: Callable[[OptionsT], int | None], options: type[OptionsT], args: Sequence[str] | None = None) -> None:
    """Runs a command and exits: status 0, the status `run` returns, or as `terminal.ending` says."""
    parsed = parse(options, args)
    # What Pillow thinks of a picture is for programmers; what matters of it is raised.
    warnings.filterwarnings("ignore", module=r"PIL\b")
    with (
        terminal.ending(),
        progress.hidden(when=getattr(parsed, "json", False)),
        progress.working(both("运行中", "working")),
    ):
        try:
            status = run(parsed) or 0
        except (MemoryError, RuntimeError) as error:
            if isinstance(error, CnClipError) or not lacked_memory(error):
                raise
            raise _out_of_memory(error, parsed) from error
    if status:
        sys.exit(status)


def _out_of_memory(error: BaseException, options: Any) -> ConfigError:
    """The first line of what a library says, and the options of this command that need less."""
    names = [field.name for field in fields(options)]
    less = [f"a smaller {flag(name)}" for name in names if "batch" in name]
    less += [f"--{name} {value}" for name, value in (("precision", "bf16"), ("device", "cpu")) if name in names]
    advice = f"; these need less: {', '.join(less)}" if less else ""
    reason = (str(error).splitlines() or ["no details"])[0].split(" If reserved")[0]
    return ConfigError(f"out of memory ({reason}){advice}")


class Speaker:
    """Tells people how a command goes on; with `quiet` (--json) only `result` speaks, in one JSON object."""

    def __init__(self, *, quiet: bool) -> None:
        self.quiet = quiet
        self._more: dict[str, Any] = {}

    def muted(self) -> "Speaker":
        """One that says notes alone; what is added to its result is added to this one's."""
        speaker = Speaker(quiet=True)
        speaker._more = self._more
        return speaker

    def add(self, **values: Any) -> None:
        """What the result holds besides, whichever command gives it."""
        self._more.update(values)

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
            terminal.print_json({**values, **self._more})


@contextlib.contextmanager
def stdout_to_stderr(*, when: bool) -> Iterator[None]:
    """Sends what is printed inside to stderr, so that stdout holds JSON alone."""
    with contextlib.redirect_stdout(sys.stderr) if when else contextlib.nullcontext():
        yield


def print_params(options: Any) -> None:
    """Prints the settings in use, sorted by name, as the reference's scripts do."""
    print("Params:")
    for name, value in sorted(_values(options).items()):
        print(hidden_in(f"  {name}: {value}"))


def _values(options: Any) -> dict[str, Any]:
    """The settings under the names they have in Chinese-CLIP, which `options.RENAMED` gives where ours differ."""
    names: dict[str, str] = getattr(options, "RENAMED", {})
    return {names.get(field.name, field.name): getattr(options, field.name) for field in fields(options)}
