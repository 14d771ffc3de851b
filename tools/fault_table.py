"""Prints what every command that writes does on a disk or with an input at fault, as a Markdown table.

python tools/fault_table.py [COMMAND ...]

It runs each command in this process over a small world of files, on a disk of 8 MB if it may mount one (Linux, root).
Exits with 1 when a command gives no sentence, or changes what was there.
"""

import contextlib
import io
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import write_faults  # noqa: E402
from command_lines import LINES, with_index, writing_commands  # noqa: E402


def rows(commands: list[str], folder: Path) -> Iterator[tuple[str, str, write_faults.Outcome]]:
    """(command, fault, how it ended) of every case, as `tests/test_faulty_paths.py` tries them."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        (folder / "world").mkdir()
        paths = with_index(folder / "world")
    disk = write_faults.SmallDisk(folder / "disk")
    try:
        for command in commands:
            for fault in write_faults.OUTPUT_FAULTS:
                if (command, fault) not in write_faults.NOT_TRIED:
                    yield command, fault, write_faults.with_output_fault(fault, command, paths, disk)
            for slot, fault in write_faults.input_cases(command):
                place = folder / "inputs" / f"{command}-{slot}-{fault}".replace(" ", "-")
                place.mkdir(parents=True)
                outcome = write_faults.with_input_fault(fault, slot, command, paths, place)
                yield command, f"{fault}: {LINES[command].slots[slot].removeprefix('read ')} {slot}", outcome
    finally:
        disk.close()


def main() -> None:
    """Prints the table as it goes."""
    warnings.simplefilter("ignore")
    commands = sys.argv[1:] or writing_commands()
    num_wrong = 0
    print("| command | fault | status | sentence | old output |\n| --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        for command, fault, outcome in rows(commands, Path(folder)):
            num_wrong += not outcome.is_refusal
            sentence = outcome.sentence.replace(folder, "").replace("|", "\\|")
            left = "untouched" if not outcome.changed else f"changed: {', '.join(outcome.changed)}"
            print(f"| {command} | {fault} | {outcome.code} | {sentence} | {left} |", flush=True)
    print(f"\n{num_wrong} cases without a sentence, or with a changed output", file=sys.stderr)
    sys.exit(num_wrong > 0)


if __name__ == "__main__":
    main()
