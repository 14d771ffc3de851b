# 由各个 *_finetune_*.sh 引入：检查设置，开始训练 / Sourced by the *_finetune_*.sh scripts: checks the settings, starts training.
set -euo pipefail

stop() {
  echo "错误 / error: $1" >&2
  exit 2
}

if [ "${BASH_SOURCE[0]}" = "$0" ]; then
  stop "finetune.sh 只供别的脚本引入 / is sourced by others: bash run_scripts/muge_finetune_vit-b-16_rbt-base.sh DATAPATH"
fi
if [ -z "$DATAPATH" ]; then
  stop "用法 / usage: bash $0 DATAPATH [训练命令的其他选项 / more options of the training command]"
fi
for setting in WORKER_CNT GPUS_PER_NODE; do
  if [ "${!setting}" != 1 ]; then
    stop "$setting=${!setting}: 本版只能单进程训练，请设为 1 / this version trains in one process, set it to 1"
  fi
done
if [ "$RANK" != 0 ]; then
  stop "RANK=$RANK: 只有一台机器，请设为 0 / there is one machine, set it to 0"
fi

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export RANK MASTER_ADDR MASTER_PORT
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
# Unquoted: a switch that is set to nothing must not become an empty argument.
exec "${PYTHON:-python3}" -u "$root/cn_clip/training/main.py" \
  --train-data="$train_data" \
  --val-data="$val_data" \
  --num-workers="$num_workers" \
  --valid-num-workers="$valid_num_workers" \
  ${resume:+--resume="$resume"} \
  $reset_data_offset \
  $reset_optimizer \
  --logs="$output_base_dir" \
  --name="$name" \
  --save-step-frequency="$save_step_frequency" \
  --save-epoch-frequency="$save_epoch_frequency" \
  --log-interval="$log_interval" \
  $report_training_batch_acc \
  --context-length="$context_length" \
  --warmup="$warmup" \
  --batch-size="$batch_size" \
  --valid-batch-size="$valid_batch_size" \
  --valid-step-interval="$valid_step_interval" \
  --valid-epoch-interval="$valid_epoch_interval" \
  --lr="$lr" \
  --wd="$wd" \
  --max-epochs="$max_epochs" \
  --vision-model="$vision_model" \
  --text-model="$text_model" \
  "${@:2}"
