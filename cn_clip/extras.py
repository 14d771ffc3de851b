"""Optional packages: one helper that imports them, or says how to install them."""

import importlib
from types import ModuleType

from cn_clip.errors import MissingExtraError


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
            f"{purpose} needs the package `{package}`{reason}; install it with: pip install 'cn_clip[{extra}]'"
        ) from error
    except Exception as error:  # matplotlib, say, when MPLBACKEND names what it does not have
        raise MissingExtraError(f"{purpose} needs the package `{module}`, which does not load: {error}") from error
