"""What updates the weights of a run: AdamW, with its state in 8 bits or not, or Muon with AdamW."""

from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from gnunet.checkpoint.checkpoint import new_adamw_state
from gnunet.config import TrainConfig
from gnunet.errors import ConfigError
from gnunet.models import UNet2D

ENDS = ("conv_in.", "conv_out.", "time_proj.", "class_embedding.", "augment_embedding.")
"""Parts of the network that read images or labels or make outputs, which are not for Muon, as its authors advise."""
LOSS_LEARNING_RATE = 0.01  # of the learned weighting, at the peak of the schedule, whatever the network's


def adamw_settings(train: TrainConfig) -> dict[str, Any]:
    """The arguments of torch.optim.AdamW."""
    return {
        "lr": train.learning_rate, "betas": (train.adam_beta1, train.adam_beta2), "eps": train.adam_eps,
        "weight_decay": train.weight_decay, "fused": True,
    }  # fmt: skip


def make_optimizer(unet: UNet2D, train: TrainConfig) -> torch.optim.AdamW:
    """The optimizer of `train` over all parameters of a network, in their order, in groups of an `lr_factor`: those
    whose gradients are clipped and, if there is one, the head of the learned weighting."""
    settings = adamw_settings(train)
    head = [] if unet.loss_log_variance is None else [*unet.loss_log_variance.parameters()]  # the last of all
    named = {name: each for name, each in unet.named_parameters() if each not in {*head}}
    groups: list[dict[str, Any]] = [{"params": [*named.values()], "lr_factor": 1.0}]
    if head:
        groups.append({"params": head, "lr_factor": LOSS_LEARNING_RATE / train.learning_rate, "weight_decay": 0.0})
    if train.optimizer == "adamw":
        return torch.optim.AdamW(groups, **settings)
    if train.optimizer == "adamw8bit":
        return AdamW8bit(groups, **settings)
    matrices = [weight for name, weight in named.items() if weight.dim() > 1 and not name.startswith(ENDS)]
    return MuonAdamW(groups, matrices, **settings)


def check_optimizer(train: TrainConfig) -> None:
    """Raise ConfigError if the library of train.optimizer is not installed."""
    if train.optimizer == "adamw8bit" and find_spec("bitsandbytes") is None:
        valid = "adamw, or with bitsandbytes: pip install 'gnunet[optimizers]'"
        raise ConfigError(f"train.optimizer: given adamw8bit; valid: {valid}")


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
        self._views = {weight: nn.Parameter(_as_matrix(weight.detach(), weight)) for weight in matrices}
        self._muon = torch.optim.Muon(self._views.values(), adjust_lr_fn="match_rms_adamw")

    def new_state(self, weight: Tensor) -> dict[str, Tensor]:
        """A weight's state before its first step."""
        if weight not in self._views:
            return new_adamw_state(weight)
        return {"step": torch.zeros(()), "momentum_buffer": torch.zeros_like(weight)}

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        for weight, view in _fill_views(self._views):
            state = self.state[weight] = self.state[weight] or self.new_state(weight)
            state["step"] += 1
            self._muon.state[view] = {"momentum_buffer": _as_matrix(state["momentum_buffer"], weight)}
        settings = self.param_groups[0]
        self._muon.param_groups[0].update(lr=float(settings["lr"]), weight_decay=settings["weight_decay"])
        self._muon.step()
        self._muon.zero_grad()
        grads = {weight: weight.grad for weight in self._views}
        for weight in grads:
            weight.grad = None
        loss = super().step(closure)
        for weight, grad in grads.items():
            weight.grad = grad
        return loss


class AdamW8bit(torch.optim.AdamW):
    """bitsandbytes' AdamW8bit (Dettmers et al., 2022, "8-bit Optimizers via Block-wise Quantization"), which keeps the
    weights' memory format."""

    def __init__(self, params: Any, **settings: Any) -> None:
        from bitsandbytes.optim import AdamW8bit as Blockwise

        super().__init__(params, **settings)
        self._step_supports_amp_scaling = False  # as in Muon
        groups = [group["params"] for group in self.param_groups]
        self._views = {p: nn.Parameter(_as_matrix(p.detach(), p)) for group in groups for p in group}
        self._blockwise = Blockwise([{"params": [self._views[weight] for weight in group]} for group in groups])

    def new_state(self, weight: Tensor) -> dict[str, Tensor]:
        """A weight's state before its first step; the next one begins with what is then in it."""
        view = self._views[weight]
        self._blockwise.init_state(self._blockwise.param_groups[0], view, 0, 0)
        state = {key: value for key, value in self._blockwise.state[view].items() if not key.startswith("qmap")}
        self.state[weight] = state | {"step": torch.zeros(())}
        return self.state[weight]

    def load_state_dict(self, state_dict: Any) -> None:
        """Nothing, after `new_state`: AdamW's would make 32-bit numbers of the state."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for ours, theirs in zip(self.param_groups, self._blockwise.param_groups, strict=True):
            theirs.update({key: ours[key] for key in ("lr", "betas", "eps", "weight_decay")})
        for weight, view in _fill_views(self._views):
            state = self.state[weight] or self.new_state(weight)
            self._blockwise.state[view]["step"] = int(state["step"])
            state["step"] += 1
        self._blockwise.step()
        self._blockwise.zero_grad()


def _fill_views(views: Mapping[Tensor, nn.Parameter]) -> list[tuple[Tensor, nn.Parameter]]:
    """Give views of weights their data and gradients; returns those that have one, with their weights."""
    for weight, view in views.items():
        view.data = _as_matrix(weight.data, weight)
        if (grad := weight.grad) is not None:
            grad = grad if grad.stride() == weight.stride() else torch.empty_like(weight).copy_(grad)
            view.grad = _as_matrix(grad, weight)
    return [pair for pair in views.items() if pair[1].grad is not None]


def _as_matrix(tensor: Tensor, like: Tensor) -> Tensor:
    """A view of a weight, or of a tensor of its shape and strides, with a row for each output and contiguous."""
    channels_last = like.dim() == 4 and like.is_contiguous(memory_format=torch.channels_last)
    return (tensor.permute(0, 2, 3, 1) if channels_last else tensor).view(*tensor.shape[:1], -1)
