#!/usr/bin/env bash
# Builds the wheel, installs it where nothing of the checkout is, and runs the README's example and the demo there.
# tools/try_wheel.sh PYTHON [WHEEL]: a Python that has the dependencies and pip; a wheel that is built already. No network is used.
set -euo pipefail
python=$(cd "$(dirname "$1")" && pwd)/$(basename "$1")
checkout=$(cd "$(dirname "$0")/.." && pwd)
place=$(mktemp -d)
trap 'rm -rf "${place}"' EXIT

if [ -n "${2:-}" ]; then
    cp "$2" "${place}"
else
    # A copy: building leaves folders behind, and an old one would put files into the wheel that are no longer there.
    mkdir "${place}/source"
    tar -C "${checkout}" -cf - cn_clip cn_clip_next.py tools/emoji_dataset tools/grid_font pyproject.toml README.md LICENSE NOTICE.md | tar -C "${place}/source" -xf -
    "${python}" -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir "${place}" "${place}/source"
fi

# The dependencies of PYTHON serve here, without its own cn_clip: an editable one hangs on a .pth file, which is read in site
# folders only, and PYTHONPATH is none.
"${python}" -m venv --without-pip "${place}/venv"
"${python}" -m pip --python "${place}/venv/bin/python" install --quiet --no-deps --no-index "${place}"/*.whl
dependencies=$("${python}" -c 'import numpy, os; print(os.path.dirname(os.path.dirname(numpy.__file__)))')

cd "${place}"
mkdir empty
example=$("${python}" "${checkout}/tools/list_doc_commands.py" --print "${checkout}/README.md" 'Encoder("Emoji-Tiny")')
env -i HOME="${place}/empty" PATH="${place}/venv/bin:/usr/bin:/bin" PYTHONPATH="${dependencies}" HF_HUB_OFFLINE=1 \
    python -c "import cn_clip; assert cn_clip.__file__.startswith('${place}/venv'), cn_clip.__file__
${example}"
env -i HOME="${place}/empty" PATH="${place}/venv/bin:/usr/bin:/bin" PYTHONPATH="${dependencies}" cn-clip --version
env -i HOME="${place}/empty" PATH="${place}/venv/bin:/usr/bin:/bin" PYTHONPATH="${dependencies}" HF_HUB_OFFLINE=1 \
    cn-clip demo --steps 0 --output "${place}/demo"
