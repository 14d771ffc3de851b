"""Every command with a path that cannot be used, in every place where it takes one: one sentence, status 1 or 2."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import write_faults
from command_lines import LINES, line_of, with_index, writing_commands
from write_faults import INPUT_FAULTS, OUTPUT_FAULTS, SmallDisk, input_cases

from cn_clip import cli, terminal

OF_KIND = {
    "read file": ("missing", "unreadable", "folder", "garbage"),
    "read folder": ("missing", "file"),
    "write file": ("impossible", "folder"),
    "write folder": ("impossible", "file"),
}
# Names that the system refuses, whatever lies there. They meet the same lines of a command, so each place where it
# takes a path is tried with one of them, in turn; with all of them by `make test-slow`.
NAMES = ("too long", "below a file", "NUL", "loop")
# Disks and inputs at fault likewise meet few lines of the package: each command is tried with one fault in turn, those
# that start processes or export only by `make test-slow`.
LONG = {"bench", "export onnx", "export coreml"}
# `index add` goes on without pictures that cannot be decoded, and lists them.
FINE = {
    ("index add", "pictures", "file"),
    ("index add", "pictures", "unreadable"),
    ("search", "picture", "unreadable"),  # one sentence, but Pillow leaves the file open, which is a warning here
}


def in_turn(
    number: int, faults: tuple[str, ...], fault: str, command: str, *, even_if_long: str | None = None
) -> list[pytest.MarkDecorator]:
    """No mark for the fault whose turn it is; those of other turns are slow, and all of a command that takes long."""
    is_next = fault == faults[number % len(faults)]
    return [] if is_next and (command not in LONG or fault == even_if_long) else [pytest.mark.slow]


PLACES = [(command, slot, kind) for command, line in LINES.items() for slot, kind in line.slots.items()]
CASES = [
    pytest.param(
        command,
        slot,
        fault,
        id=f"{command} {slot} {fault}",
        marks=in_turn(
            number,
            NAMES if fault in NAMES else (fault,),
            fault,
            command,
            even_if_long="missing",
        ),
    )
    for number, (command, slot, kind) in enumerate(PLACES)
    for fault in (*OF_KIND[kind], *NAMES)
    if (command, slot, fault) not in FINE and (fault, kind) != ("loop", "write file")  # a link is followed
]


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return with_index(tmp_path_factory.mktemp("world"))


@pytest.fixture
def faults(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "file").write_bytes(b"\x00\xff\xfe no such thing\n")
    (tmp_path / "folder" / "inner").mkdir(parents=True)
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    return {
        "missing": str(tmp_path / "none" / "x"),
        "too long": str(tmp_path / ("长" * 200)),
        "below a file": str(tmp_path / "file" / "x" / "y"),
        "loop": str(tmp_path / "loop"),
        "NUL": f"{tmp_path}/a\0b",
        "unreadable": "/proc/self/mem",
        "impossible": "/proc/none/x",
        "folder": str(tmp_path / "folder"),
        "file": str(tmp_path / "file"),
        "garbage": str(tmp_path / "file"),
    }


def test_every_command_has_a_line() -> None:
    assert LINES.keys() == cli.COMMANDS.keys()


@pytest.mark.skipif(sys.platform != "linux", reason="/proc holds paths that cannot be read or made")
@pytest.mark.parametrize(("command", "slot", "fault"), CASES)
def test_a_path_that_cannot_be_used_is_one_sentence(
    command: str,
    slot: str,
    fault: str,
    paths: dict[str, Path],
    faults: dict[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = line_of(command, paths, tmp_path, **{slot: faults[fault]})
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as stopped:
        cli.main(words)
    printed, error = capsys.readouterr()
    assert stopped.value.code in (1, 2), error
    if command == "recall" and not error:  # it says what is wrong with a file in its result, as Chinese-CLIP does
        error = "error: " + json.loads((tmp_path / "out.out").read_text(encoding="utf-8"))["errorMsg"]
    last = error.strip().splitlines()[-1].strip()
    assert last.startswith("error: "), error
    assert "Traceback" not in printed + error
    assert len(last) > len("error: Input/output error"), "a reason without a path"
    if LINES[command].slots[slot].startswith("write"):
        assert sorted(tmp_path.rglob("*")) == before


# --- disks and inputs at fault


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SmallDisk]:
    disk = SmallDisk(tmp_path_factory.mktemp("small") / "disk")
    yield disk
    disk.close()


@pytest.mark.skipif(sys.platform != "linux", reason="small disks and capabilities are of Linux")
@pytest.mark.parametrize(
    ("command", "fault"),
    [
        pytest.param(command, fault, id=f"{command}-{fault}", marks=in_turn(number, OUTPUT_FAULTS, fault, command))
        for number, command in enumerate(writing_commands())
        for fault in OUTPUT_FAULTS
    ],
)
def test_a_disk_at_fault_is_one_sentence_and_the_old_output_stays(
    command: str, fault: str, paths: dict[str, Path], disk: SmallDisk
) -> None:
    if (command, fault) in write_faults.NOT_TRIED:
        pytest.skip(write_faults.NOT_TRIED[command, fault])
    outcome = write_faults.with_output_fault(fault, command, paths, disk)
    assert outcome.is_refusal, outcome


@pytest.mark.skipif(sys.platform != "linux", reason="small disks and capabilities are of Linux")
@pytest.mark.parametrize(
    ("command", "slot", "fault"),
    [
        pytest.param(
            command,
            slot,
            fault,
            id=f"{command} {slot} {fault}",
            marks=in_turn(number, tuple(INPUT_FAULTS), fault, command),
        )
        for number, command in enumerate(writing_commands())
        for slot, fault in input_cases(command)
    ],
)
def test_an_input_at_fault_is_one_sentence_and_the_old_output_stays(
    command: str, slot: str, fault: str, paths: dict[str, Path], tmp_path: Path
) -> None:
    outcome = write_faults.with_input_fault(fault, slot, command, paths, tmp_path)
    assert outcome.is_refusal, outcome


@pytest.mark.parametrize("said", ["embedded null byte", "stat: embedded null character in path"])
def test_a_null_character_is_named_in_the_words_of_every_python(said: str) -> None:
    assert "a path holds a NUL character" in str(terminal.explained(ValueError(said)))
    assert terminal.explained(ValueError("null")) is None
