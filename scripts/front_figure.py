"""Draw the figure of the front page from records: what batch normalization loses by the images that it sees.

python scripts/front_figure.py [--classification FOLDER] [--diffusion FOLDER] [--output FILE.png]
"""

import argparse
from pathlib import Path

from gnunet.ablation.analysis.results import Results, Setting
from gnunet.ablation.figures import axis_plot
from gnunet.ablation.figures.style import figure_style, new_figure, render, variant_legend, variant_styles
from gnunet.ablation.study_runner import StudyRunner
from gnunet.config.load import SHIPPED


def read(study: str, budget: str | None, folder: Path) -> Results:
    """The results of a shipped study with records in a folder."""
    path = SHIPPED / "ablations" / f"{study}.yaml"
    runner = StudyRunner(path, budget=budget, folder=folder, only=(), flags={})
    return Results(runner.study, *runner.plan(), folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classification", type=Path, default=Path("assets/ablations/control"), metavar="FOLDER")
    parser.add_argument("--diffusion", type=Path, default=Path("assets/ablations/batch_size-cpu"), metavar="FOLDER")
    parser.add_argument("--output", type=Path, default=Path("assets/figures/batch_size.png"), metavar="FILE.png")
    arguments = parser.parse_args()
    classes = read("control", None, arguments.classification)
    images = read("batch_size", "cpu", arguments.diffusion)
    longest: Setting = (("images", list(images.study.axes["images"].values)[-1]),)
    panels = [
        ("classification: errors", classes, "error_rate", ()),
        ("diffusion: loss", images, "training_loss", longest),
        ("diffusion: KID", images, "kid_efficientnet_lite0", longest),
    ]
    variants = list(images.study.variants)
    styles = variant_styles(variants, images.study.baseline)
    with figure_style():
        figure = new_figure(2.4)
        for panel, (title, results, metric, setting) in zip(figure.subplots(1, len(panels)), panels, strict=True):
            axis_plot.draw_differences(panel, results, styles, "ghost", metric, setting)
            panel.set_title(title)
            panel.set_ylabel("difference to group" if metric == "error_rate" else "")
        figure.supxlabel("images per normalization batch", fontsize=9)
        variant_legend(figure, styles, variants)
        picture = render(figure, "batch_size", "", "")
    arguments.output.write_bytes(picture.png)
    print(arguments.output)


if __name__ == "__main__":
    main()
