"""The indexes that are open, by the names that requests give them; each belongs to the model of its vectors."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from cn_clip.retrieval.addresses import Searchable
from cn_clip.serve.runner import Runner
from cn_clip.serve.schemas import RefusalError, shown


@dataclass(frozen=True)
class Opened:
    """An index as one request sees it, from its first look to its last. is_first: requests need not name it."""

    name: str
    index: Searchable
    runner: Runner
    is_first: bool = True


class Collections:
    """All of them, in the order in which they were given; the first is meant where a request names none."""

    def __init__(self, opened: Sequence[Opened] = ()) -> None:
        self._opened = {one.name: one for one in opened}

    def __iter__(self) -> Iterator[Opened]:
        return iter(self._opened.values())

    def __len__(self) -> int:
        return len(self._opened)

    def get(self, name: str | None, model: str | None = None) -> Opened:
        """The index called so; without a name the first, of a model if one is given.

        Raises RefusalError (404) when there is none.
        """
        if not self._opened:
            message = "no index was opened; start the server as: cn-clip serve INDEX"
            raise RefusalError(404, message, code="index_not_found")
        if name is None:
            return next((one for one in self if one.runner.name == model), next(iter(self)))
        if name not in self._opened:
            message = f"index: there is no {shown(name)} here; known are {list(self._opened)}"
            raise RefusalError(404, message, param="index", code="index_not_found")
        return self._opened[name]
