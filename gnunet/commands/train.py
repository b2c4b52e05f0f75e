"""Train a diffusion U-Net: gnunet train [--config FILE ...] [--section.key VALUE ...]"""

from gnunet.config import parse_args
from gnunet.errors import run_cli

DEFAULT_CONFIG = "noto_portraits32"


def main(argv: list[str]) -> int:
    """Returns the exit status."""

    def train() -> None:
        config = parse_args(argv, default_config=DEFAULT_CONFIG)
        from gnunet.training import fit, spawn_cpu_processes  # takes seconds, which --help need not wait for

        spawn_cpu_processes()
        fit(config)

    return run_cli(train)
