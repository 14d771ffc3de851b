"""What was made last, kept so that it need not be made again, in a bounded number of bytes."""

from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, TypeVar

KeyT = TypeVar("KeyT")
ValueT = TypeVar("ValueT")


class Recent(Generic[KeyT, ValueT]):
    """Values by key, in at most `most_bytes`; those asked for longest ago go first. For one thread."""

    def __init__(self, most_bytes: int, bytes_of: Callable[[ValueT], int]) -> None:
        self.most_bytes, self.num_bytes, self._bytes_of = most_bytes, 0, bytes_of
        self._kept: OrderedDict[KeyT, ValueT] = OrderedDict()

    def get(self, key: KeyT) -> ValueT | None:
        """The value, which counts as asked for now; None where it is not kept."""
        if key not in self._kept:
            return None
        self._kept.move_to_end(key)
        return self._kept[key]

    def put(self, key: KeyT, value: ValueT) -> None:
        """Keeps a value; one that is larger than all of the room is not kept."""
        if (before := self._kept.pop(key, None)) is not None:
            self.num_bytes -= self._bytes_of(before)
        self._kept[key] = value
        self.num_bytes += self._bytes_of(value)
        while self.num_bytes > self.most_bytes:
            _, oldest = self._kept.popitem(last=False)
            self.num_bytes -= self._bytes_of(oldest)
