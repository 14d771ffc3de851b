"""Merges results into a table of Markdown: `cn-clip compare ours=recall.json clip=clip/recall.json --output table.md`.

It reads what `cn-clip recall` and `cn-clip evaluate` write, and what `cn-clip zeroshot --json` and
`cn-clip linear-probe --json` print.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NamedTuple, TypeAlias

import tyro

from cn_clip import command
from cn_clip.errors import ConfigError, DataError, Where
from cn_clip.evaluation.benchmark_sets import RESULT_FILE
from cn_clip.files import atomic_write, refuse_inputs
from cn_clip.language import both

# Percentages by column, and by the name of a row.
Values: TypeAlias = dict[str, float]
Table: TypeAlias = dict[str, Values]

# What the results call their values, and what the columns are called.
RECALL = {"r1": "R@1", "r5": "R@5", "r10": "R@10", "mean_recall": "MR"}
ZEROSHOT = {"zeroshot-top1": "top-1", "zeroshot-top5": "top-5"}
ACCURACY = {"top1": "top-1", "mean_per_class": "mean per class", "map_11_point": "11-point mAP"}
DIRECTIONS = {"text": "text→image", "image": "image→text"}
PROBE = "linear probe"
# What readers of Chinese see of a column, and may call its group.
IN_CHINESE = {"text→image": "文搜图", "image→text": "图搜文", PROBE: "线性探测", "mean per class": "各类平均"}
MISSING = "–"
# The fields that tell whose result it is.
FIELDS = ("scoreJson", "zeroshot-top1", "measured", "runs")
EXPECTED = "what cn-clip recall or evaluate wrote, or cn-clip zeroshot --json or linear-probe --json printed"


@dataclass(frozen=True)
class Options:
    """Prints a table of Markdown, a row a model, in percent, the best of each column in bold.

    NAME=FILE names the row; files of one name share a row. NAME/GROUP=FILE puts GROUP before the names of its columns,
    which tells several datasets, or both directions of retrieval, apart. A file alone is a row of its own name, and
    result.json of its folder's.
    """

    results: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="[NAME[/GROUP]=]FILE")] = ()
    """What cn-clip recall or evaluate wrote, or cn-clip zeroshot --json or linear-probe --json printed"""
    output: str | None = None
    """File to write the table into, besides printing it"""
    json: bool = False
    """Print the table as one JSON object"""

    def __post_init__(self) -> None:
        if not self.results:
            raise ConfigError(f"expected result files: {EXPECTED}")


class Source(NamedTuple):
    """A result file, and its row and group in the table."""

    row: str
    group: str
    path: Path


def run(options: Options) -> None:
    """Prints the table; raises DataError for a file that is not a result, or a value given twice."""
    sources = [source_of(given) for given in options.results]
    if options.output is not None:
        refuse_inputs("--output", options.output, [str(one.path) for one in sources])
    table = merged(sources)
    lines = markdown(table)
    if options.output is not None:
        with atomic_write(options.output) as stream:
            stream.write("".join(f"{line}\n" for line in lines))
    say = command.Speaker(quiet=options.json)
    for line in lines:
        say(line)
    say.result({"columns": columns_of(table), "rows": [{"name": name, **values} for name, values in table.items()]})


def source_of(given: str) -> Source:
    """The parts of `[NAME[/GROUP]=]FILE`; a file whose own name has a = in it is found too."""
    before, equals, after = given.partition("=")
    if not equals or Path(given).is_file():
        path = Path(given)
        return Source(path.resolve().parent.name if path.name == RESULT_FILE else path.stem, "", path)
    row, _, group = before.partition("/")
    if not row.strip() or not after:
        raise ConfigError(f"{given!r}: expected NAME=FILE or NAME/GROUP=FILE")
    in_english = {chinese: english for english, chinese in IN_CHINESE.items()}
    return Source(row.strip(), in_english.get(group.strip(), group.strip()), Path(after))


def merged(sources: Sequence[Source]) -> Table:
    """Rows and columns in the order of the files; raises DataError for a value given twice."""
    table: Table = {}
    for row, group, path in sources:
        values = table.setdefault(row, {})
        for name, value in _grouped(group, read_result(path)).items():
            if name in values:
                raise DataError(f"the row {row!r} has a value of {name} already; use NAME/GROUP=FILE", at=path)
            values[name] = value
    return table


def read_result(path: Path) -> Values:
    """Percentages by column; raises DataError for a file that is not a result, or of an evaluation that failed."""
    try:
        result = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"cannot be read as JSON ({error}); expected the result of an evaluation", at=path) from error
    if not isinstance(result, dict):
        raise DataError(f"holds a {type(result).__name__}; expected the result of an evaluation, an object", at=path)
    if result.get("success") is False:
        raise DataError(f"the evaluation failed ({result.get('errorDetail')}); run it again", at=path)
    if "scoreJson" in result and (values := _values(path, result["scoreJson"], RECALL)):
        return values
    if "zeroshot-top1" in result and (values := _values(path, result, ZEROSHOT, to_percent=100.0)):
        return values
    if "measured" in result:  # recall in each direction, or the accuracy of a zero-shot classification
        measured = result["measured"]
        values = _values(path, measured, ACCURACY)
        for query, title in DIRECTIONS.items():
            if isinstance(measured, dict) and query in measured:
                values |= _grouped(title, _values(path, measured[query], RECALL))
        if values:
            return values
    if "runs" in result and (values := _values(path, result, ACCURACY)):  # the means over the seeds
        shots = result.get("shots")  # those a class belong to the group
        return _grouped(PROBE if shots is None else f"{PROBE} {shots}-shot", values)
    raise DataError(f"has none of {', '.join(FIELDS)} with values in it; expected {EXPECTED}", at=path)


def _grouped(group: str, values: Values) -> Values:
    return {f"{group} {column}".strip(): value for column, value in values.items()}


def _values(path: Path, scores: object, names: Mapping[str, str], *, to_percent: float = 1.0) -> Values:
    values: Values = {}
    for name, column in names.items():
        value = scores.get(name) if isinstance(scores, dict) else None
        if value is None:  # top-5 of fewer than 6 classes
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= to_percent * value <= 100:
            raise DataError(
                f"expected a number from 0 to {100 / to_percent:g}, got {value!r}", at=Where(path, field=name)
            )
        values[column] = to_percent * value
    return values


def columns_of(table: Table) -> list[str]:
    """All columns, in the order of their first values."""
    return list(dict.fromkeys(column for values in table.values() for column in values))


def markdown(table: Table) -> list[str]:
    """The lines of the table: two decimals, the best of two or more values in bold, all that are equal."""
    names = columns_of(table)
    best = {name: _best([values[name] for values in table.values() if name in values]) for name in names}
    rows = [[_escaped(row), *(_cell(values.get(name), best[name]) for name in names)] for row, values in table.items()]
    head = [both("模型", "model"), *map(_escaped, map(_title, names))]
    rule = ["---", *["---:"] * len(names)]
    return [f"| {' | '.join(cells)} |" for cells in (head, rule, *rows)]


def _title(column: str) -> str:
    """A column in the reader's language."""
    in_chinese = column
    for english, chinese in IN_CHINESE.items():
        in_chinese = in_chinese.replace(english, chinese)
    return both(in_chinese, column)


def _best(values: Sequence[float]) -> float:
    """What a cell must reach to be bold, as it is shown; infinity if there is nothing to compare."""
    return round(max(values), 2) if len(values) > 1 else math.inf


def _cell(value: float | None, best: float) -> str:
    if value is None:
        return MISSING
    return f"**{value:.2f}**" if round(value, 2) >= best else f"{value:.2f}"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ")


def main(args: Sequence[str] | None = None) -> None:
    """The command line."""
    command.execute(run, Options, args)


if __name__ == "__main__":
    main()
