#!/usr/bin/env bash
# Trains the bundled model Emoji-Tiny again and packs it: the commands of its model card, an hour on one core.
# tools/train_bundled_model.sh FOLDER: where data, logs and checkpoints go. Needs npm, resvg-py and the package installed.
set -euo pipefail
checkout=$(cd "$(dirname "$0")/.." && pwd)
mkdir -p "$1"
cd "$1"

python "${checkout}/tools/build_emoji_training_set.py" --output datasets/stage1
python "${checkout}/tools/build_emoji_training_set.py" --output datasets/stage2 --copies 3 --captions 6 --everyday
cn-clip dataset build --data_dir datasets/stage1 --splits train,valid
cn-clip dataset build --data_dir datasets/stage2 --splits train,valid

same="--vision-model RN-Small-64 --text-model BERT-Tiny-chinese --batch-size 256 --valid-batch-size 256 --num-workers 1
  --num-threads 1 --beta1 0.9 --beta2 0.98 --eps 1e-8 --wd 0.1 --multi-positive --valid-epoch-interval -1
  --save-epoch-frequency -1 --seed 123"
# The first stage ends at step 3,000 of the 3,600 that its learning rate is laid out for.
# shellcheck disable=SC2086  # words, not one argument
cn-clip train --train-data datasets/stage1/lmdb/train --val-data datasets/stage1/lmdb/valid $same --name emoji-tiny \
  --max-steps 3600 --lr 1.5e-3 --warmup 100 --valid-step-interval 300 --save-step-frequency 300 --keep-checkpoints -1
# shellcheck disable=SC2086
cn-clip train --train-data datasets/stage2/lmdb/train --val-data datasets/stage2/lmdb/valid $same --name emoji-tiny-everyday \
  --resume logs/emoji-tiny/checkpoints/epoch_4_3000.pt --reset-data-offset \
  --max-steps 560 --lr 6e-4 --warmup 30 --valid-step-interval 140 --save-step-frequency 140
python "${checkout}/tools/pack_bundled_model.py" --checkpoint logs/emoji-tiny-everyday/checkpoints/epoch_latest.pt --seed 123 \
  --output emoji_tiny.safetensors
