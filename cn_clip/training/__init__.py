"""Fine-tuning and pretraining: `python cn_clip/training/main.py …` or `cn-clip train …`."""
