# 由各个 *_finetune_*.sh 引入：检查设置，开始训练 / Sourced by the *_finetune_*.sh scripts: checks the settings, starts training.
set -euo pipefail

stop() {
  echo "错误 / error: $1" >&2
  exit 2
}

if [ "${BASH_SOURCE[0]}" = "$0" ]; then
  stop "finetune.sh 只供别的脚本引入 / is sourced by others: bash run_scripts/muge_finetune_vit-b-16_rbt-base.sh DATAPATH"
fi
DATAPATH=${1:-} # 存放数据、权重和实验结果的文件夹
if [ -z "$DATAPATH" ]; then
  stop "用法 / usage: bash $0 DATAPATH [训练命令的其他选项 / more options of the training command]"
fi
# 分布式：本版只在一台机器上以单进程训练
WORKER_CNT=${WORKER_CNT:-1}              # 机器个数，只能是 1
GPUS_PER_NODE=${GPUS_PER_NODE:-1}        # 每台机器用几张 GPU，只能是 1
MASTER_ADDR=${MASTER_ADDR:-localhost}    # 主机地址，单进程时用不到
MASTER_PORT=${MASTER_PORT:-8514}         # 主机端口，单进程时用不到
RANK=${RANK:-0}                          # 本机序号，只能是 0

# 数据
train_data=${train_data:-$DATAPATH/datasets/$dataset/lmdb/train}  # 训练集的 LMDB
val_data=${val_data:-$DATAPATH/datasets/$dataset/lmdb/valid}      # 验证集的 LMDB；写 None 就不验证
num_workers=${num_workers:-4}                                 # 准备训练数据的进程数
valid_num_workers=${valid_num_workers:-1}                     # 准备验证数据的进程数

# 从哪里开始
resume=${resume-$DATAPATH/pretrained_weights/clip_cn_vit-b-16.pt}  # 权重文件；设为空就接着本实验最近一次保存的练
reset_data_offset=${reset_data_offset---reset-data-offset}          # 数据从头读；接着练时设为空
reset_optimizer=${reset_optimizer---reset-optimizer}                # 优化器从头来；接着练时设为空

# 超参数
context_length=${context_length:-52}            # 文本的最大长度，含 [CLS] 和 [SEP]
warmup=${warmup:-100}                           # 学习率经过多少步升到最高
batch_size=${batch_size:-128}                   # 一批训练几对图文
valid_batch_size=${valid_batch_size:-128}       # 一批验证几对图文
lr=${lr:-5e-5}                                  # 学习率；原版配 8 卡、共 1024 对，批小得多时宜调小
wd=${wd:-0.001}                                 # 权重衰减
max_epochs=${max_epochs:-3}                     # 训练几轮
valid_step_interval=${valid_step_interval:-150} # 每多少步验证一次；-1 为不按步验证
valid_epoch_interval=${valid_epoch_interval:-1} # 每多少轮验证一次；-1 为不按轮验证
vision_model=${vision_model:-ViT-B-16}          # 视觉塔
text_model=${text_model:-RoBERTa-wwm-ext-base-chinese}  # 文本塔
# 原版这里还有 --use-augment（AutoAugment），本版尚未提供，所以不写。

# 输出
output_base_dir=${output_base_dir:-$DATAPATH/experiments/}  # 日志和模型的总文件夹
name=${name:-${experiment}_bs${batch_size}_1gpu}  # 实验名，也是其中的文件夹名
save_step_frequency=${save_step_frequency:-999999}  # 每多少步存一次模型；这么大就是不按步存
save_epoch_frequency=${save_epoch_frequency:-1}     # 每多少轮存一次模型；-1 为只存最后的
log_interval=${log_interval:-1}                     # 每多少步写一行日志
report_training_batch_acc=${report_training_batch_acc---report-training-batch-acc}  # 日志里写批内准确率；设为空就不写

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
