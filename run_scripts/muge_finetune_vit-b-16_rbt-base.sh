#!/usr/bin/env bash
# 在 MUGE 上微调 ViT-B-16 与 RoBERTa-wwm-ext-base / Fine-tunes on MUGE:
#   bash run_scripts/muge_finetune_vit-b-16_rbt-base.sh DATAPATH [训练命令的其他选项 / more options of the training command]
# 全部设置和默认值在 finetune.sh 里。要改哪一项，就在下面加一行（如 lr=1e-5），或临时用同名的环境变量：
#   GPUS_PER_NODE=8 batch_size=32 bash …
# finetune.sh holds every setting. To change one, add a line below (lr=1e-5), or set the environment variable of its name.

dataset=${dataset:-MUGE}  # ${DATAPATH}/datasets 下的文件夹名
experiment=muge_finetune_vit-b-16_roberta-base${variant:-}  # 实验名的开头

source "$(dirname "${BASH_SOURCE[0]}")/finetune.sh"
