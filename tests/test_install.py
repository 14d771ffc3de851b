"""What installs the package: pyproject.toml, constraints.txt, Makefile and Dockerfile agree with each other."""

import ast
import json
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from cn_clip import command, extras
from cn_clip.serve.main import Options

ROOT = Path(__file__).parents[1]
PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
CONSTRAINTS = [
    Requirement(line)
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    if line and not line.startswith("#")
]
# Torch releases on which the whole test suite passed; the range of the package ends after the newest.
TESTED_TORCH = ("2.13.0", "2.14.1")


# Where people are told what to install.
TOLD = [
    path
    for pattern in (
        "*",
        "cn_clip/**/*",
        "docs/**/*",
        "examples/**/*",
        "notebooks/*",
        "run_scripts/*",
        "tools/**/*",
        "tests/*",
    )
    for path in sorted(ROOT.glob(pattern))
    if path.suffix in (".py", ".md", ".json", ".toml", ".sh", ".txt", ".yaml", ".yml", ".ipynb", ".html", ".js", "")
    and path.is_file()
]


def requirement(name: str) -> Requirement:
    found = re.search(rf'^  "({name}[<>=].*)",$', PYPROJECT, re.MULTILINE)
    assert found is not None
    return Requirement(found[1])


def dockerfile() -> dict[str, list[str]]:
    """Instruction -> what follows it, continued lines joined."""
    lines = re.sub(r"\\\n\s*", "", (ROOT / "Dockerfile").read_text(encoding="utf-8")).splitlines()
    found: dict[str, list[str]] = {}
    for line in lines:
        if line and not line.startswith("#"):
            word, _, rest = line.partition(" ")
            found.setdefault(word, []).append(rest)
    return found


def test_constraints_lie_in_the_range_of_the_package() -> None:
    for one in CONSTRAINTS:
        (version,) = one.specifier
        assert version.operator == "=="
        assert requirement(one.name).specifier.contains(version.version)


def test_originals_are_not_given_by_a_starlette_that_many_ranges_hold_up() -> None:
    (serve,) = re.findall(r"^serve = (\[.*\])$", PYPROJECT, re.MULTILINE)
    (found,) = [one for one in map(Requirement, ast.literal_eval(serve)) if one.name == "starlette"]
    assert not found.specifier.contains("0.49.0")  # CVE-2025-62727
    assert found.specifier.contains("1.10.0")


def test_the_range_of_torch_ends_after_the_newest_tested() -> None:
    bound = requirement("torch").specifier
    assert all(bound.contains(version) for version in TESTED_TORCH)
    major, minor, _ = map(int, TESTED_TORCH[-1].split("."))
    assert not bound.contains(f"{major}.{minor + 1}.0")


def test_make_and_docker_install_under_the_constraints() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    installs = [line for line in makefile.splitlines() if "install.py" in line or "pip install" in line]
    assert installs == ["INSTALL := $(BIN)/python tools/install.py $(addprefix --constraint ,$(CONSTRAINTS))"]
    (run,) = (one for one in dockerfile()["RUN"] if "pip" in one)
    for step in run.split("&&"):
        words = shlex.split(step)
        assert words[:2] == ["pip", "install"]
        assert words[words.index("--constraint") + 1] == "constraints.txt"
    copied = [name for line in dockerfile()["COPY"] for name in line.split()[:-1]]
    assert "constraints.txt" in copied
    assert all((ROOT / name).exists() for name in copied)


def test_the_image_and_compose_agree_on_ports_paths_and_health() -> None:
    image = runpy.run_path(str(ROOT / "tools" / "try_image.py"))
    found = image["instructions"]((ROOT / "Dockerfile").read_text(encoding="utf-8"))
    services = yaml.safe_load((ROOT / "compose.yaml").read_text(encoding="utf-8"))["services"]
    assert image["check_agreement"](found, services) == 8000
    services["serve"]["ports"] = ["127.0.0.1:8000:8080"]
    with pytest.raises(AssertionError):
        image["check_agreement"](found, services)


INSTALLER = runpy.run_path(str(ROOT / "tools" / "install.py"))


def test_uv_is_given_the_settings_of_pip() -> None:
    listed = [
        ":env:.find-links='/a /b'",
        ":env:.index-url='https://mirror/simple'",
        ":env:.disable-pip-version-check='1'",
        "download.pre='true'",
        "global.index-url='https://other/simple'",
        "global.extra-index-url='\\nhttps://one\\nhttps://two'",
        "install.constraint='pins.txt'",
    ]
    assert INSTALLER["variables_for_uv"]("\n".join(listed)) == {
        "UV_FIND_LINKS": "/a,/b",
        "UV_DEFAULT_INDEX": "https://mirror/simple",
        "UV_INDEX": "https://one https://two",
        "UV_CONSTRAINT": "pins.txt",
    }
    assert INSTALLER["variables_for_uv"]("") == {}


@pytest.mark.parametrize("setting", ["global.no-binary=':all:'", ":env:.pre='1'", "install.require-hashes='true'"])
def test_pip_installs_when_it_has_a_setting_that_uv_may_not_share(setting: str) -> None:
    assert INSTALLER["variables_for_uv"](setting) is None


@pytest.mark.parametrize("has_uv", [True, False], ids=["uv fails", "no uv"])
def test_pip_installs_when_uv_cannot(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], has_uv: bool
) -> None:
    ran: list[list[str]] = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        ran.append(list(command[1:]))
        fails = "uv" in command and (not has_uv or "pip" in command[3:])
        return subprocess.CompletedProcess(command, int(fails), stdout="")

    monkeypatch.setattr(subprocess, "run", run)
    assert INSTALLER["main"](["--editable", "."]) == 0
    assert ran[-1] == ["-m", "pip", "install", "--quiet", "--editable", "."]
    assert [command[1] for command in ran] == ["pip", "pip", *["uv"] * has_uv, "pip"]
    told = capfd.readouterr().err
    assert ("trying pip" in told) is has_uv
    assert told.startswith("Installing dependencies. The first time this downloads several hundred MB")


def test_the_image_installs_torch_for_processors_before_anything_that_wants_it() -> None:
    (run,) = (one for one in dockerfile()["RUN"] if "pip" in one)
    first, second = map(shlex.split, run.split("&&"))
    assert first[-1] == "torch"
    assert first[first.index("--index-url") + 1].endswith("/cpu")
    assert second[-1].startswith(".[")
    extras = set(second[-1][2:-1].split(","))
    assert extras <= set(re.findall(r"^([a-z-]+) = \[", PYPROJECT, re.MULTILINE))


def test_the_commands_of_the_image_are_ones_that_every_processor_can_run() -> None:
    entry, default = (json.loads(dockerfile()[word][0]) for word in ("ENTRYPOINT", "CMD"))
    services = yaml.safe_load((ROOT / "compose.yaml").read_text(encoding="utf-8"))["services"]
    assert entry == ["cn-clip"]
    for name, *options in (default, services["serve"]["command"]):
        assert name == "serve"
        assert command.parse(Options, options).precision == "auto"
    assert "--precision=auto" in services["index"]["command"]


def test_classifiers_name_the_pythons_that_are_supported() -> None:
    named = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', PYPROJECT)
    found = re.search(r'^requires-python = "(.*)"$', PYPROJECT, re.MULTILINE)
    assert found is not None
    assert all(SpecifierSet(found[1]).contains(f"{version}.0") for version in named)
    assert f"{sys.version_info.major}.{sys.version_info.minor}" in named


def test_the_wheel_holds_every_file_of_the_package() -> None:
    (given,) = re.findall(r"^cn_clip = (\[.*\])$", PYPROJECT, re.MULTILINE)
    package = ROOT / "cn_clip"
    packed = {path for pattern in json.loads(given) for path in package.glob(pattern)}
    files = {path for path in package.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
    assert files - packed == set()


def test_the_registry_has_this_package_under_its_own_name() -> None:
    (name,) = re.findall(r'^\[project\]\nname = "(.*)"$', PYPROJECT, re.MULTILINE)
    assert name == extras.DISTRIBUTION
    assert extras.install_command("onnx") == "pip install 'cn-clip-next[onnx]'"
    assert extras.recommended(f"needs heif; {extras.install_command('photos')}; more") == "cn-clip-next[photos]"
    assert extras.recommended("is damaged") is None


def test_nobody_is_told_to_install_the_other_package_of_this_import_name() -> None:
    wrong = re.compile(
        r"""pip3? install [^\n`|&;]*?(?<![\w.-])cn[_-]clip(?!-next|[\w]|==1\.)|cn[\\]?[_-]clip\[[a-z.{]"""
    )
    assert wrong.search("pip install -U 'cn_clip[onnx]'")
    assert wrong.search("pip install cn-clip")
    assert wrong.search("缺 cn_clip[photos]")
    assert not wrong.search("pip install cn_clip==1.6.0; pip install 'cn-clip-next[onnx]'; pip uninstall cn_clip")
    assert len(TOLD) > 300
    found = [
        f"{path.relative_to(ROOT)}: {one[0]}"
        for path in TOLD
        if path != Path(__file__)
        for one in wrong.finditer(path.read_text(encoding="utf-8"))
    ]
    assert found == []


def test_every_extra_that_is_recommended_exists() -> None:
    known = set(re.findall(r"^([a-z-]+) = \[", PYPROJECT, re.MULTILINE))
    named = {
        extra
        for path in TOLD
        for listed in re.findall(r"cn-clip-next\[([a-z,-]+)\]|-e '\.\[([a-z,-]+)\]'", path.read_text(encoding="utf-8"))
        for extra in ",".join(filter(None, listed)).split(",")
    }
    assert {"onnx", "photos", "lora"} <= named
    assert named - known == set()
