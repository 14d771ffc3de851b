"""Fine-tuning and pretraining: `python cn_clip/training/main.py …` or `cn-clip train …`."""

if __name__ == "training":  # found in cn_clip/, which is on the path
    from cn_clip import drop_in

    drop_in.lead(__name__)
