"""Reconstruct an EMA of any width of a run that was trained with train.ema_snapshot_every.

gnunet ema runs/NAME --std 0.15
gnunet sample runs/NAME/ema/std-0.15

The relative width is that of Karras et al., 2024 (post-hoc EMA): the standard deviation of the images seen at which
averaged weights were taken, as a share of those seen in all. More snapshots lower the error of these shares.
"""

from pathlib import Path

from gnunet.commands.options import Parser, check_exists, integer, scale
from gnunet.errors import run_cli


def main(argv: list[str]) -> int:
    parser = Parser("ema", __doc__)
    parser.add_argument("run", type=Path, help="run's directory")
    parser.add_argument("--std", type=scale, required=True, help="relative width, at least 0.01 and at most 0.28")
    parser.add_argument(
        "--images", type=integer(), metavar="N", help="images seen, best at a snapshot (default: the newest)"
    )
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="folder to write (default: RUN/ema/std-STD)")
    arguments = vars(parser.parse_args(argv))

    def reconstruct() -> None:
        check_exists(arguments["run"])
        from gnunet.training import post_hoc_ema  # imported here so that --help does not wait for torch

        folder, error = post_hoc_ema.reconstruct(**arguments)
        print(f"EMA of relative width {arguments['std']:g}, relative error {error:.2%}: {folder}")

    return run_cli(reconstruct)
