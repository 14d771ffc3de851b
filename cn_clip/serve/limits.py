"""How much one request, and all of them together, may take; every bound is checked before the work it bounds."""

from dataclasses import dataclass, fields

from cn_clip.clip.picture_names import MOST_PIXELS
from cn_clip.errors import ConfigError
from cn_clip.settings import flag

# How log lines tell the time.
LOG_TIME = "%Y-%m-%d %H:%M:%S"
# Where the key is, if not on the command line.
API_KEY_VARIABLE = "CN_CLIP_API_KEY"
# Bodies of the largest size that are held in memory at a time.
BODIES_HELD = 16
# Connections at a time; a process may usually have 1024 files open.
MAX_CONNECTIONS = 512
# Pictures admitted and not yet computed, by default; 256 of ViT-B-16's take 154 MB as pixels.
MAX_QUEUE = 256
# A request's line and headers, as h11 bounds them where they come in pieces.
MAX_HEAD_BYTES = 16 << 10
# An upper bound on the values of a JSON document is the number of these; each costs far more memory than its byte.
MAX_JSON_MARKS = 50_000
# Texts of one request to /v1/classify, labels times templates, and their characters together.
MAX_PROMPTS = 4096
MAX_PROMPT_CHARS = 1_000_000
# Of one request, waiting at a time; the pixels of a batch of 32 pictures take 19 MB.
BATCHES_AT_ONCE = 4
# Bounds that the OpenAPI document states.
MAX_INPUTS = 2048
MAX_TEXT_CHARS = 4096
MAX_NAME_CHARS = 512
MAX_LABELS = 1000
MAX_TEMPLATES = 100
MAX_PARTS = 16
MAX_WEIGHT = 100.0
MAX_K = 1000
# Hits that may be passed over, for those that follow.
MAX_OFFSET = 10_000


@dataclass(frozen=True)
class Limits:
    """The bounds that a flag sets. Raises ConfigError for one that leaves no room."""

    max_batch: int = 32
    """Pictures, or texts, computed at a time"""
    max_wait_ms: float = 5.0
    """Longest time a batch waits for more inputs, in milliseconds"""
    max_queue: int | None = None
    """Pictures, and texts, that are admitted and not yet computed; beyond it the answer is 503; default: 256 pictures,
    and 512 texts, one for each connection"""
    max_body_mb: float = 32.0
    """Size of a request body, in MiB"""
    max_pixels: int = 64_000_000
    """Width times height of a picture as it is decoded; large JPEGs are decoded at a fraction, see --decode"""
    max_request_pixels: int = 128_000_000
    """Width times height of all pictures of a request together, as they are decoded"""
    max_items: int = MAX_INPUTS
    """Pictures and texts in one request; of a long one, a part at a time is admitted to the queue"""
    timeout: float = 30.0
    """Seconds for reading a request, and again for answering it"""

    def __post_init__(self) -> None:
        for field in fields(Limits):
            value = getattr(self, field.name)
            if value is None and field.name == "max_queue":
                continue
            if not value > 0 and (field.name, value) != ("max_wait_ms", 0):
                raise ConfigError(f"{flag(field.name)}: expected a positive number, got {value}")
        if self.max_pixels > MOST_PIXELS:
            raise ConfigError(f"--max-pixels: expected at most {MOST_PIXELS}, got {self.max_pixels}")
        if self.max_request_pixels < self.max_pixels:
            raise ConfigError(
                f"--max-request-pixels: expected at least --max-pixels ({self.max_pixels}), "
                f"got {self.max_request_pixels}"
            )
        if self.max_items > MAX_INPUTS:
            raise ConfigError(f"--max-items: expected at most {MAX_INPUTS}, got {self.max_items}")
        if self.max_batch > self.slots:
            raise ConfigError(f"--max-batch: expected at most --max-queue ({self.slots}), got {self.max_batch}")

    @property
    def slots(self) -> int:
        """Of pictures, whose pixels wait, and of all else but texts: `max_queue`, or its default."""
        return MAX_QUEUE if self.max_queue is None else self.max_queue

    @property
    def text_slots(self) -> int:
        """The same of texts. They take little memory, and a client that is refused costs more than one that waits."""
        return MAX_CONNECTIONS if self.max_queue is None else self.max_queue

    @property
    def max_body_bytes(self) -> int:
        """The largest body of a request."""
        return int(self.max_body_mb * (1 << 20))

    @property
    def max_at_once(self) -> int:
        """Pictures, and texts, of one request that wait at a time: what a few batches hold, so that others get in."""
        return min(self.slots, BATCHES_AT_ONCE * self.max_batch)
