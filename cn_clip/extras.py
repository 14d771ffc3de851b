"""Optional packages: one helper that imports them, or says how to install them."""

import importlib
import re
from types import ModuleType

from cn_clip.errors import MissingExtraError

# The name on the registry; `cn_clip` there is another package, of the same import name.
DISTRIBUTION = "cn-clip-next"


def install_command(extra: str) -> str:
    """The command that installs this package with `extra`."""
    return f"pip install '{DISTRIBUTION}[{extra}]'"


def recommended(message: str) -> str | None:
    """What the command in `message` installs, such as cn-clip-next[photos]; None where there is none."""
    found = re.search(rf"pip install '({DISTRIBUTION}\[[\w-]+\])'", message)
    return found[1] if found else None


def require(module: str, *, extra: str, purpose: str) -> ModuleType:
    """Imports `module`; raises MissingExtraError naming the purpose, the package at fault and the pip command.

    The package may be another that `module` needs; the reason stands beside it where it is there and does not load.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = (error.name or module).split(".")[0]
        reason = "" if isinstance(error, ModuleNotFoundError) else f" ({error})"
        raise MissingExtraError(
            f"{purpose} needs the package `{package}`{reason}; install it with: {install_command(extra)}"
        ) from error
    except Exception as error:  # matplotlib, say, when MPLBACKEND names what it does not have
        raise MissingExtraError(f"{purpose} needs the package `{module}`, which does not load: {error}") from error
