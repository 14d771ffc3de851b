"""Runs the steps of the Dockerfile and the services of compose.yaml without Docker: in a bare venv, on two pictures.

python tools/try_image.py                     # installs as the image does (1.5 GB)
python tools/try_image.py --installed .venv   # only the services, with what a venv has

Paths of the image become folders below a temporary one. What makes users and folders is not run; the FROM line, which
only names Python, is not looked at.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
import venv
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
KEY = "try-image-0123456789abcdef"
# One that is in the package: nothing is downloaded.
MODEL = "Emoji-Tiny"


def instructions(text: str) -> list[tuple[str, str]]:
    """(word, what follows) of a Dockerfile, continued lines joined."""
    lines = re.sub(r"\\\n\s*", "", re.sub(r"^#.*\n", "", text, flags=re.MULTILINE)).splitlines()
    return [(line.partition(" ")[0], line.partition(" ")[2].strip()) for line in lines if line.strip()]


def words(found: list[tuple[str, str]], name: str) -> list[str]:
    """The JSON list of the one instruction called so."""
    (given,) = [rest for word, rest in found if word == name]
    return list(json.loads(given[given.index("[") :]))


def install(found: list[tuple[str, str]], folder: Path) -> Path:
    """Copies and installs as the image is built; returns the folder of its programs."""
    venv.create(folder / "venv", with_pip=True)
    app, programs = folder / "app", folder / "venv" / "bin"
    app.mkdir()
    for word, rest in found:
        if word == "COPY":
            *sources, target = rest.split()
            for source in sources:
                if (ROOT / source).is_dir():
                    shutil.copytree(ROOT / source, app / target, ignore=shutil.ignore_patterns("__pycache__"))
                else:
                    shutil.copy(ROOT / source, app / target)
        elif word == "RUN" and "pip" in rest:
            environment = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}"}
            subprocess.run(["sh", "-ec", rest], cwd=app, env=environment, check=True)
    return programs


def command_of(service: dict[str, Any], programs: Path, entry: list[str], places: dict[str, Path]) -> list[str]:
    """What a service of compose.yaml runs, with its variables filled in and its paths below the temporary folder."""
    filled = []
    for word in service["command"]:
        word = re.sub(r"\$\{CN_CLIP_MODEL[^}]*\}", MODEL, word)
        for path, place in places.items():
            word = re.sub(rf"(^|=){path}(?=/|$)", rf"\g<1>{place}", word)
        filled.append(word)
    return [str(programs / entry[0]), *entry[1:], *filled]


def check_agreement(found: list[tuple[str, str]], services: dict[str, Any]) -> int:
    """The port; fails where ports, paths and the health check of the two files do not agree."""
    exposed = {int(rest) for word, rest in found if word == "EXPOSE"}
    (port,) = exposed
    serve, index = services["serve"], services["index"]
    assert [one.rsplit(":", 1)[1] for one in serve["ports"]] == [str(port)], serve["ports"]
    assert f"--port={port}" in serve["command"]
    default = words(found, "CMD")
    assert default[default.index("--port") + 1] == str(port), default
    assert f":{port}/readyz" in " ".join(words(found, "HEALTHCHECK"))
    assert index["healthcheck"] == {"disable": True}
    assert serve["depends_on"] == {"index": {"condition": "service_completed_successfully"}}
    (output,) = [word.partition("=")[2] for word in index["command"] if word.startswith("--output=")]
    assert output in serve["command"]
    mounted = {one.rsplit(":", 2)[-1] if not one.endswith(":ro") else one.split(":")[-2] for one in serve["volumes"]}
    assert mounted == {"/photos", "/models", "/index"}, mounted
    kept = {path for word, rest in found if word == "VOLUME" for path in rest.split()}
    assert kept == {"/models", "/index"}, kept
    assert [word for word, _ in found].index("USER") > max(
        number for number, (word, _) in enumerate(found) if word == "RUN"
    )
    return port


def run_services(found: list[tuple[str, str]], services: dict[str, Any], programs: Path, folder: Path) -> None:
    """Builds an index of two pictures, serves it, asks as the health check does, and finds them."""
    port, places = check_agreement(found, services), {}
    for name in ("photos", "models", "index"):
        (folder / name).mkdir()
        places[f"/{name}"] = folder / name
    shutil.copy(ROOT / "examples" / "pokemon.jpeg", folder / "photos" / "a.jpeg")
    entry = words(found, "ENTRYPOINT")
    environment = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}", "CN_CLIP_API_KEY": KEY}
    subprocess.run(command_of(services["index"], programs, entry, places), cwd=folder, env=environment, check=True)
    command = command_of(services["serve"], programs, entry, places)
    with subprocess.Popen(command, cwd=folder, env=environment) as process:
        try:
            health = words(found, "HEALTHCHECK")
            for _ in range(600):
                if subprocess.run(health, env=environment, stderr=subprocess.DEVNULL).returncode == 0:
                    break
                assert process.poll() is None, "the service ended"
                time.sleep(0.2)
            else:
                raise AssertionError("the service is not healthy after two minutes")
            for path, headers in (("/", {}), ("/v1/index/items/a.jpeg", {"Authorization": f"Bearer {KEY}"})):
                request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", headers=headers)
                with urllib.request.urlopen(request, timeout=30) as answer:
                    assert answer.status == 200, (path, answer.status)
        finally:
            process.terminate()
    print("ok: index, serve, health check, page, original")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--installed", type=Path, help="a venv that has the package; nothing is installed")
    given = parser.parse_args()
    found = instructions((ROOT / "Dockerfile").read_text(encoding="utf-8"))
    services = yaml.safe_load((ROOT / "compose.yaml").read_text(encoding="utf-8"))["services"]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        programs = install(found, folder) if given.installed is None else given.installed.resolve() / "bin"
        run_services(found, services, programs, folder)


if __name__ == "__main__":
    sys.exit(main())
