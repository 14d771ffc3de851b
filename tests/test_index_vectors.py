"""Feature files of any size become indexes: block by block, the same as whole, and a faulty one changes nothing."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_index_commands import Command, command, refusal

from cn_clip.features.files import write_rows
from cn_clip.index import vectors as module
from cn_clip.retrieval.store import open_index

__all__ = ["command", "refusal"]  # fixtures
pytest.importorskip("pyarrow")


@pytest.fixture(params=[0, 1 << 28])
def kept(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """How many bytes of a file are kept from the first reading: none, or all."""
    monkeypatch.setattr(module, "_LARGEST_KEPT", request.param)
    return int(request.param)


def unit(count: int) -> Any:
    """Unit rows of 8 numbers."""
    rows = np.random.default_rng(0).normal(size=(count, 8)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def written(path: Path, ids: list[Any], rows: Any, *, group: int = 7) -> Path:
    """A Parquet file in row groups of a few rows."""
    blocks = (rows[start : start + group] for start in range(0, len(rows), group))
    write_rows(path, "image_id", ids, blocks, embed_dim=rows.shape[1], output_format="parquet")
    return path


@pytest.mark.usefixtures("kept")
@pytest.mark.parametrize("size", ["7", "20", "1000"])
def test_rows_keep_their_order_and_values_in_commits_of_any_size(tmp_path: Path, command: Command, size: str) -> None:
    rows, ids = unit(50), [number if number % 2 else f"图{number}" for number in range(50)]
    path = written(tmp_path / "a.parquet", ids, rows)
    index = tmp_path / "i"
    command("index", "build", str(path), "--output", str(index), "--commit-every", size)
    opened = open_index(index)
    assert opened.ids == ids
    np.testing.assert_array_equal(np.stack([opened.vector(one) for one in ids]), rows)
    said = command("index", "build", str(path), "--output", str(index), "--commit-every", size)
    assert said["unchanged"] == 50
    written(path, ids[3:], np.roll(rows, 1, axis=0)[3:])
    said = command("index", "build", str(path), "--output", str(index))
    assert (said["added"], sorted(said["removed"], key=str)) == (47, sorted(ids[:3], key=str))
    assert set(open_index(index).ids) == set(ids[3:])


@pytest.mark.usefixtures("kept")
def test_a_fault_behind_many_good_rows_changes_nothing(tmp_path: Path, refusal: Any) -> None:
    rows = unit(50)
    twice = written(tmp_path / "twice.parquet", [*range(49), 3], rows)
    assert "3 is already on row 4" in refusal("index", "build", str(twice), "--output", str(tmp_path / "i"))
    rows[44] = 0
    zero = written(tmp_path / "zero.parquet", list(range(50)), rows)
    assert "image_id 44: its features are all 0" in refusal(
        "index", "build", str(zero), "--output", str(tmp_path / "i")
    )
    rows[44, 0] = np.nan
    nan = written(tmp_path / "nan.parquet", list(range(50)), rows)
    assert "row 45 feature: holds NaN" in refusal("index", "build", str(nan), "--output", str(tmp_path / "i"))
    assert not (tmp_path / "i").exists()


def test_a_file_that_is_written_again_between_its_readings_is_noticed(
    tmp_path: Path, command: Command, refusal: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, path, index = unit(50), tmp_path / "a.parquet", str(tmp_path / "i")
    command("index", "build", str(written(path, list(range(50)), rows)), "--output", index)
    examined = module._File.examined

    def then_changed(source: Path, prefix: str) -> Any:
        file = examined(source, prefix)
        written(path, [*range(49), 77], rows)
        return file

    monkeypatch.setattr(module, "_LARGEST_KEPT", 0)
    monkeypatch.setattr(module._File, "examined", then_changed)
    assert "changed while it was read" in refusal("index", "build", str(path), "--output", index)
    assert open_index(Path(index)).ids == list(range(50))
    # During the second reading: what is there of the first is not taken for what is gone.
    path.unlink()
    file = examined(written(path, list(range(50)), rows), "")
    commits = file.commits(20)
    assert next(commits)[0] == list(range(20))
    written(path, [*range(49), 77], rows)
    with pytest.raises(module.DataError, match="changed while it was read"):
        list(commits)
