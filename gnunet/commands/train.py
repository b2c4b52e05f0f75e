"""Train a diffusion U-Net: gnunet train [--config FILE ...] [--section.key VALUE ...]"""

from gnunet.config import parse_args
from gnunet.errors import run_cli

DEFAULT_CONFIG = "noto_portraits32"


def main(argv: list[str]) -> int:
    def train() -> None:
        config = parse_args(argv, default_config=DEFAULT_CONFIG)
        from gnunet.distributed.launch import join_launch

        join_launch()
        from gnunet.training import fit  # takes seconds, in which a launcher may die

        fit(config)

    return run_cli(train)
