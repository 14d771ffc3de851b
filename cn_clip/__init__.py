"""Chinese-CLIP: pictures and Chinese text in one vector space, by `Encoder`; the whole API is in `cn_clip.clip`.

`Encoder` is imported when it is first asked for: `import cn_clip` brings neither PyTorch nor NumPy.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cn_clip.clip.encoder import Encoder

__version__ = "2.0.0"
__all__ = ["Encoder", "__version__"]


def __getattr__(name: str) -> Any:
    if name != "Encoder":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value = importlib.import_module("cn_clip.clip.encoder").Encoder
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
