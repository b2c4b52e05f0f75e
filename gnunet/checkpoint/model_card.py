"""The model card of an export, README.md in RUN/model/: how to sample from it, its data, settings and scores."""

import hashlib
import os
import shutil
from pathlib import Path

from diffusers import ModelMixin
from huggingface_hub import ModelCard, ModelCardData

from gnunet.checkpoint.checkpoint import TrainState
from gnunet.checkpoint.jsonl import read_jsonl
from gnunet.checkpoint.run_dir import RunDir
from gnunet.data import FloatLabels
from gnunet.diffusion import Process, sample_labels
from gnunet.errors import CheckpointError, expand, quoted
from gnunet.safe_io import MAX_JSON_BYTES, read_json, read_text
from gnunet.scaling import as_size

CARD = "README.md"
TEMPLATE = Path(__file__).with_name("model_card.md.j2")
MARK = "<!-- gnunet writes this card and its pictures again with each export unless it is edited ({}) -->\n"
SAMPLERS = {"ddpm": "ddim", "edm": "dpm++", "flow": "euler"}
"""For each process, a sampler of gnunet that a loop over the steps of a diffusers scheduler is the same as."""
NUM_IMAGES = 4  # that the recipe samples


def write_card(
    folder: Path, run: RunDir, unet: ModelMixin, process: Process, state: TrainState, reason: str | None
) -> None:
    """Write the card of the new export in `folder`, with the run's newest grid of samples and its curves beside it;
    nothing if RUN/model/ has a card that the user wrote or edited.

    Equal runs have equal cards: nothing depends on time, machine or paths. `reason` is why plain diffusers does not
    sample from the export, None if it does.
    """
    if os.path.lexists(run.model / CARD) and not is_unedited(run.model / CARD):
        return
    own_ema = run.model == run.path / "model"  # else one of `gnunet ema`, which has no pictures and scores
    grids = [file for file in run.samples.glob("*.png") if file.stem.isdigit() and int(file.stem) <= state.images]
    pictures = {"samples.png": max(grids, default=run.samples), "curves.png": run.curves}
    pictures = {name: file for name, file in pictures.items() if file.is_file() and own_ema}
    for name, file in pictures.items():
        shutil.copyfile(file, folder / name, follow_symlinks=False)

    config, data, labels, null, classes = run.config, state.data, None, None, ""
    if "labels" in data:
        float_labels = FloatLabels(**data["labels"])
        labels, null = float_labels.draw(range(NUM_IMAGES), config.seed), float_labels.null
    elif (counts := data["class_counts"]) is not None:
        labels = sample_labels(range(NUM_IMAGES), config.seed, counts)
        null = len(counts) if config.data.label_dropout else None
        classes = quoted([f"{i} {name}" for i, name in enumerate(data["class_names"]) if counts[i]])
    scheduler = process.scheduler(SAMPLERS[process.kind], config.sampling.num_inference_steps)
    source = None if expand(config.data.source).exists() else config.data.source  # embedded, or on the hub
    measures, records = ("validation_loss", *config.evaluate.metrics), read_jsonl(run.metrics.path) if own_ema else []
    metadata = ModelCardData(
        library_name="diffusers", tags=["gnunet", process.kind],
        pipeline_tag="image-to-image" if config.data.condition else "unconditional-image-generation",
        datasets=[source] if source not in (None, "noto_emoji") else None,
    )  # fmt: skip
    card = ModelCard.from_template(
        metadata, template_path=str(TEMPLATE), config=config, data=data, state=state, unet=unet, process=process,
        reason=reason, own_ema=own_ema, pictures=pictures, source=source, labels=labels, null=null, classes=classes,
        n=NUM_IMAGES, has_pipeline=(folder / "model_index.json").exists(), sampler=SAMPLERS[process.kind],
        scheduler=type(scheduler).__name__, timesteps=scheduler.timesteps.tolist(),
        vae=read_json(folder / "vae/config.json") if (folder / "vae").is_dir() else None,
        shape=(unet.config.out_channels, *as_size(unet.config.sample_size)),
        scores={key: each for each in records for key in measures if each["images"] <= state.images and key in each},
    )  # fmt: skip
    (folder / CARD).write_bytes(_with_mark(str(card).encode(errors="backslashreplace").decode()).encode())


def is_unedited(card: Path) -> bool:
    """Whether a file is a card as gnunet wrote it; otherwise it is the user's."""
    try:
        text = read_text(card, MAX_JSON_BYTES)
    except CheckpointError:
        return False
    return text == _with_mark(text[: text.rfind("<!--")])


def _with_mark(text: str) -> str:
    return text + MARK.format(hashlib.sha256(text.encode()).hexdigest())
