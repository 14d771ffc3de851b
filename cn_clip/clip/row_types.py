"""In which type rows are handed out: float32, or float16 and int8, which take less memory."""

# B rows, D embedding

from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypeVar, cast, get_args

import numpy as np
from numpy.typing import NDArray

from cn_clip import spelling
from cn_clip.clip.backends.base import Rows
from cn_clip.clip.picture_arrays import is_tensor
from cn_clip.errors import ConfigError

if TYPE_CHECKING:
    import torch

RowType: TypeAlias = Literal["float32", "float16", "int8"]
Output: TypeAlias = Literal["numpy", "torch"]
RowsT = TypeVar("RowsT", "NDArray[Any]", "torch.Tensor")
# The largest value of a row in int8.
_LARGEST = 127


def check_output(output: str) -> Output:
    """`output` as a type; raises ConfigError for any other."""
    if output not in get_args(Output):
        raise ConfigError(f"output: expected one of {list(get_args(Output))}, got {output!r}")
    return cast("Output", output)


def row_type(dtype: object) -> RowType:
    """The type that a name, `np.float16` or `torch.float16` means; raises ConfigError for any other."""
    name = dtype if isinstance(dtype, str) else getattr(dtype, "__name__", None) or str(dtype)
    name = name.removeprefix("torch.")
    known = get_args(RowType)
    if name not in known:
        raise ConfigError(f"dtype: expected one of {list(known)}, got {dtype!r}{spelling.meant(name, known)}")
    return cast("RowType", name)


def of_type(rows_BD: "Rows | torch.Tensor", wanted: RowType) -> "NDArray[Any] | torch.Tensor":
    """Unit float32 rows in another type, on the device where they are.

    int8: each row times 127 / its largest absolute value, rounded. The factor is not kept: such a row has a direction
    and no length, so compare by cosine (`Encoder.similarity`, `Encoder.top_k`, an index with that metric), never by
    inner product. Measured cosines to float32: 0.9999 of Emoji-Tiny, 0.9994 where one of 512 values is 0.65.
    Example: (0.6, -0.8) -> (95, -127); (95, -127) / 158.6 = (0.599, -0.801).
    """
    if wanted == "float32":
        return rows_BD
    if is_tensor(rows_BD):
        import torch

        if wanted == "float16":
            return rows_BD.to(torch.float16)
        return (rows_BD * (_LARGEST / rows_BD.abs().amax(dim=1, keepdim=True))).round().to(torch.int8)
    rows = cast("Rows", rows_BD)
    if wanted == "float16":
        return rows.astype(np.float16)
    largest_B1 = np.abs(rows).max(axis=1, keepdims=True, initial=0)
    small: NDArray[np.int8] = np.rint(rows * (np.float32(_LARGEST) / largest_B1)).astype(np.int8)
    return small
