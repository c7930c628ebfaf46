"""Single- and multi-process runs: set-up from torchrun's environment, and the few collectives that the trainer needs."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist

from litv2.errors import UserError


def pick_device(name: str) -> torch.device:
    """Returns the device; ``auto`` selects CUDA if available, else Apple's MPS, else the CPU.

    Raises:
        UserError: this machine does not have the device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cuda":
        if not torch.cuda.is_available():
            raise UserError("--device cuda: torch finds no CUDA device; use --device cpu")
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        return device
    if name == "mps" and not torch.backends.mps.is_available():
        raise UserError("--device mps: torch finds no MPS device; use --device cpu")
    return torch.device(name)


def init(device: torch.device) -> None:
    """Joins the process group if a launcher has set RANK and WORLD_SIZE, with NCCL for CUDA and gloo otherwise.

    After a restart, torchrun (2.14) reuses the store of the processes that died, including their addresses, and the new processes
    would wait for the dead ones. On a single node each restart therefore gets its own prefix in the store. On several nodes the
    restart count differs between nodes; set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 for torchrun there.
    """
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return
    backend = "nccl" if device.type == "cuda" else "gloo"
    restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
    if restarts and os.environ.get("GROUP_WORLD_SIZE") == "1":
        store, rank, world_size = next(dist.rendezvous("env://"))
        dist.init_process_group(backend, store=dist.PrefixStore(f"restart {restarts}", store), rank=rank, world_size=world_size)
    else:
        dist.init_process_group(backend)


def shutdown() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def local_world_size() -> int:
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def all_sum(values: list[float], device: torch.device) -> list[float]:
    """Sums each value over all processes, in float64 if the device supports it."""
    if world_size() == 1:
        return values
    total = torch.tensor(values, dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)
    dist.all_reduce(total)
    return total.tolist()


def gather(value: Any) -> list:
    """Returns the ``value`` of every process, ordered by rank."""
    if world_size() == 1:
        return [value]
    values: list = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def broadcast_buffers(module: torch.nn.Module) -> None:
    """Copies rank 0's buffers to every process: batch-norm statistics differ between ranks after a training step."""
    if world_size() > 1:
        for buffer in module.buffers():
            dist.broadcast(buffer, 0)


def barrier() -> None:
    if world_size() > 1:
        dist.barrier()
