"""How often an address may send a wrong key: guessing one takes years then, where it would have taken hours."""

import ipaddress
import math
import time
from collections import OrderedDict
from collections.abc import Callable

from cn_clip.serve.refusals import RefusalError

# Wrong keys that an address may send at once, and the seconds after which it may send one more.
MAX_GUESSES = 20
SECONDS_PER_GUESS = 1.0
# Addresses that are remembered: those that guessed last.
MAX_ADDRESSES = 4096
# A shorter key, or one of fewer characters, can be guessed.
LEAST_KEY_CHARS, LEAST_KEY_ALPHABET = 16, 6


class Guesses:
    """The wrong keys of each address, for one event loop. now: seconds, from any start."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        # When what an address has used will be given back in full.
        self._free_at: OrderedDict[str, float] = OrderedDict()

    def check(self, address: str) -> None:
        """Raises RefusalError (429) for an address with no guess left; its key is not looked at, right or wrong."""
        wait = self._free_at.get(_network(address), 0) - self._now() - (MAX_GUESSES - 1) * SECONDS_PER_GUESS
        if wait > 0:
            message = f"too many wrong API keys from this address; ask again in {math.ceil(wait)} seconds"
            raise RefusalError(429, message, code="too_many_guesses", retry_after=math.ceil(wait))

    def add(self, address: str) -> None:
        """Counts a wrong key."""
        network = _network(address)
        self._free_at[network] = max(self._free_at.get(network, 0), self._now()) + SECONDS_PER_GUESS
        self._free_at.move_to_end(network)
        if len(self._free_at) > MAX_ADDRESSES:
            self._free_at.popitem(last=False)


def is_weak(key: str) -> bool:
    """Whether a key is so short or so uniform that it can be guessed."""
    return len(key) < LEAST_KEY_CHARS or len(set(key)) < LEAST_KEY_ALPHABET


def _network(address: str) -> str:
    """The address; of IPv6 its network, of which a customer has all addresses."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return address
    return address if parsed.version == 4 else str(ipaddress.ip_network((int(parsed) >> 64 << 64, 64)))
