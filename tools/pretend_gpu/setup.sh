#!/usr/bin/env bash
# Makes the pretend GPU in FOLDER: a Python with PyTorch's CUDA build, the two libraries that answer for the GPU, and
# `python`, which starts the one with the others. `tools/pretend_gpu/setup.sh [FOLDER]`; by default .pretend-gpu, which git
# ignores. The first time it downloads 3 GB, takes about ten minutes and 5 GB of disk; later only what has changed.
# PRETEND_VENV=VENV: an environment with that PyTorch that is there already, instead of FOLDER/venv.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
project=$(cd "${here}/../.." && pwd)
mkdir -p "${1:-${project}/.pretend-gpu}"
folder=$(cd "${1:-${project}/.pretend-gpu}" && pwd)
venv=${PRETEND_VENV:-${folder}/venv}
wanted=$(grep -oE '^torch==[0-9.]+' "${project}/constraints.txt")
for program in g++ gcc; do
    command -v "${program}" >/dev/null || { echo "需要 ${program} / needed: ${program} (Debian: apt-get install g++)" >&2; exit 1; }
done

# Installs into the environment what is not there. The registry's own PyTorch has CUDA; a folder of wheels or another
# index that pip is told of may hold builds without it.
installed() {
    "${venv}/bin/python" -c '
import importlib.util, pathlib, runpy
facts = runpy.run_path(str(pathlib.Path(importlib.util.find_spec("torch").origin).with_name("version.py")))
print("torch==" + facts["__version__"].split("+")[0], bool(facts["cuda"]))' 2>/dev/null
}
if [ "$(installed || true)" != "${wanted} True" ]; then
    [ -z "${PRETEND_VENV:-}" ] || { echo "PRETEND_VENV=${venv}: expected ${wanted} with CUDA, got: $(installed || echo none)" >&2; exit 1; }
    echo "安装 CUDA 版的 ${wanted} 到 ${venv}：下载约 3 GB，占用约 5 GB，十分钟左右"
    echo "installing the CUDA build of ${wanted} to ${venv}: 3 GB to download, 5 GB of disk, about ten minutes"
    "${PYTHON:-python3}" -m venv "${venv}"
    PIP_CONFIG_FILE=/dev/null PIP_FIND_LINKS= "${venv}/bin/pip" install --quiet --disable-pip-version-check "${wanted}"
    "${venv}/bin/pip" install --quiet --disable-pip-version-check --constraint "${project}/constraints.txt" \
        --editable "${project}[lora,onnx,parquet,plot,search,serve,tensorboard]"
    [ "$(installed)" = "${wanted} True" ] || { echo "${venv}: expected ${wanted} with CUDA, got: $(installed)" >&2; exit 1; }
fi

changed=
is_older() { [ ! -e "$1" ] || [ "$2" -nt "$1" ]; }
if is_older "${folder}/libpretend.so" "${here}/runtime.cpp"; then
    site=$("${venv}/bin/python" -c 'import site; print(site.getsitepackages()[0])')
    headers=()
    for path in "${site}"/nvidia/*/include; do headers+=(-I "${path}"); done
    g++ -std=c++17 -shared -fPIC -O1 -I "${here}/include" "${headers[@]}" "${here}/runtime.cpp" -o "${folder}/libpretend.so"
    changed=yes
fi
if is_older "${folder}/libcuda.so.1" "${here}/driver.c"; then
    gcc -shared -fPIC -w "${here}/driver.c" -o "${folder}/libcuda.so.1" -Wl,-soname,libcuda.so.1
    ln -sf libcuda.so.1 "${folder}/libcuda.so"
    changed=yes
fi
cat >"${folder}/python" <<RUN
#!/usr/bin/env bash
# Python on the pretend GPU.
export LD_PRELOAD="${folder}/libpretend.so" LD_LIBRARY_PATH="${folder}\${LD_LIBRARY_PATH:+:\${LD_LIBRARY_PATH}}"
export PYTHONPATH="\${PYTHONPATH:+\${PYTHONPATH}:}${here}/site" TRITON_LIBCUDA_PATH="${folder}"
exec "${venv}/bin/python" "\$@"
RUN
chmod +x "${folder}/python"
[ -z "${changed}" ] || "${folder}/python" -c 'import torch; print("假的 GPU 可以用了 / ready:", torch.cuda.get_device_name(0))'
