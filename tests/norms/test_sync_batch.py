"""sync_batch on several processes is batch on the union of their batches."""

import os
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from gnunet.norms import make_norm, update_bn_stats

PROCESSES = 2


def work(folder: Path) -> int:
    """Forward and backward of a layer on this process's part of the batch; leaves what comes of it in RANK.pt."""
    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=PROCESSES)
    data = torch.load(folder / "data.pt")
    part = slice(0, 3) if rank == 0 else slice(3, 5)
    results = {}
    for name in ("eager", "compiled", "precise"):
        layer = make_norm({"kind": "sync_batch"}, 12, activation="silu").double()
        layer.load_state_dict(data["state"])
        if name == "precise":
            update_bn_stats(layer, [(data["x"][part],)])
        else:
            if name == "compiled":
                layer.compile(fullgraph=True, backend="aot_eager")
            x = data["x"][part].requires_grad_()
            y = layer(x)
            y.backward(data["dy"][part])
            results[name] = {"y": y.detach(), "dx": x.grad, "dweight": layer.weight.grad}
        results.setdefault(name, {})["state"] = layer.state_dict()
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()
    return 0


def test_two_processes_with_batches_of_different_sizes(draw, run_ranks, tmp_path):
    def fresh():
        return make_norm({"kind": "batch"}, 12, activation="silu").double()

    layer, x, dy = fresh(), draw(5, 12, 3, 5, mean=1.0), draw(5, 12, 3, 5, seed=1)
    x[3:] += 4  # so that the processes' own means differ
    torch.save({"x": x, "dy": dy, "state": layer.state_dict()}, tmp_path / "data.pt")
    run_ranks(PROCESSES, partial(work, tmp_path))
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(PROCESSES))

    x.requires_grad_()
    y = layer(x)
    y.backward(dy)
    for name in ("eager", "compiled"):
        torch.testing.assert_close(torch.cat([first[name]["y"], second[name]["y"]]), y.detach())
        torch.testing.assert_close(torch.cat([first[name]["dx"], second[name]["dx"]]), x.grad)
        torch.testing.assert_close(first[name]["dweight"] + second[name]["dweight"], layer.weight.grad)
        for result in (first, second):
            torch.testing.assert_close(result[name]["state"], layer.state_dict())

    precise = fresh()
    update_bn_stats(precise, [(x.detach(),)])
    for result in (first, second):
        torch.testing.assert_close(result["precise"]["state"], precise.state_dict())
