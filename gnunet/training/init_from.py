"""The weights of another model as the first weights of a run (train.init_from)."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from gnunet.checkpoint.trained_model import TrainedModel, find_checkpoint, load_from_checkpoint, load_trained_model
from gnunet.config import ModelConfig, make_condition
from gnunet.config.yaml_io import format_value
from gnunet.data import Condition
from gnunet.distributed.accelerator import run_on_main_rank
from gnunet.distributed.fsdp import shard_of, to_local
from gnunet.errors import CheckpointError, ConfigError, GnunetError, first_few
from gnunet.models import UNet2D
from gnunet.models.pretrained import find_model
from gnunet.training.session import Session

CLASSES, TIME_BIAS = "class_embedding.weight", "time_embedding.linear_2.bias"


@torch.no_grad()
def load_initial_weights(session: Session) -> tuple[dict[str, Any], str]:
    """Load the weights of train.init_from into network and EMA as far as they fit, on every rank; returns what was
    loaded as a record and as text. Raises CheckpointError or ConfigError as `load_trained_model` and `fit_weights`."""
    train, rank = session.config.train, (session.accelerator.process_index, session.accelerator.num_processes)
    find = partial(find_model, str(train.init_from))
    try:
        # One that is still training may get a newer checkpoint meanwhile.
        checkpoint = run_on_main_rank(session.accelerator, lambda: find_checkpoint(find()))
        load = load_from_checkpoint if checkpoint else load_trained_model
        source = load(checkpoint or find(), train.init_weights)
    except GnunetError as error:
        raise CheckpointError(f"train.init_from: {error}") from None
    condition, names = make_condition(session.config), session.train_set.metadata["class_names"]
    weights, fitted = fit_weights(source, session.unet, names, condition)
    for into in (each.state_dict() for each in (*session.ema.models, session.unet)):
        for name in into.keys() & weights.keys():
            rows = shard_of(weights[name], *rank) if isinstance(into[name], DTensor) else weights[name]
            to_local(into[name]).copy_(rows)
    new = [name for name in into if name not in weights]
    left_out = [name for name in source.network.state_dict() if name not in into]
    lists = {"fitted": fitted, "new": new, "left out": left_out}
    loaded = f"initialized from {train.init_from} ({source.name}): {len(into) - len(new)} tensors"
    text = "; ".join([loaded, *(f"{title}: {first_few(names)}" for title, names in lists.items() if names)])
    return {"source": source.name, **lists}, text


def fit_weights(
    source: TrainedModel, unet: UNet2D, class_names: Sequence[str] | None, condition: Condition | None = None
) -> tuple[dict[str, Tensor], list[str]]:
    """The weights of `source` for a network with other channels and classes, and what was fitted.

    A grey image has the same features and output as in RGB. Conditions that the source lacks have no effect yet.
    A class has the embedding of the source's class of that name; others, the null label and a network without classes
    have that of its null label, or the mean over its classes. ConfigError if other tensors differ in shape.
    """
    weights, shapes = source.network.state_dict(), {name: value.shape for name, value in unet.state_dict().items()}
    theirs, ours, fitted = source.network.config, unet.config, []
    parts = weights["conv_in.weight"].tensor_split([theirs.out_channels, theirs.in_channels], dim=1)
    image, added, one = parts  # the last for a constant channel, which some norms append
    if (theirs.out_channels, ours.out_channels) in ((1, 3), (3, 1)):
        fitted.append("grey and RGB")
        is_grey = ours.out_channels == 1
        image = image.sum(1, keepdim=True) if is_grey else image.expand(-1, 3, -1, -1) / 3
        for name in weights.keys() & {"conv_out.weight", "conv_out.bias"}:
            rows = weights[name]
            weights[name] = rows.mean(0, keepdim=True) if is_grey else rows.repeat_interleave(3, dim=0)
    kinds = [each and (each.kind, each.num_classes) for each in (source.condition, condition)]
    if added.shape[1] != (channels := ours.in_channels - ours.out_channels) or kinds[0] != kinds[1]:
        fitted.append("condition")
        added = image.new_zeros(len(image), channels, *image.shape[2:])
    if one.shape[1] != (channels := shapes["conv_in.weight"][1] - ours.in_channels):
        one = image.new_zeros(len(image), channels, *image.shape[2:])
    weights["conv_in.weight"] = torch.cat([image, added, one], dim=1)

    names, wanted = source.class_names or [], list(class_names or [])
    if TIME_BIAS not in weights:  # where magnitudes are preserved, labels go through a linear layer of these classes
        if CLASSES in weights and (names != wanted or weights[CLASSES].shape != shapes.get(CLASSES)):
            del weights[CLASSES]
    else:
        rows = weights.pop(CLASSES, weights[TIME_BIAS].new_zeros(1, len(weights[TIME_BIAS])))
        has_null = source.null_label is not None and source.float_labels is None
        unlabelled = rows[source.null_label] if has_null else rows.mean(0)
        if source.config is None and names != wanted and names == [str(number) for number in range(len(wanted))]:
            names = wanted  # a diffusers folder has none
            fitted.append("classes by number")
        if CLASSES in shapes and (TIME_BIAS in shapes or rows.any()):
            embeddings = [rows[names.index(name)] if name in names else unlabelled for name in wanted]
            weights[CLASSES] = torch.stack([*embeddings, unlabelled])[: ours.num_class_embeds]
            if TIME_BIAS not in shapes:
                weights[CLASSES] = weights[CLASSES].T
            if names != wanted:
                new = [name for name in wanted if name not in names]
                fitted.append(f"classes by name, of which {len(new)} are new ({first_few(new)})")
        else:
            weights[TIME_BIAS] = weights[TIME_BIAS] + unlabelled

    if wrong := [name for name in weights if name in shapes and weights[name].shape != shapes[name]]:
        keys = [key for key in ModelConfig.model_fields if key != "norm" and theirs.get(key) != ours.get(key)]
        valid = ", ".join(f"model.{key} {format_value(theirs.get(key))}" for key in keys) or "the source's model.norm"
        raise ConfigError(f"train.init_from: {source.name} has other shapes of {first_few(wrong)}; valid: {valid}")
    return weights, fitted
