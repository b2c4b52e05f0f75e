"""What benchmark_training.py compares: the training loops of gnunet and of diffusers, eager and with torch.compile."""

import inspect
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from PIL import Image
from torch import Tensor, nn

from gnunet.checkpoint.jsonl import JsonlLogger
from gnunet.config import Config, image_kwargs, unet_kwargs
from gnunet.data import load_images
from gnunet.distributed.accelerator import make_accelerator
from gnunet.training.session import build_session, compile_network
from gnunet.training.trainer import train_step

COMPILED = "_compiled"
DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
GRADIENT_TOLERANCE = {"no": 2e-2, "fp16": 5e-2, "bf16": 2.5e-1}
"""By precision, the error of compiled gradients above which they are wrong, not rounded; a GPU's fp32 is TF32."""
_NEGLIGIBLE = 1e-5  # of the largest gradient's norm: key biases in attention have a gradient of rounding errors alone


@dataclass(frozen=True)
class Loop:
    """A network and a function that does one step of the loop that trains it."""

    network: nn.Module
    step: Callable[[], None]
    device: torch.device

    def seconds(self, repeats: int) -> float:
        """The mean wall time of `repeats` steps."""
        start = self.now()
        for _ in range(repeats):
            self.step()
        return (self.now() - start) / repeats

    def now(self) -> float:
        """Seconds on a clock, when the device has done what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def gnunet_loop(config: Config, folder: Path) -> Loop:
    """gnunet's network and loop."""
    session = build_session(config, make_accelerator(config))
    batches, log = session.batches(0), JsonlLogger(folder / "metrics.jsonl")
    seen, window, unread = 0, 0.0, deque()

    def step() -> None:
        nonlocal seen, window
        unread.append(train_step(session, batches, seen))
        seen += config.train.batch_size
        is_due = seen // config.train.log_every > (seen - config.train.batch_size) // config.train.log_every
        while len(unread) > (session.reads_late and not is_due):
            result = unread.popleft()()
            window += result.loss
        if is_due:
            log.write({"images": seen, "loss": window, "grad_norm": result.grad_norm})
            window = 0.0

    return Loop(session.unet, step, session.accelerator.device)


def _diffusers_batches(config: Config) -> Iterator[Tensor]:
    """Batches as the script's loader makes them: a shuffled DataLoader over pictures, transformed one by one."""
    table = load_images(**image_kwargs(config), channels=config.model.in_channels)
    pictures = [Image.fromarray(array) for array in np.asarray(table.images)]

    def transform(picture: Image.Image) -> Tensor:
        if torch.rand(()) < 0.5:
            picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        array = torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous().float().div(255)
        return (array - 0.5) / 0.5

    loader = torch.utils.data.DataLoader(
        pictures, batch_size=config.train.batch_size, shuffle=True, drop_last=True,
        collate_fn=lambda batch: torch.stack([transform(picture) for picture in batch]),
    )  # fmt: skip
    while True:
        yield from loader


def diffusers_loop(config: Config, folder: Path) -> Loop:
    """diffusers' network of the same architecture, and the loop of its train_unconditional.py."""
    accelerator = make_accelerator(config)
    known = inspect.signature(UNet2DModel.__init__).parameters
    unet = UNet2DModel(**{key: value for key, value in unet_kwargs(config, None).items() if key in known})
    unet.to(accelerator.device).train()
    optimizer = torch.optim.AdamW(
        unet.parameters(), lr=config.train.learning_rate, weight_decay=config.train.weight_decay,
        betas=(config.train.adam_beta1, config.train.adam_beta2),
    )  # fmt: skip
    ema = EMAModel(unet.parameters(), use_ema_warmup=True, model_cls=UNet2DModel, model_config=unet.config)
    scheduler = DDPMScheduler(num_train_timesteps=1000)
    model, optimizer = accelerator.prepare(unet, optimizer)
    lr_scheduler = get_scheduler("constant", optimizer)
    ema.to(accelerator.device)
    dtype = DTYPES[config.train.mixed_precision]
    batches, log, seen = _diffusers_batches(config), JsonlLogger(folder / "metrics.jsonl"), 0

    def step() -> None:
        nonlocal seen
        clean = next(batches).to(accelerator.device, dtype)
        noise = torch.randn(clean.shape, dtype=dtype, device=clean.device)
        steps = torch.randint(0, 1000, (len(clean),), device=clean.device).long()
        noisy = scheduler.add_noise(clean, noise, steps)
        loss = F.mse_loss(model(noisy, steps).sample.float(), noise.float())
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        lr_scheduler.step()
        optimizer.zero_grad()
        ema.step(model.parameters())
        seen += len(clean)
        log.write({"images": seen, "loss": loss.detach().item(), "lr": lr_scheduler.get_last_lr()[0]})

    return Loop(unet, step, accelerator.device)


_LOOPS = {"gnunet": gnunet_loop, "diffusers": diffusers_loop}
SIDES = (*_LOOPS, *(name + COMPILED for name in _LOOPS))
"""The loops by name; the compiled ones are the same with the network compiled."""


def make_loop(side: str, config: Config, folder: Path) -> Loop:
    """The loop of a side, not yet compiled; its log goes to `folder`."""
    return _LOOPS[side.removesuffix(COMPILED)](config, folder)


def compile_loop(loop: Loop) -> tuple[float, float]:
    """torch.compile a loop's network in place, and compare its gradients with the eager ones.

    Both get the inputs of a step of the loop, so that no later step recompiles.

    Returns:
        The seconds of the first forward and backward pass, which compile, and the error of the gradients: the largest
        of any parameter, relative to the eager gradient; NaN where a gradient is not finite.
    """
    given: list[tuple[tuple, dict]] = []
    handle = loop.network.register_forward_pre_hook(lambda _, *arguments: given.append(arguments), with_kwargs=True)
    loop.step()
    handle.remove()
    args, kwargs = given[0]

    def gradients() -> list[Tensor]:
        prediction = loop.network(*args, **kwargs)[0].float()
        (prediction.square().sum() / len(prediction)).backward()
        found = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in loop.network.parameters()]
        loop.network.zero_grad()
        return found

    expected = gradients()
    compile_network(loop.network, loop.device)
    start = loop.now()
    found = gradients()
    return loop.now() - start, gradient_error(found, expected)


def gradient_error(found: list[Tensor], expected: list[Tensor]) -> float:
    """The largest norm of a difference over the norm of the expected ones."""
    norms = torch.stack([gradient.norm() for gradient in expected])
    differences = torch.stack([(mine - other).norm() for mine, other in zip(found, expected, strict=True)])
    return float((differences / norms.clamp(min=_NEGLIGIBLE * norms.max())).max())
