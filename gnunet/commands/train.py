"""Train a diffusion U-Net: gnunet train [--config FILE ...] [--section.key VALUE ...]"""

from gnunet.config import parse_args
from gnunet.errors import run_cli

DEFAULT_CONFIG = "noto_portraits32"


def main(argv: list[str]) -> int:
    def train() -> None:
        config = parse_args(argv, default_config=DEFAULT_CONFIG)
        from gnunet.distributed.launch import check_launch
        from gnunet.training import fit  # takes seconds

        check_launch()
        fit(config)

    return run_cli(train)
