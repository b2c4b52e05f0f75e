"""Inception-v3 as FID uses it, from torch-fidelity."""

import io
from pathlib import Path

import torch

from gnunet.errors import ConfigError
from gnunet.evaluation.extractors.base import Extractor, find_weights, fitting_weights, weights_digest

URL = "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"


def load_inception(weights: str | Path | None, device: torch.device) -> Extractor:
    """The 2048 pooled features of the Inception-v3 of 2015-12-05 that defines FID (Heusel et al., 2017).

    torch-fidelity's network resizes to 299 pixels itself, by TensorFlow 1's bilinear filter without antialiasing.
    """
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision built for another torch
        raise ConfigError(
            "extractor inception needs torch-fidelity (which needs torchvision): "
            f"pip install 'gnunet[inception]' ({error})"
        ) from error
    state = find_weights("inception", weights, URL)
    # torch-fidelity unpickles the file it is given, so pass it weights that were read without running code.
    plain = io.BytesIO()
    torch.save(state, plain)
    plain.seek(0)
    with fitting_weights("inception"):
        network = FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=plain)
    network = network.to(device)
    kind, digest = "torch-fidelity inception-v3-compat 2048", weights_digest(network.state_dict())
    return Extractor("inception", lambda images: network(images)[0], kind, digest, None, device)
