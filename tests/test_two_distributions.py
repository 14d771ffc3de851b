"""This package beside the registry's cn_clip 1.x, which has the same import folder: the command says what to do."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import cn_clip
import cn_clip_next

ROOT = Path(__file__).parents[1]
# Files of cn_clip 1.6.0 that this package has too.
SHARED = ("__init__.py", "clip/__init__.py", "clip/utils.py", "eval/__init__.py", "training/main.py")


def make_package(site: Path, *, ours: bool) -> Path:
    folder = site / "cn_clip"
    (folder / "clip").mkdir(parents=True)
    (folder / "__init__.py").write_text('__version__ = "2.0.0"\n' if ours else "")
    if ours:
        (folder / "cli.py").write_text("def main() -> None:\n    print('runs')\n")
    return folder


def start(site: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs the command where Python finds nothing but its own library and `site`."""
    code = f"import runpy, sys; sys.path.insert(0, {str(site)!r}); runpy.run_path({cn_clip_next.__file__!r})['main']()"
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("LC_", "LANG", "CN_CLIP_"))}
    return subprocess.run(
        [sys.executable, "-I", "-S", "-X", "utf8", "-c", code],
        env={**clean, **environment},
        capture_output=True,
        encoding="utf-8",
        cwd=site,
    )


def test_nothing_is_said_where_the_original_is_not_installed(tmp_path: Path) -> None:
    make_package(tmp_path, ours=True)
    (tmp_path / "cn_clip-2.0.0.dist-info").mkdir()  # the name that an older clone of this project was installed under
    done = start(tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "runs\n", "")


def test_our_files_over_those_of_the_original_run_with_a_warning(tmp_path: Path) -> None:
    folder = make_package(tmp_path, ours=True)
    (tmp_path / "cn_clip-1.6.0.dist-info").mkdir()
    done = start(tmp_path)
    assert (done.returncode, done.stdout) == (0, "runs\n")
    assert done.stderr.startswith(f"warning: {folder}: the original package cn_clip 1.6.0 is installed here too; ")
    assert f"run: {cn_clip_next.REMEDY}" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("rest_is_ours", [True, False], ids=["over ours", "alone, ours is editable"])
def test_files_of_the_original_over_ours_end_the_command_with_one_line(tmp_path: Path, rest_is_ours: bool) -> None:
    folder = make_package(tmp_path, ours=rest_is_ours)
    (folder / "__init__.py").write_text("")
    (tmp_path / "cn_clip-1.6.0.dist-info").mkdir()
    done = start(tmp_path, LANG="zh_CN.UTF-8")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"错误: {folder}: 这个环境里还装着原版 cn_clip 1.6.0，import cn_clip 导入的是它；")
    assert cn_clip_next.REMEDY in done.stderr
    assert done.stderr.count("\n") == 1


def test_files_that_the_uninstalled_original_took_along_are_missed(tmp_path: Path) -> None:
    folder = make_package(tmp_path, ours=True)
    (folder / "__init__.py").unlink()
    done = start(tmp_path, CN_CLIP_LANG="en", LANG="zh_CN.UTF-8")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"error: {folder}: files of cn-clip-next are missing, ")


def test_a_folder_that_python_does_not_find_is_missed() -> None:
    line = cn_clip_next.problem(cn_clip_next.look(None))
    assert line is not None
    assert line.startswith("cn_clip: ")


def test_this_checkout_is_well() -> None:
    assert cn_clip_next.look(ROOT / "cn_clip") == cn_clip_next.Found(ROOT / "cn_clip", True, None)


# --- really installed


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The wheel of this checkout, and one with files of the original's names, of its name and version."""
    place = tmp_path_factory.mktemp("wheels")
    source = place / "source"
    source.mkdir()
    names = ["cn_clip", "cn_clip_next.py", "tools/emoji_dataset", "tools/grid_font"]
    names += ["pyproject.toml", "README.md", "LICENSE", "NOTICE.md"]
    packed = subprocess.run(["tar", "-C", str(ROOT), "-cf", "-", *names], capture_output=True, check=True)
    subprocess.run(["tar", "-C", str(source), "-xf", "-"], input=packed.stdout, check=True)
    pip(sys.executable, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(place), str(source))
    original = place / "cn_clip-1.6.0-py3-none-any.whl"
    about = "cn_clip-1.6.0.dist-info"
    with zipfile.ZipFile(original, "w") as archive:
        files = {f"cn_clip/{name}": "" for name in SHARED}
        files[f"{about}/METADATA"] = "Metadata-Version: 2.1\nName: cn_clip\nVersion: 1.6.0\n"
        files[f"{about}/WHEEL"] = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        for name, text in files.items():
            archive.writestr(name, text)
        archive.writestr(f"{about}/RECORD", "".join(f"{name},,\n" for name in [*files, f"{about}/RECORD"]))
    (ours,) = place.glob("cn_clip_next-*.whl")
    return {"ours": ours, "theirs": original}


def pip(python: str | Path, command: str, *arguments: str) -> None:
    quiet = ("--quiet", "--disable-pip-version-check")
    subprocess.run([sys.executable, "-m", "pip", "--python", str(python), command, *quiet, *arguments], check=True)


def version_told(environment: Path) -> subprocess.CompletedProcess[str]:
    clean = {"PATH": os.environ["PATH"], "LANG": "C.UTF-8"}
    command = [str(environment / "bin" / "cn-clip"), "--version"]
    return subprocess.run(command, env=clean, cwd=environment, capture_output=True, encoding="utf-8")


@pytest.mark.long
@pytest.mark.parametrize("last", ["ours", "theirs"])
def test_both_installed_are_noticed_and_the_remedy_works(tmp_path: Path, wheels: dict[str, Path], last: str) -> None:
    environment = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
    python = environment / "bin" / "python"
    install = ("--no-deps", "--no-index", "--no-compile")
    for which in ("theirs", "ours") if last == "ours" else ("ours", "theirs"):
        pip(python, "install", *install, str(wheels[which]))
    done = version_told(environment)
    assert "cn_clip 1.6.0 is installed here too" in done.stderr
    assert done.returncode == (0 if last == "ours" else 1)
    assert done.stdout == (f"cn-clip {cn_clip.__version__}\n" if last == "ours" else "")
    # The two steps of the remedy; the first alone takes files of ours along.
    pip(python, "uninstall", "-y", "cn_clip")
    done = version_told(environment)
    assert (done.returncode, done.stdout) == (1, "")
    assert "files of cn-clip-next are missing" in done.stderr
    pip(python, "install", *install, "--force-reinstall", str(wheels["ours"]))
    done = version_told(environment)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"cn-clip {cn_clip.__version__}\n", "")
