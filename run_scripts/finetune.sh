# 由各个 *_finetune_*.sh 引入：检查设置，开始训练 / Sourced by the *_finetune_*.sh scripts: checks the settings, starts training.
set -euo pipefail

# stop 中文 英文：用读者的语言说一句，结束；语言的选法与 cn-clip 相同 / says one of two sentences, chosen as cn-clip does
stop() {
  local locale=${LC_ALL:-${LC_MESSAGES:-${LANG:-}}}
  if [ "${CN_CLIP_LANG:-${locale:0:2}}" = zh ]; then
    echo "错误：$1" >&2
  else
    echo "error: $2" >&2
  fi
  exit 2
}

if [ "${BASH_SOURCE[0]}" = "$0" ]; then
  example="bash run_scripts/muge_finetune_vit-b-16_rbt-base.sh DATAPATH"
  stop "finetune.sh 只供别的脚本引入，请运行：$example" "finetune.sh is sourced by other scripts; run: $example"
fi
DATAPATH=${1:-} # 存放数据、权重和实验结果的文件夹
if [ -z "$DATAPATH" ]; then
  stop "用法：bash $0 DATAPATH [训练命令的其他选项]" "usage: bash $0 DATAPATH [more options of the training command]"
fi
# 分布式：进程总数 = WORKER_CNT × GPUS_PER_NODE，大于 1 时由 torchrun 启动；多机时在每台机器上都运行脚本
WORKER_CNT=${WORKER_CNT:-1}              # 机器个数
GPUS_PER_NODE=${GPUS_PER_NODE:-1}        # 每台机器用几张 GPU；没有 GPU 时是几个 CPU 进程
MASTER_ADDR=${MASTER_ADDR:-localhost}    # 第 0 台机器的地址，多机时必填
MASTER_PORT=${MASTER_PORT:-8514}         # 那台机器上用来通信的端口
RANK=${RANK:-0}                          # 本机序号，从 0 到 WORKER_CNT-1

# 数据
train_data=${train_data:-$DATAPATH/datasets/$dataset/lmdb/train}  # 训练集的 LMDB
val_data=${val_data:-$DATAPATH/datasets/$dataset/lmdb/valid}      # 验证集的 LMDB；写 None 就不验证
num_workers=${num_workers:-4}                                 # 准备训练数据的进程数
valid_num_workers=${valid_num_workers:-1}                     # 准备验证数据的进程数

# 从哪里开始
init=${init-$DATAPATH/pretrained_weights/clip_cn_vit-b-16.pt}  # 最初的权重；被杀后同一条命令再运行，就从本实验自己的检查点接着练
resume=${resume-}                            # 原版的写法：不用 init，从这个文件开始；被杀后再运行会拒绝，不会冲掉练过的
if [ -n "$resume" ]; then
  init=
  reset_data_offset=${reset_data_offset---reset-data-offset}  # 数据从头读；要接着它练就设为空
  reset_optimizer=${reset_optimizer---reset-optimizer}        # 优化器从头来；要接着它练就设为空
fi

# 超参数
context_length=${context_length:-52}            # 文本的最大长度，含 [CLS] 和 [SEP]
warmup=${warmup:-100}                           # 学习率经过多少步升到最高
batch_size=${batch_size:-128}                   # 每个进程一批训练几对图文
valid_batch_size=${valid_batch_size:-128}       # 每个进程一批验证几对图文
accum_freq=${accum_freq:-1}                     # 几批合成一次更新，等于一个大批
lr=${lr:-5e-5}                                  # 学习率；原版配 8 卡、共 1024 对，总批小得多时宜调小
wd=${wd:-0.001}                                 # 权重衰减
max_epochs=${max_epochs:-3}                     # 训练几轮
valid_step_interval=${valid_step_interval:-150} # 每多少步验证一次；-1 为不按步验证
valid_epoch_interval=${valid_epoch_interval:-1} # 每多少轮验证一次；-1 为不按轮验证
vision_model=${vision_model:-ViT-B-16}          # 视觉塔
text_model=${text_model:-RoBERTa-wwm-ext-base-chinese}  # 文本塔
use_augment=${use_augment---use-augment}        # 图片增强（随机裁剪、翻转、AutoAugment）；设为空就不用
grad_checkpointing=${grad_checkpointing-}       # 省显存、多花时间；设为 --grad-checkpointing 就用
freeze_bn=${freeze_bn---no-freeze-bn}           # 批归一化的统计量随训练的批变化，与原版相同；微调 RN50 时设为 --freeze-bn 就保持不变
mask_ratio=${mask_ratio-}                       # FLIP：训练时丢掉图像块的比例；空为不丢
use_flash_attention=${use_flash_attention-}     # 可写 --use-flash-attention，不起作用
teacher_model_name=${teacher_model_name-}       # 蒸馏的老师：权重文件、ViT-L-14 这样的模型名，或 ModelScope 的模型名；空为不蒸馏
kd_loss_weight=${kd_loss_weight:-0.5}           # 蒸馏损失的权重

for setting in WORKER_CNT GPUS_PER_NODE; do
  if ! [[ ${!setting} =~ ^[1-9][0-9]*$ ]]; then
    stop "$setting=${!setting}: 应为正整数" "$setting=${!setting}: expected a number of 1 or more"
  fi
done
if ! [[ $RANK =~ ^[0-9]+$ ]] || [ "$RANK" -ge "$WORKER_CNT" ]; then
  last=$((WORKER_CNT - 1))
  stop "RANK=$RANK: 应在 0 到 WORKER_CNT-1=$last 之间" "RANK=$RANK: expected 0 to WORKER_CNT-1=$last"
fi
if [ "$WORKER_CNT" -gt 1 ] && [ "$MASTER_ADDR" = localhost ]; then
  stop "MASTER_ADDR: 多机训练要写第 0 台机器的地址" "MASTER_ADDR: several machines need the address of machine 0"
fi
num_processes=$((WORKER_CNT * GPUS_PER_NODE))

# 输出
output_base_dir=${output_base_dir:-$DATAPATH/experiments/}  # 日志和模型的总文件夹
name=${name:-${experiment}_bs${batch_size}_${num_processes}gpu}  # 实验名，也是其中的文件夹名
save_step_frequency=${save_step_frequency:-999999}  # 每多少步存一次模型；这么大就是不按步存
save_epoch_frequency=${save_epoch_frequency:-1}     # 每多少轮存一次模型；-1 为只存最后的
log_interval=${log_interval:-1}                     # 每多少步写一行日志
report_training_batch_acc=${report_training_batch_acc---report-training-batch-acc}  # 日志里写批内准确率；设为空就不写

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
launch=("${PYTHON:-python3}" -u)
if [ "$num_processes" -gt 1 ]; then
  launch+=(-m torch.distributed.run --nproc_per_node="$GPUS_PER_NODE" --nnodes="$WORKER_CNT" --node_rank="$RANK"
    --master_addr="$MASTER_ADDR" --master_port="$MASTER_PORT" --)  # without the "--", torchrun takes --logs for one of its own options
  unset RANK # torchrun numbers the processes itself
fi
# Unquoted below: a switch that is set to nothing must not become an empty argument.
exec "${launch[@]}" "$root/cn_clip/training/main.py" \
  --train-data="$train_data" \
  --val-data="$val_data" \
  --num-workers="$num_workers" \
  --valid-num-workers="$valid_num_workers" \
  ${init:+--init="$init"} \
  ${resume:+--resume="$resume"} \
  ${reset_data_offset-} \
  ${reset_optimizer-} \
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
  --accum-freq="$accum_freq" \
  --lr="$lr" \
  --wd="$wd" \
  --max-epochs="$max_epochs" \
  --vision-model="$vision_model" \
  ${mask_ratio:+--mask-ratio="$mask_ratio"} \
  $use_augment \
  $freeze_bn \
  --text-model="$text_model" \
  $grad_checkpointing \
  $use_flash_attention \
  ${teacher_model_name:+--distillation --teacher-model-name="$teacher_model_name" --kd_loss_weight="$kd_loss_weight"} \
  "${@:2}"
