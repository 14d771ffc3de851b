"""Which items of an index have no picture any more, and which folders are gone as a whole, perhaps only for now."""

import posixpath
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable

from cn_clip.retrieval.segments import ItemId

# A folder that is gone is taken for a disk that is away, or for one that moved, if it held so much of the index.
LARGE_SHARE = 0.1
LEAST_ITEMS = 20


def vanished(
    gone: Iterable[ItemId], present: Iterable[ItemId], num_items: int, *, is_elsewhere: Callable[[ItemId], bool]
) -> dict[str, list[ItemId]]:
    """The items that are gone with a folder that held a large share of the `num_items` of the index, by that folder.

    gone: items without their pictures. present: all that was seen in the source, pictures or not. A folder is gone if
    nothing was seen in it; the highest such folder counts. is_elsewhere: whether the same picture is in the index
    under another name, so that nothing is lost by removing the item.

    Of 100 items, 30 of a/b/ are gone, and a/x.txt is there: {"a/b": [30 items]}; with a/b/x.txt there, nothing is.
    """
    seen = {""}
    for one in present:
        path = str(one)
        while path not in seen:
            seen.add(path)
            path = posixpath.dirname(path)
    of_folder = defaultdict[str, list[ItemId]](list)
    for item_id in gone:
        above, folder = str(item_id), ""
        while (above := posixpath.dirname(above)) not in seen:
            folder = above
        if folder:
            of_folder[folder].append(item_id)
    lost = Counter({folder: sum(not is_elsewhere(one) for one in ids) for folder, ids in of_folder.items()})
    return {
        folder: of_folder[folder]
        for folder, count in lost.items()
        if count >= LEAST_ITEMS and count > LARGE_SHARE * num_items
    }
