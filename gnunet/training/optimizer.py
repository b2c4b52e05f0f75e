"""What updates the weights of a run: AdamW, or Muon with AdamW."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gnunet.config import TrainConfig
from gnunet.models import UNet2D

ENDS = ("conv_in.", "conv_out.", "time_proj.", "class_embedding.", "augment_embedding.")
"""Parts of the network that read images or labels or make outputs, which are not for Muon, as its authors advise."""
LOSS_LEARNING_RATE = 0.01  # of the learned weighting, at the peak of the schedule, whatever the network's


def make_optimizer(unet: UNet2D, train: TrainConfig) -> torch.optim.AdamW:
    """The optimizer of `train` over all parameters of a network, in their order, in groups of an `lr_factor`: those
    whose gradients are clipped and, if there is one, the head of the learned weighting."""
    settings = {
        "lr": train.learning_rate, "betas": (train.adam_beta1, train.adam_beta2), "eps": train.adam_eps,
        "weight_decay": train.weight_decay, "fused": True,
    }  # fmt: skip
    head = [*unet.loss_log_variance.parameters()] if unet.loss_log_variance is not None else []  # the last of all
    named = {name: each for name, each in unet.named_parameters() if not any(each is other for other in head)}
    groups: list[dict[str, Any]] = [{"params": [*named.values()], "lr_factor": 1.0}]
    if head:
        groups.append({"params": head, "lr_factor": LOSS_LEARNING_RATE / train.learning_rate, "weight_decay": 0.0})
    if train.optimizer == "adamw":
        return torch.optim.AdamW(groups, **settings)
    matrices = [weight for name, weight in named.items() if weight.dim() > 1 and not name.startswith(ENDS)]
    return MuonAdamW(groups, matrices, **settings)


class MuonAdamW(torch.optim.AdamW):
    """torch.optim.Muon (Jordan et al., 2024) for some weights, as matrices with a row for each output, else AdamW.

    Muon's updates have the size of AdamW's (Liu et al., 2025, "Muon is Scalable for LLM Training"), so that both share
    learning rate and weight decay.

    Args:
        params: all parameters.
        matrices: those for Muon, of the first group and of 2 or 4 dimensions.
        settings: AdamW's.
    """

    def __init__(self, params: Any, matrices: Sequence[Tensor], **settings: Any) -> None:
        super().__init__(params, **settings)
        self._step_supports_amp_scaling = False  # GradScaler then unscales gradients and skips steps itself
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
            same_layout = weight.grad.stride() == weight.stride()
            grad = weight.grad if same_layout else torch.empty_like(weight).copy_(weight.grad)
            view.data, view.grad, weight.grad = _as_matrix(weight.data, weight), _as_matrix(grad, weight), None
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
