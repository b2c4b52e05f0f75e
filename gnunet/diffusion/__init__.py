"""Diffusion processes: what the network predicts, how its error is weighted, how images are sampled."""

from gnunet.diffusion.ddpm import DDPM
from gnunet.diffusion.edm import EDM
from gnunet.diffusion.factory import PROCESSES, make_process, process_from_config, process_from_scheduler
from gnunet.diffusion.flow import Flow
from gnunet.diffusion.images import encode_gif, encode_png, make_grid
from gnunet.diffusion.process import NoiseLevel, Process
from gnunet.diffusion.sampling import ImageSampler, eval_mode, sample_labels

__all__ = [
    "DDPM",
    "EDM",
    "PROCESSES",
    "Flow",
    "ImageSampler",
    "NoiseLevel",
    "Process",
    "encode_gif",
    "encode_png",
    "eval_mode",
    "make_grid",
    "make_process",
    "process_from_config",
    "process_from_scheduler",
    "sample_labels",
]
