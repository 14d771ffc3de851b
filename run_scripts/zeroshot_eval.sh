#!/usr/bin/env bash
# Zero-shot evaluation of one dataset in the layout of ELEVATER:
#   bash run_scripts/zeroshot_eval.sh GPU DATAPATH DATASET VISION_MODEL TEXT_MODEL CHECKPOINT [INDEX_FILE]
set -euo pipefail
if [ $# -lt 6 ]; then
  sed -n '2,3p' "$0" >&2
  exit 2
fi
root=$(cd "$(dirname "$0")/.." && pwd)
export CUDA_VISIBLE_DEVICES=$1
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
path=$2 dataset=$3
mkdir -p "$path/save_predictions"
exec "${PYTHON:-python3}" -u "$root/cn_clip/eval/zeroshot_evaluation.py" \
  --datapath="$path/datasets/$dataset/test" \
  --label-file="$path/datasets/$dataset/label_cn.txt" \
  --save-dir="$path/save_predictions" \
  --dataset="$dataset" \
  --index="${7:-}" \
  --img-batch-size=64 \
  --resume="$6" \
  --vision-model="$4" \
  --text-model="$5"
