#!/usr/bin/env bash
# 在 MUGE 上微调 ViT-B-16 与 RoBERTa-wwm-ext-base，并向一个大模型学习图片特征（蒸馏） / Fine-tunes on MUGE and learns a large model's picture features (distillation):
#   bash run_scripts/muge_finetune_vit-b-16_rbt-base_distillation.sh DATAPATH [训练命令的其他选项 / more options of the training command]

# 原版的老师，来自 ModelScope（pip install -e '.[modelscope]'）；也可以是权重文件，或 ViT-L-14 这样的模型名
# the original's teacher, from ModelScope; a weight file or a name like ViT-L-14 will do too
teacher_model_name=${teacher_model_name:-damo/multi-modal_team-vit-large-patch14_multi-modal-similarity}
variant=_distillation  # 实验名的一部分

source "$(dirname "${BASH_SOURCE[0]}")/muge_finetune_vit-b-16_rbt-base.sh"
