#!/usr/bin/env bash
# 在 COCO-CN 上微调 ViT-B-16 与 RoBERTa-wwm-ext-base，写明 FlashAttention / Fine-tunes on COCO-CN with FlashAttention asked for:
#   bash run_scripts/coco-cn_finetune_vit-b-16_rbt-base_flashattn.sh DATAPATH [训练命令的其他选项 / more options of the training command]

use_flash_attention=--use-flash-attention  # 不起作用：PyTorch 自带的 kernel，不写也一样
variant=_flashattn  # 实验名的一部分

source "$(dirname "${BASH_SOURCE[0]}")/coco-cn_finetune_vit-b-16_rbt-base.sh"
