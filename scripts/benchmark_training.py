"""Compare gnunet's training loop with diffusers' UNet2DModel driven as its train_unconditional.py drives it.

python scripts/benchmark_training.py [--cases small cifar10] [--rounds 30] [--out assets/benchmarks]

Both sides train the same architecture on the same images with DDPM's noise prediction, AdamW, gradient clipping
and a moving average, in one process, in alternating blocks of steps whose order changes from round to round.
A side's loop is the whole of it: loader, step, average, logging. Reported are the medians over the rounds, the
median of the rounds' ratios, the bytes autograd saves for backward (each storage once, parameters left out) and
the peak of the memory a step allocates.
"""

import argparse
import datetime
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import accelerate
import diffusers
import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import DDPMScheduler, UNet2DModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from PIL import Image
from torch import nn

from gnunet.cli import parse
from gnunet.config import Config, unet_kwargs
from gnunet.data import load_images
from gnunet.training.metrics import JsonLines
from gnunet.training.session import build, make_accelerator

ROOT = Path(__file__).parent.parent
CASES = {
    "small": ["--config", str(ROOT / "configs/noto_portraits32.yaml")],
    "cifar10": [
        "--config", str(ROOT / "configs/cifar10.yaml"), "--data.source", "noto_emoji", "--model.dropout", "0",
        "--train.batch_size", "8",
    ],
}  # fmt: skip
"""What is trained, as arguments of train.py; the images are the embedded ones in every case."""
COMMON = [
    "--data.class_conditional", "false", "--data.num_workers", "0", "--diffusion.kind", "ddpm",
    "--train.images", "1e9", "--train.warmup_images", "0", "--train.lr_schedule", "constant",
    "--train.learning_rate", "1e-4",
]  # fmt: skip


def our_loop(config: Config, accelerator: Accelerator, run: Path) -> tuple[nn.Module, Callable[[], None]]:
    """gnunet's network, and a function that does one step of its loop."""
    session = build(config, accelerator)
    batches, log = session.batches(0), JsonLines(run / "metrics.jsonl")
    seen, window = 0, 0.0

    def step() -> None:
        nonlocal seen, window
        result = session.step(batches, seen, stop=False)
        seen, window = seen + config.train.batch_size, window + result.loss
        if seen // config.train.log_every > (seen - config.train.batch_size) // config.train.log_every:
            log.write({"images": seen, "loss": window, "grad_norm": result.grad_norm})
            window = 0.0

    return session.unet, step


def peer_batches(config: Config) -> Iterator[torch.Tensor]:
    """Batches as the script's loader makes them: a shuffled DataLoader over pictures, transformed one by one."""
    table = load_images(config.data, config.model.in_channels)
    pictures = [Image.fromarray(array) for array in np.asarray(table.images)]

    def transform(picture: Image.Image) -> torch.Tensor:
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


def peer_loop(config: Config, accelerator: Accelerator, run: Path) -> tuple[nn.Module, Callable[[], None]]:
    """diffusers' network of the same architecture, and one step of its training script's loop."""
    keys = {key: value for key, value in unet_kwargs(config, None).items() if key != "norm"}
    unet = UNet2DModel(**keys).to(accelerator.device).train()
    optimizer = torch.optim.AdamW(
        unet.parameters(), lr=config.train.learning_rate, weight_decay=config.train.weight_decay,
        betas=(config.train.adam_beta1, config.train.adam_beta2),
    )  # fmt: skip
    ema = EMAModel(unet.parameters(), use_ema_warmup=True, model_cls=UNet2DModel, model_config=unet.config)
    scheduler = DDPMScheduler(num_train_timesteps=1000)
    model, optimizer = accelerator.prepare(unet, optimizer)
    lr_scheduler = get_scheduler("constant", optimizer)
    ema.to(accelerator.device)
    dtype = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[config.train.mixed_precision]
    batches, log, seen = peer_batches(config), JsonLines(run / "peer.jsonl"), 0

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

    return unet, step


def saved_bytes(network: nn.Module, step: Callable[[], None]) -> int:
    """Bytes one step keeps for backward: every storage once, parameters left out."""
    parameters = {p.untyped_storage().data_ptr() for p in network.parameters()}
    storages: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage  # held, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step()
    return sum(storage.nbytes() for storage in storages.values())


def peak_bytes(step: Callable[[], None], device: torch.device) -> int:
    """The most memory that one step holds beyond what was allocated before it."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profiler:
        step()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    return int(np.cumsum([e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]).max())


def seconds_of(step: Callable[[], None], count: int, device: torch.device) -> float:
    """Wall time of `count` steps."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(count):
        step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def compare(config: Config, accelerator: Accelerator, rounds: int, block: int) -> dict[str, Any]:
    """The record of one case."""
    device = accelerator.device
    with tempfile.TemporaryDirectory() as folder:
        sides = {
            "gnunet": our_loop(config, accelerator, Path(folder)),
            "diffusers": peer_loop(config, accelerator, Path(folder)),
        }
        record: dict[str, Any] = {}
        for name, (network, step) in sides.items():
            seconds_of(step, 2, device)
            record[name] = {
                "parameters": sum(p.numel() for p in network.parameters()),
                "saved_for_backward_mib": saved_bytes(network, step) / 2**20,
                "peak_of_a_step_mib": peak_bytes(step, device) / 2**20,
            }
        times: dict[str, list[float]] = {name: [] for name in sides}
        for number in range(rounds):
            order = list(sides) if number % 2 == 0 else list(reversed(sides))
            for name in order:
                times[name].append(seconds_of(sides[name][1], block, device) / block)
    for name in sides:
        rates = [config.train.batch_size / seconds for seconds in times[name]]
        record[name]["images_per_second"] = statistics.median(rates)
        record[name]["images_per_second_quartiles"] = statistics.quantiles(rates, n=4)[::2]
    ratios = [peer / ours for ours, peer in zip(times["gnunet"], times["diffusers"], strict=True)]
    record["speed_ratio"] = statistics.median(ratios)
    record["speed_ratio_quartiles"] = statistics.quantiles(ratios, n=4)[::2]
    for key in ("saved_for_backward_mib", "peak_of_a_step_mib"):
        record[key.replace("_mib", "_ratio")] = record["gnunet"][key] / record["diffusers"][key]
    return record


def device_name(device: torch.device) -> str:
    """The device as a person names it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return f"{line.split(':', 1)[1].strip()}, {torch.get_num_threads()} threads"
    return f"{platform.processor() or 'CPU'}, {torch.get_num_threads()} threads"


def main() -> None:
    """Run the cases, print a table, write the record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--rounds", type=int, default=30, help="pairs of blocks, at least 2 (default 30)")
    parser.add_argument("--block", type=int, default=4, help="steps in a block (default 4)")
    parser.add_argument("--precision", choices=("no", "bf16", "fp16"), default="no")
    parser.add_argument("--batch_size", type=int, help="instead of the case's own")
    parser.add_argument("--out", type=Path, help="folder to write DATE-DEVICE-training.json to")
    arguments = parser.parse_args()

    results = {}
    for case in arguments.cases:
        flags = [*CASES[case], *COMMON, "--train.mixed_precision", arguments.precision]
        if arguments.batch_size:
            flags += ["--train.batch_size", str(arguments.batch_size)]
        config = parse(flags, default_config=ROOT / "configs/noto_portraits32.yaml")
        accelerator = make_accelerator(config)
        results[case] = compare(config, accelerator, arguments.rounds, arguments.block)
        results[case]["batch_size"] = config.train.batch_size
        print(case, json.dumps(results[case], indent=1), flush=True)
    date, kind = datetime.date.today().isoformat(), accelerator.device.type
    record = {
        "date": date, "device": device_name(accelerator.device), "precision": arguments.precision,
        "python": platform.python_version(), "torch": torch.__version__, "diffusers": diffusers.__version__,
        "accelerate": accelerate.__version__, "rounds": arguments.rounds,
        "block": arguments.block, "cases": results,
    }  # fmt: skip
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        name = kind if kind == "cpu" else device_name(accelerator.device).lower().replace(" ", "-")
        path = arguments.out / f"{date}-{name}-training.json"
        path.write_text(json.dumps(record, indent=1) + "\n")
        print(f"record: {path}")


if __name__ == "__main__":
    main()
