"""Train a diffusion U-Net: gnunet train [--config FILE ...] [--section.key VALUE ...]"""

from gnunet.config import parse_args
from gnunet.errors import run_cli

DEFAULT_CONFIG = "noto_portraits32"


def main(argv: list[str]) -> int:
    def train() -> None:
        # What another model is trained on is seldom what the default configuration is made for.
        initialized = any(word.replace("-", "_").partition("=")[0].endswith("init_from") for word in argv)
        config = parse_args(argv, default_config="folder_small" if initialized else DEFAULT_CONFIG)
        from gnunet.distributed.launch import check_launch
        from gnunet.training import fit  # takes seconds

        check_launch()
        fit(config)

    return run_cli(train)
