"""Installs packages beside the Python that runs it: by uv, which is several times quicker, or by pip.

Takes the arguments of `pip install` and obeys the settings of pip, from its files and from PIP_*. The Makefile uses it:

    .venv/bin/python tools/install.py --constraint constraints.txt --editable '.[dev]'
"""

import ast
import os
import subprocess
import sys

PIP = (sys.executable, "-m", "pip")
# A setting of pip -> the variable in which uv takes it; find-links are the only ones with commas between them.
VARIABLES = {
    "index-url": "UV_DEFAULT_INDEX",
    "extra-index-url": "UV_INDEX",
    "find-links": "UV_FIND_LINKS",
    "constraint": "UV_CONSTRAINT",
    "trusted-host": "UV_INSECURE_HOST",
    "cert": "SSL_CERT_FILE",
    "proxy": "ALL_PROXY",
    "timeout": "UV_HTTP_TIMEOUT",
    "default-timeout": "UV_HTTP_TIMEOUT",
}
# These do not change what is installed.
IGNORED = {"disable-pip-version-check", "no-input", "no-color", "progress-bar", "quiet", "verbose", "retries"}
IGNORED |= {"root-user-action", "require-virtualenv", "break-system-packages", "cache-dir", "no-cache-dir"}


def variables_for_uv(listed: str) -> "dict[str, str] | None":
    """The settings that `pip config list` lists, as variables for uv; None if uv is not known to share one of them."""
    sections: dict[str, dict[str, str]] = {"global": {}, "install": {}, ":env:": {}}
    for line in listed.splitlines():
        key, _, value = line.partition("=")
        section, _, name = key.partition(".")
        if section in sections and name not in IGNORED:
            sections[section][name] = ast.literal_eval(value)
    settings = sections["global"] | sections["install"] | sections[":env:"]
    if not VARIABLES.keys() >= settings.keys():
        return None
    return {VARIABLES[name]: ("," if name == "find-links" else " ").join(settings[name].split()) for name in settings}


def main(arguments: list[str]) -> int:
    """Installs; returns the exit status."""
    listed = subprocess.run([*PIP, "config", "list"], capture_output=True, encoding="utf-8", check=True).stdout
    variables = variables_for_uv(listed)
    # Asked for on every call, it costs half a second once it is there.
    if (
        variables is not None
        and subprocess.run([*PIP, "install", "--quiet", "uv"], capture_output=True).returncode == 0
    ):
        # As pip does: the newest release of all indexes, not of the first index that has one.
        command = [sys.executable, "-m", "uv", "pip", "install", "--quiet", "--index-strategy", "unsafe-best-match"]
        done = subprocess.run([*command, "--python", sys.executable, *arguments], env=variables | os.environ)
        if done.returncode == 0:
            return 0
        print("uv 没有装成，改用 pip / uv could not install; now pip tries", file=sys.stderr, flush=True)
    return subprocess.run([*PIP, "install", "--quiet", *arguments]).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
