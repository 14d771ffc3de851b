"""Installs packages beside the Python that runs it: by uv, which is several times quicker, or by pip.

Says first how much may be downloaded; on a terminal uv and pip show how far they are.
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


def both(in_chinese: str, in_english: str) -> str:
    """The one in the reader's language, as `cn_clip.language` has it, which needs what is installed here."""
    names = ("CN_CLIP_LANG", "LC_ALL", "LC_MESSAGES", "LANG")
    chosen = next((os.environ[name] for name in names if os.environ.get(name)), "")
    can_write = (
        (getattr(sys.stderr, "encoding", None) or "").lower().replace("-", "").startswith(("utf", "gb", "cp936"))
    )
    return in_chinese if chosen.startswith("zh") and can_write else in_english


def main(arguments: list[str]) -> int:
    """Installs; returns the exit status."""
    line = both(
        "安装依赖。第一次要下载几百 MB；Linux 上 PyPI 的 PyTorch 带着 CUDA 的库，约 3 GB。换镜像的办法见 README。",
        "Installing dependencies. The first time this downloads several hundred MB; on Linux about 3 GB, since PyTorch "
        "from PyPI brings CUDA's libraries. For mirrors see README.",
    )
    print(line, file=sys.stderr, flush=True)
    quiet = [] if sys.stderr.isatty() else ["--quiet"]
    listed = subprocess.run([*PIP, "config", "list"], capture_output=True, encoding="utf-8", check=True).stdout
    variables = variables_for_uv(listed)
    # Asked for on every call, it costs half a second once it is there.
    if (
        variables is not None
        and subprocess.run([*PIP, "install", "--quiet", "uv"], capture_output=True).returncode == 0
    ):
        # As pip does: the newest release of all indexes, not of the first index that has one.
        command = [sys.executable, "-m", "uv", "pip", "install", *quiet, "--index-strategy", "unsafe-best-match"]
        done = subprocess.run([*command, "--python", sys.executable, *arguments], env=variables | os.environ)
        if done.returncode == 0:
            return 0
        line = both("uv 没能装好，改用 pip", "uv could not install them; trying pip")
        print(line, file=sys.stderr, flush=True)
    return subprocess.run([*PIP, "install", *quiet, *arguments]).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
