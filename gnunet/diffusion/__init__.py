"""Diffusion processes: what the network predicts, how its error is weighted, how images are sampled."""

from gnunet.diffusion.ddpm import DDPM
from gnunet.diffusion.edm import EDM
from gnunet.diffusion.factory import PROCESSES, make_process, process_from_config, process_from_scheduler
from gnunet.diffusion.flow import Flow
from gnunet.diffusion.images import encode_grid, make_grid
from gnunet.diffusion.process import NoiseLevel, Process
from gnunet.diffusion.sampling import eval_mode, sample_images, sample_labels
from gnunet.scaling import to_uint8, to_unit_range

__all__ = [
    "DDPM",
    "EDM",
    "PROCESSES",
    "Flow",
    "NoiseLevel",
    "Process",
    "encode_grid",
    "eval_mode",
    "make_grid",
    "make_process",
    "process_from_config",
    "process_from_scheduler",
    "sample_images",
    "sample_labels",
    "to_uint8",
    "to_unit_range",
]
