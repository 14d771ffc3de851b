"""Optional packages: one helper that imports them, or says how to install them."""

import importlib
from types import ModuleType

from cn_clip.errors import MissingExtraError


def require(module: str, *, extra: str, purpose: str) -> ModuleType:
    """Imports `module`; raises MissingExtraError naming the purpose and the pip command when it is absent."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtraError(
            f"{purpose} needs the package `{module.split('.')[0]}`; install it with: pip install 'cn_clip[{extra}]'"
        ) from error
