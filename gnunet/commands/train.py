"""Train a diffusion U-Net: gnunet train [--config FILE ...] [--section.key VALUE ...]"""

from pathlib import Path

from gnunet.config.cli import parse
from gnunet.errors import run_cli

DEFAULT_CONFIG = Path(__file__).parents[2] / "configs" / "noto_portraits32.yaml"


def main(argv: list[str]) -> int:
    """Returns the exit status."""

    def train() -> None:
        config = parse(argv, default_config=DEFAULT_CONFIG)
        from gnunet.training import fit, spawn_cpu_processes  # takes seconds, which --help need not wait for

        spawn_cpu_processes()
        fit(config)

    return run_cli(train)
