#!/usr/bin/env bash
# 在 Flickr30k-CN 上微调 ViT-B-16 与 RoBERTa-wwm-ext-base，训练时丢掉一半图像块（FLIP） / Fine-tunes on Flickr30k-CN with half of the patches left out (FLIP):
#   bash run_scripts/flickr30k_finetune_vit-b-16_rbt-base_flip.sh DATAPATH [训练命令的其他选项 / more options of the training command]

mask_ratio=${mask_ratio:-0.5}  # 丢掉的比例
variant=_flip  # 实验名的一部分

source "$(dirname "${BASH_SOURCE[0]}")/flickr30k_finetune_vit-b-16_rbt-base.sh"
