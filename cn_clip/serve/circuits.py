"""What keeps requests from waiting for a store that is away: `service` asks before each, `collections` before a look.

An answer that does not come in time opens the circuit of its index. Requests are then refused at once, those in the
queue too, while one thread asks the store every few seconds; its first answer closes the circuit.
"""

import logging
import threading
import time
from collections.abc import Callable
from datetime import datetime

from cn_clip.errors import AwayError, StoreError
from cn_clip.serve.schemas import RefusalError

logger = logging.getLogger(__name__)

# Between the end of a probe and the next one.
PROBE_SECONDS = 2.0
RETRY_AFTER = 5


class Circuit:
    """Of one index. It may be used by any thread."""

    def __init__(self) -> None:
        self._lock, self._ended = threading.Lock(), threading.Event()
        # Seconds since 1970; None: the store answers.
        self._since: float | None = None
        self._name = ""

    @property
    def is_open(self) -> bool:
        """Whether the store is away."""
        return self._since is not None

    def check(self) -> None:
        """Raises RefusalError (503), which says since when the store is away."""
        since = self._since
        if since is not None:
            moment = datetime.fromtimestamp(since).astimezone().isoformat(timespec="seconds")
            raise RefusalError(
                503,
                f"the index {self._name!r} does not answer since {moment}; the server's log tells why",
                code="index_unavailable",
                retry_after=RETRY_AFTER,
            )

    def open(self, name: str, error: StoreError, probe: Callable[[], object]) -> None:
        """The store of the index called `name` is away. probe: asks it for as little as it may; raises AwayError."""
        with self._lock:
            if self._since is not None or self._ended.is_set():
                return
            self._name, self._since = name, time.time()
        logger.error("%s; the index %r is asked for again every %g s", error, name, PROBE_SECONDS)
        threading.Thread(target=self._probing, args=(probe,), name="probe", daemon=True).start()

    def end(self) -> None:
        """Probes no more. A probe that waits for its answer is not waited for."""
        self._ended.set()

    def _probing(self, probe: Callable[[], object]) -> None:
        while not self._ended.wait(PROBE_SECONDS):
            try:
                probe()
            except AwayError:
                continue
            except Exception as error:  # whatever it says, it answers
                logger.warning("%s", error)
            with self._lock:
                away = time.time() - (self._since or 0)
                self._since = None
            logger.info("the index %r answers again after %.0f s", self._name, away)
            return
