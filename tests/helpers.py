# SPDX-License-Identifier: Apache-2.0
"""What several tests need: the golden numbers, the rule that fills parameters, tiny models and runs of the trainer."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import zlib
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from litv2 import LITv2

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"  # data and checkpoints that are not part of the repository
TINY = dict(num_classes=10, embed_dim=32, depths=(1, 1, 2, 1), num_heads=(1, 2, 4, 8))


@cache
def golden() -> dict:
    return json.loads((ROOT / "tests/golden/golden.json").read_text())


@cache
def golden_arrays() -> dict[str, Tensor]:
    return {name: torch.from_numpy(array) for name, array in np.load(ROOT / "tests/golden/golden.npz").items()}


@cache
def manifest() -> dict:
    return json.loads((ROOT / "tests/golden/state_dict_manifest.json").read_text())


def shared(path: str) -> Path:
    """A file beside the repository; the test is skipped where it is absent."""
    if not (SHARED / path).exists():
        pytest.skip(f"{path} is not here: it is not part of the repository")
    return SHARED / path


def generator(seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(seed))


def normal(seed: int, *shape: int) -> Tensor:
    return torch.from_numpy(generator(seed).standard_normal(shape, dtype=np.float32))


@torch.no_grad()
def fill(module: nn.Module, prefix: str = "") -> nn.Module:
    """Gives every parameter the value that the golden numbers were computed with: a function of its name and shape."""
    for name, tensor in module.state_dict().items():
        if not tensor.is_floating_point():
            continue
        name = prefix + name
        u = generator(zlib.crc32(name.encode())).random(tensor.numel()) * 2 - 1
        if name.endswith("running_var"):
            value = 1 + 0.5 * u
        elif name.endswith("running_mean"):
            value = 0.1 * u
        elif tensor.ndim == 1:
            value = 1 + 0.2 * u if name.endswith("weight") else 0.1 * u
        else:
            value = u * np.sqrt(3 / np.prod(tensor.shape[1:]))
        tensor.copy_(torch.from_numpy(value.reshape(tensor.shape)))
    return module


def tiny_model(**kwargs) -> LITv2:
    return fill(LITv2(**{**TINY, **kwargs}))


def timm_model(name: str = "litv2_small", **kwargs) -> nn.Module:
    """A model registered with timm, of TINY's sizes and timm's 1000 classes."""
    import timm

    return timm.create_model(name, **{**TINY, "num_classes": None, **kwargs})


def max_difference(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape, (a.shape, b.shape)
    return (a.double() - b.double()).abs().max().item()


def assert_as_precise(low: Tensor, plain: Tensor, exact: Tensor, factor: float = 2) -> None:
    """The rule for low precision: ``low`` is at most twice as far from ``exact`` as ``plain``, the plain version in that precision.

    Over all values together: the error of the worst one is a matter of luck.
    """
    assert low.shape == plain.shape == exact.shape
    error, allowed = ((result.double() - exact.double()).norm().item() for result in (low, plain))
    assert allowed > 0 and error <= factor * allowed, f"error {error:.3g}, of the plain version {allowed:.3g}"


@torch.no_grad()
def rounded_model(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A float32 copy whose weights and each module's results are rounded to ``dtype``: what plain low precision makes of the model,
    whoever computes it."""
    model = copy.deepcopy(model)
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(tensor.to(dtype))
    for module in model.modules():
        module.register_forward_hook(lambda module, inputs, output: output.to(dtype).float() if isinstance(output, Tensor) else output)
    return model


def same(a: Any, b: Any, where: str = "state") -> None:
    """Asserts that two states, nested dictionaries and lists, are equal to the bit."""
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b)):
            same(x, y, f"{where}[{i}]")
    else:
        assert a == b, where


# A model and a schedule that train in seconds, as --opts of the trainer.
FAST = """
MODEL.LIT.EMBED_DIM 16 MODEL.LIT.DEPTHS [1,1,1,1] MODEL.LIT.NUM_HEADS [1,2,4,8] MODEL.LIT.PATCH_SIZE 2
TRAIN.EPOCHS 2 TRAIN.WARMUP_EPOCHS 0 PRINT_FREQ 1
""".split()


def trainer_command(
    *flags, opts: str = "", processes: int = 1, cfg: str = "configs/litv2-digits.yaml", launcher: tuple[str, ...] = ()
) -> list[str]:
    start = [sys.executable]
    if processes > 1:
        start += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", *launcher]
    return [*start, "main.py", "--cfg", cfg, *map(str, flags), "--opts", *FAST, *opts.split()]


def trainer_environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def start_trainer(*flags, **kwargs) -> subprocess.Popen:
    """The trainer as a user starts it, in a process of its own; its output is read from ``stdout``."""
    command = trainer_command(*flags, **kwargs)
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return subprocess.Popen(command, cwd=ROOT / "classification", env=trainer_environment(), **pipes)


def run_trainer(*flags, check: bool = True, timeout: int = 240, **kwargs) -> subprocess.CompletedProcess:
    """The same, until it ends."""
    command = trainer_command(*flags, **kwargs)
    folder = ROOT / "classification"
    done = subprocess.run(command, cwd=folder, env=trainer_environment(), capture_output=True, text=True, timeout=timeout)
    if check and done.returncode != 0:
        raise AssertionError(f"exit code {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    return done


def run_ranks(code: str) -> None:
    """Runs the code in two processes that belong to one group and can import the trainer's modules; both must succeed."""
    code = f"""
import sys
sys.path[:0] = ["classification", "."]
import distributed, torch
distributed.init(torch.device("cpu"))
{code}
distributed.shutdown()
"""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--no-python"]
    command = [sys.executable, *launcher, sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=trainer_environment(), capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[:6000]


def write_images(root: Path, counts: dict[str, int], size: int = 40) -> Path:
    """root/CLASS/N.png: noise around a colour of the class's own."""
    from PIL import Image

    for number, (name, count) in enumerate(counts.items()):
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            pixels = generator(100 * number + i).integers(0, 120, (size, size, 3)) + np.array([number * 60, 120 - number * 50, 60])
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(root / name / f"{i}.png")
    return root
