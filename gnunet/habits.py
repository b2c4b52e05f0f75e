"""Flags that users know from other programs, and what does it here."""

import re
from collections.abc import Container

_RESUME = "the same command again: it resumes the run in run_dir from its newest checkpoint"
_FINISH = "the same command again, which finishes what is missing"
_SOURCE = "the first argument"
_GPUS = "CUDA_VISIBLE_DEVICES to choose GPUs; where it is empty, the CPU is used"
_ONE_GPU = "--cpu for the CPU, CUDA_VISIBLE_DEVICES for one of several GPUs"
_LAUNCH = "`accelerate launch -m gnunet COMMAND ...`, which uses every GPU"
_LENGTH = "train.total_images, the number of images seen"
_PRECISION = "the run's train.mixed_precision, which sampling takes over"
_OF_SAMPLING = (_FINISH, _LAUNCH, _PRECISION)  # true of sample and evaluate, but not of ema and push

# Their names -> what does it in train, in commands on a model, and in ablate, which takes the keys of train as flags.
_HABITS = {
    "resume resume_from resume_from_checkpoint auto_resume continue": (_RESUME, _FINISH, _FINISH),
    "ckpt checkpoint": (_RESUME, _SOURCE, ""),
    "ckpt_path model model_path run run_dir": ("", _SOURCE, ""),
    "source": ("data.source", _SOURCE, "--data.source"),
    "dataset dataset_name data_dir data_path train_data_dir folder": ("data.source", "", "--data.source"),
    "data": ("", "", "--data.source"),
    "output output_dir out out_dir outdir save_dir results_folder name exp_name": ("run_dir", "--out", "--folder"),
    "device cuda cpu no_cuda": (_GPUS, _ONE_GPU, _GPUS),
    "gpu gpus num_gpus n_gpu num_processes nproc nproc_per_node multi_gpu ddp": (_LAUNCH, _LAUNCH, _GPUS),
    "steps num_steps": (_LENGTH, "--num_inference_steps", f"--{_LENGTH}, or --budget"),
    "epochs num_epochs num_train_epochs max_epochs max_steps": (_LENGTH, "", f"--{_LENGTH}, or --budget"),
    "max_train_steps train_num_steps iterations kimg duration": (_LENGTH, "", f"--{_LENGTH}, or --budget"),
    "sampling_steps ddim_steps": ("sampling.num_inference_steps", "--num_inference_steps", ""),
    "guidance cfg cfg_scale scale": ("sampling.guidance_scale", "--guidance_scale", ""),
    "n num num_samples n_samples samples count": ("", "--num_images", ""),
    "class label class_labels": ("", "--classes, or --labels for numbers", ""),
    "seed seeds": ("", "", "the study's `seeds`"),
    "batch_size batch bs train_batch_size": ("train.batch_size", "--batch_size", "--train.batch_size"),
    "gradient_accumulation_steps batch_gpu": ("train.micro_batch_size, the images per forward pass", "", ""),
    "lr learning_rate train_lr": ("train.learning_rate", "", "--train.learning_rate"),
    "pretrained pretrained_model_name_or_path finetune finetune_from load_from": ("train.init_from", "", ""),
    "mixed_precision precision fp16 bf16 amp": ("train.mixed_precision", _PRECISION, "--train.mixed_precision"),
    "checkpointing_steps save_every save_interval save_steps": ("train.checkpoint_every, in images", "", ""),
    "wandb use_wandb tensorboard report_to logger": ("train.trackers", "", ""),
    "size image_size img_size sample_size": ("data.resolution", "--resolution", "--data.resolution"),
    "dim channels model_channels num_channels base_channels dim_mults": ("model.block_out_channels", "", ""),
    "norm_num_groups": ("model.norm.groups", "", ""),
    "norm_eps": ("model.norm.eps", "", ""),
    "out_channels": ("model.in_channels, which is also the number of output channels", "", ""),
    "num_class_embeds": ("data.class_conditional; the number of classes is that of the data", "", ""),
    "ema use_ema no_ema ema_decay ema_rate": ("train.ema_half_life, in images", "--weights ema or raw", ""),
    "workers num_workers dataloader_num_workers": ("data.num_workers", "", "--jobs"),
    "parallel": ("", "", "--jobs"),
}


def habits_of(command: str, flags: Container[str] = ()) -> dict[str, str]:
    """What does it in a command of gnunet with these flags, besides --section.key, by the names of flags of other
    programs."""
    column = {"train": 0, "ablate": 2}.get(command, 1)
    unfit = {"", *(_OF_SAMPLING if command in ("push", "ema") else ())}
    return {
        name: hints[column].replace("COMMAND", command)
        for names, hints in _HABITS.items()
        for name in names.split()
        if hints[column] not in unfit
        and all("." in flag or flag in flags for flag in re.findall(r"--[\w.]+", hints[column]))
    }
