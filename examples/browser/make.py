"""Makes a folder that searches pictures in the browser, without a server: `python examples/browser/make.py site`.

Needs npm, and `pip install 'cn-clip-next[onnx]'`. Any static web server will do: `python -m http.server -d site`.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

from cn_clip import emoji_pack

LIBRARY = "@huggingface/transformers@4.3.2"
HERE = Path(__file__).parent


def make(site: Path, model: str, modules: Path | None) -> None:
    """modules: a `node_modules` that has the library already."""
    site.mkdir(parents=True, exist_ok=True)
    convert = [sys.executable, "-m", "cn_clip", "convert", model, str(site / "model")]
    subprocess.run([*convert, "--to", "transformers-js", "--precision", "fp32", "--overwrite"], check=True)
    if modules is None:
        npm = ["npm", "install", "--no-save", "--no-audit", "--no-fund", "--ignore-scripts"]
        subprocess.run([*npm, "--prefix", str(site / "npm"), LIBRARY], check=True)
        modules = site / "npm" / "node_modules"
    (site / "lib").mkdir(exist_ok=True)
    web = modules / "onnxruntime-web" / "dist"
    library = modules / "@huggingface" / "transformers" / "dist" / "transformers.min.js"
    for file in (library, *web.glob("ort-wasm-simd-threaded.asyncify.*")):
        shutil.copy(file, site / "lib")
    shutil.rmtree(site / "npm", ignore_errors=True)
    shutil.copy(HERE / "index.html", site)
    (site / "pictures").mkdir(exist_ok=True)
    samples = emoji_pack.load()[::40]
    for one in samples:
        (site / "pictures" / f"{one.name}.png").write_bytes(one.picture)
    names = [f"{one.name}.png" for one in samples]
    (site / "pictures.json").write_text(json.dumps(names, ensure_ascii=False), encoding="utf-8")


if __name__ == "__main__":
    given = sys.argv[1:]
    make(Path(given[0] if given else "site"), given[1] if len(given) > 1 else "Emoji-Tiny", None)
