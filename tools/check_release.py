"""Builds what a release publishes, and checks it: `make release-check`. Leaves the sdist and the wheel in dist/.

python tools/check_release.py: of a Python that has build, twine and the dependencies. Tracked files only go in.
"""

import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path, PurePosixPath

import yaml

ROOT = Path(__file__).resolve().parents[1]
# A line of each licence that the expression of pyproject.toml names.
LICENCES = {
    "MIT": "MIT License",
    "Apache-2.0": "Apache License",
    "CC-BY-4.0": "Attribution 4.0 International",
    "Unicode-3.0": "UNICODE LICENSE V3",
    "OFL-1.1": "SIL OPEN FONT LICENSE",
}


def main() -> None:
    """Stops at the first fault, with one line."""
    version = told_version()
    facts = published_facts(ROOT, version)
    for note in facts:
        print(f"注意 / note: {note}")
    dist = ROOT / "dist"
    shutil.rmtree(dist, ignore_errors=True)
    with tempfile.TemporaryDirectory() as folder:
        copy_tracked(Path(folder))
        step("build", "--no-isolation", "--outdir", str(dist), folder)
    sdist, wheel = dist / f"cn_clip_next-{version}.tar.gz", dist / f"cn_clip_next-{version}-py3-none-any.whl"
    step("twine", "check", "--strict", str(sdist), str(wheel))
    check_contents(members_of_sdist(sdist), "cn_clip_next.py", "pyproject.toml", "CHANGELOG.md", "CITATION.cff")
    check_contents(members_of_wheel(wheel), "cn_clip_next.py", "cn_clip/py.typed")
    subprocess.run([ROOT / "tools" / "try_wheel.sh", sys.executable, wheel], check=True)
    for path in (sdist, wheel):
        print(f"{path.relative_to(ROOT)}: {path.stat().st_size / 1e6:.1f} MB")


def told_version() -> str:
    """`__version__`, read without importing."""
    return stated(ROOT / "cn_clip" / "__init__.py", r'^__version__ = "(.+)"$')


def stated(path: Path, pattern: str) -> str:
    """What the pattern's group 1 is in a file; exits where it is not there."""
    found = re.search(pattern, path.read_text(encoding="utf-8"), re.MULTILINE)
    if found is None:
        sys.exit(f"{path}: nothing that matches {pattern}")
    return found[1]


def published_facts(root: Path, version: str) -> list[str]:
    """Notes on what is not ready; exits where files disagree on the version, or a tagged version has no date."""
    notes = []
    cited = str(yaml.safe_load((root / "CITATION.cff").read_text(encoding="utf-8"))["version"])
    if cited != version:
        sys.exit(f"CITATION.cff: version {cited}, expected {version} as in cn_clip/__init__.py")
    tagged = subprocess.run(
        ["git", "tag", "--points-at", "HEAD"], cwd=root, capture_output=True, text=True, encoding="utf-8"
    ).stdout.split()
    if tagged and f"v{version}" not in tagged:
        sys.exit(f"tag {', '.join(tagged)}: expected v{version}, the version in cn_clip/__init__.py")
    for name in ("CHANGELOG.md", "CHANGELOG_En.md"):
        newest, date = re.findall(r"^## \[(.+?)\] - (.+)$", (root / name).read_text(encoding="utf-8"), re.MULTILINE)[0]
        if newest != version:
            sys.exit(f"{name}: the newest section is {newest}, expected {version}")
        if not re.fullmatch(r"\d{4}-\d\d-\d\d", date):
            if tagged:
                sys.exit(f"{name}: {version} is tagged, but has {date!r} in place of a date")
            notes.append(f"{name}: {version} has no date yet")
    if "Repository" not in (root / "pyproject.toml").read_text(encoding="utf-8").partition("[project.urls]")[2][:500]:
        notes.append("pyproject.toml: [project.urls] has no Repository; add the address of the public repository")
    return notes


def copy_tracked(folder: Path) -> None:
    """The files that git knows, as they are in the working tree."""
    names = (
        subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout.decode().split("\0")
    )
    for name in filter(None, names):
        source = ROOT / name
        if source.is_file() and not source.is_symlink():
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target)


def step(module: str, *arguments: str) -> None:
    """Runs a module; exits with its status if it fails."""
    print(f"$ python -m {module} {' '.join(arguments)}", flush=True)
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments], stdout=subprocess.PIPE, text=True, encoding="utf-8"
    )
    if done.returncode:
        print(done.stdout)
        sys.exit(done.returncode)


def members_of_sdist(path: Path) -> dict[str, bytes]:
    """Path inside the one folder -> content."""
    with tarfile.open(path) as archive:
        files = [one for one in archive.getmembers() if one.isfile()]
        return {str(PurePosixPath(*Path(one.name).parts[1:])): archive.extractfile(one).read() for one in files}  # type: ignore[union-attr]


def members_of_wheel(path: Path) -> dict[str, bytes]:
    """Path -> content."""
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def check_contents(members: dict[str, bytes], *wanted: str) -> None:
    """Exits where a file of the package, one of `wanted` or the text of a licence is not there."""
    package = subprocess.run(
        ["git", "ls-files", "cn_clip"], cwd=ROOT, capture_output=True, text=True, encoding="utf-8", check=True
    ).stdout
    missing = {*package.split("\n"), *wanted, ""} - members.keys() - {""}
    if missing:
        sys.exit(f"not packed: {', '.join(sorted(missing))}")
    texts = [content for name, content in members.items() if "LICENSE" in name or name.endswith("NOTICE.md")]
    for licence, line in LICENCES.items():
        if not any(line.lower().encode() in text.lower() for text in texts):
            sys.exit(f"the text of {licence} is not packed")


if __name__ == "__main__":
    main()
