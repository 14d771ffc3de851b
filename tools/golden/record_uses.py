"""Records tests/golden/uses.json.gz: what public uses of `cn_clip.clip` return with the reference.

REFERENCE/bin/python tools/golden/record_uses.py
"""

import gzip
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tests")]

import reference_shim  # noqa: E402, F401  (before anything that imports torchvision)
from reference_uses import USES, plain  # noqa: E402


def main() -> None:
    recorded = {name: plain(use()) for name, use in USES.items()}
    content = gzip.compress(json.dumps(recorded, ensure_ascii=False).encode(), mtime=0)
    (ROOT / "tests" / "golden" / "uses.json.gz").write_bytes(content)
    print(f"{len(recorded)} uses, {len(content)} bytes")


if __name__ == "__main__":
    main()
