# SPDX-License-Identifier: Apache-2.0
"""Single- and multi-process runs: set-up from torchrun's environment, the few collectives that the trainer needs, and its DDP."""

from __future__ import annotations

import inspect
import os
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from litv2.compilation import COMPILE_OPTIONS
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


def init(device: torch.device, seconds: float = 1800) -> None:
    """Joins the process group if a launcher has set RANK and WORLD_SIZE, with NCCL for tensors on CUDA and gloo for all others.

    On CUDA, too, numbers of the host are exchanged by gloo, which does not wait for the device. ``seconds`` is how long a process waits
    for the others.

    After a restart, torchrun (2.14) reuses the store of the processes that died, including their addresses, and the new processes
    would wait for the dead ones. On a single node each restart therefore gets its own prefix in the store. On several nodes the
    restart count differs between nodes; set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 for torchrun there.
    """
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    timeout = timedelta(seconds=seconds)
    restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
    if restarts and os.environ.get("GROUP_WORLD_SIZE") == "1":
        store, rank, world_size = next(dist.rendezvous("env://"))
        store = dist.PrefixStore(f"restart {restarts}", store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    else:
        dist.init_process_group(backend, timeout=timeout)


def shutdown() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def local_world_size() -> int:
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def all_sum(values: list[float]) -> list[float]:
    """Sums each number over all processes."""
    if world_size() == 1:
        return values
    total = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(total)
    return total.tolist()


def any_of(flags: Tensor) -> None:
    """Sets each flag, 0 or 1 on the device, to 1 if it is 1 in any process. On CUDA the host does not wait for the result."""
    if world_size() > 1:
        dist.all_reduce(flags, dist.ReduceOp.MAX)


def gather(value: Any) -> list:
    """Returns the ``value`` of every process, ordered by rank."""
    if world_size() == 1:
        return [value]
    values: list = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def gather_at_first(value: Any) -> list:
    """Returns the ``value`` of every process, ordered by rank, at rank 0, and nothing at the others: for large ones."""
    if world_size() == 1:
        return [value]
    values: list = [None] * world_size() if rank() == 0 else []
    dist.gather_object(value, values or None)
    return values


def broadcast_buffers(module: nn.Module) -> None:
    """Copies rank 0's buffers to every process: batch-norm statistics differ between ranks after a training step."""
    if world_size() > 1:
        for buffer in module.buffers():
            dist.broadcast(buffer, 0)


def parallel(model: nn.Module, device: torch.device, compiled: bool = False) -> nn.Module:
    """Prepares a model for training steps: over all processes, if there are several, and with torch.compile, if ``compiled``.

    Gradients are views of the buffers that are sent, which saves a copy of each. Buffers stay each process's own: batch norm's
    statistics play no part in training, and ``broadcast_buffers`` copies them before an evaluation.
    """
    if world_size() > 1:
        ids = [device] if device.type == "cuda" else None
        known = inspect.signature(DistributedDataParallel).parameters
        broadcast = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"  # its older name
        options: dict[str, Any] = {broadcast: False}
        model = DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True, **options)
    # Compiled outside of DDP, the graph is split where DDP's buckets end. Compiled inside, the backward pass would be one graph, and
    # the gradients would be sent only after all of it.
    return cast(nn.Module, torch.compile(model, options=COMPILE_OPTIONS)) if compiled else model


def unwrap(model: nn.Module) -> nn.Module:
    """Returns the plain model inside ``parallel``'s."""
    model = getattr(model, "_orig_mod", model)
    return model.module if isinstance(model, DistributedDataParallel) else model


def without_sync(model: nn.Module) -> AbstractContextManager:
    """A backward pass within it keeps its gradients to this process: those of a later pass are exchanged with them."""
    model = getattr(model, "_orig_mod", model)
    return model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext()


def barrier() -> None:
    if world_size() > 1:
        dist.barrier()
