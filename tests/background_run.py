"""`cn-clip train` that writes checkpoints in the background, as on a GPU, on a slow disk; for kills of the process."""

import os
import time
from typing import Any

from faults.small_towers import shrink

from cn_clip.training import main, saving

SECONDS = 0.02

if __name__ == "__main__":
    sync = os.fsync

    def slow(handle: Any) -> None:
        time.sleep(SECONDS)
        sync(handle)

    os.fsync = slow
    saving.is_worth_a_copy = lambda _: True
    shrink()
    main.main()
