"""What updates the weights of a run: AdamW, or Muon with AdamW."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gnunet.config import TrainConfig
from gnunet.models import UNet2D


def make_optimizer(unet: UNet2D, train: TrainConfig) -> torch.optim.AdamW:
    """The optimizer of `train` over all parameters of a network, in their order."""
    settings = {
        "lr": train.learning_rate, "betas": (train.adam_beta1, train.adam_beta2), "eps": train.adam_eps,
        "weight_decay": train.weight_decay, "fused": True,
    }  # fmt: skip
    if train.optimizer == "adamw":
        return torch.optim.AdamW(unet.parameters(), **settings)
    # As its authors advise, not what reads images or labels and what makes the output.
    ends = (unet.conv_in, unet.conv_out, unet.augment_embedding)
    layers = (each for each in unet.modules() if isinstance(each, (nn.Linear, nn.Conv2d)) and each not in ends)
    return MuonAdamW(unet.parameters(), [layer.weight for layer in layers], **settings)


class MuonAdamW(torch.optim.AdamW):
    """torch.optim.Muon (Jordan et al., 2024) for some weights, as matrices with a row for each output, else AdamW.

    Muon's updates have the size of AdamW's (Liu et al., 2025, "Muon is Scalable for LLM Training"), so that both share
    learning rate and weight decay.

    Args:
        params: all parameters, in one group.
        matrices: those for Muon, of 2 or 4 dimensions.
        settings: AdamW's.
    """

    def __init__(self, params: Any, matrices: Sequence[Tensor], **settings: Any) -> None:
        super().__init__(params, **settings)
        self.matrices = list(matrices)
        self._views = [nn.Parameter(_as_matrix(weight.detach(), weight)) for weight in self.matrices]
        self._muon = torch.optim.Muon(self._views, adjust_lr_fn="match_rms_adamw")

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        grads = [weight.grad for weight in self.matrices]
        for weight, view in zip(self.matrices, self._views, strict=True):
            if weight.grad is None:
                continue
            if not (state := self.state[weight]):
                state |= {"step": torch.zeros(()), "momentum_buffer": torch.zeros_like(weight)}
            state["step"] += 1
            self._muon.state[view] = {"momentum_buffer": _as_matrix(state["momentum_buffer"], weight)}
            view.data = _as_matrix(weight.data, weight)
            view.grad = _as_matrix(torch.empty_like(weight).copy_(weight.grad), weight)  # in the weight's layout
            weight.grad = None
        settings = self.param_groups[0]
        self._muon.param_groups[0].update(lr=float(settings["lr"]), weight_decay=settings["weight_decay"])
        self._muon.step()
        loss = super().step(closure)
        for weight, view, grad in zip(self.matrices, self._views, grads, strict=True):
            weight.grad, view.grad = grad, None
        return loss


def _as_matrix(tensor: Tensor, like: Tensor) -> Tensor:
    """A view of a weight, or of a tensor of its shape and strides, with a row for each output."""
    channels_last = like.dim() == 4 and like.is_contiguous(memory_format=torch.channels_last)
    return (tensor.permute(0, 2, 3, 1) if channels_last else tensor).view(len(tensor), -1)
