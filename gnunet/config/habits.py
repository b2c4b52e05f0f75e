"""Flags of training that users know from other programs, and what does it here."""

_HABITS = {
    "the same command again: it resumes the run in run_dir from its newest checkpoint": (
        "resume", "resume_from", "resume_from_checkpoint", "auto_resume", "continue", "ckpt", "checkpoint",
    ),
    "CUDA_VISIBLE_DEVICES to choose a GPU; where it is empty, the CPU trains": ("device", "cuda", "cpu", "no_cuda"),
    "`accelerate launch -m gnunet train ...`, which trains on every GPU": (
        "gpu", "gpus", "num_gpus", "n_gpu", "num_processes", "nproc_per_node", "multi_gpu", "ddp",
    ),
    "train.total_images, the number of images seen": (
        "epochs", "num_epochs", "num_train_epochs", "max_epochs", "steps", "num_steps", "max_steps", "max_train_steps",
        "train_num_steps", "iterations", "kimg", "duration",
    ),
    "train.batch_size": ("batch_size", "batch", "bs", "train_batch_size"),
    "train.micro_batch_size, the images per forward pass": ("gradient_accumulation_steps", "batch_gpu"),
    "train.learning_rate": ("lr", "train_lr"),
    "train.init_from": ("pretrained", "pretrained_model_name_or_path", "finetune", "finetune_from", "load_from"),
    "train.mixed_precision": ("fp16", "bf16", "amp", "precision"),
    "train.checkpoint_every, in images": ("checkpointing_steps", "save_every", "save_interval", "save_steps"),
    "train.trackers": ("wandb", "use_wandb", "tensorboard", "report_to", "logger"),
    "run_dir": ("output", "output_dir", "out", "out_dir", "outdir", "save_dir", "results_folder", "name", "exp_name"),
    "data.source": ("source", "dataset", "dataset_name", "data_dir", "data_path", "train_data_dir", "folder"),
    "data.resolution": ("size", "image_size", "img_size"),
    "model.block_out_channels": ("dim", "channels", "model_channels", "num_channels", "base_channels", "dim_mults"),
    "train.ema_half_life, in images": ("ema", "ema_decay", "ema_rate"),
    "data.num_workers": ("workers", "dataloader_num_workers"),
}  # fmt: skip
HABITS = {name: hint for hint, names in _HABITS.items() for name in names}
