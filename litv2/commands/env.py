# SPDX-License-Identifier: Apache-2.0
"""python -m litv2 env: describes this machine, which backend computes each operator on it, and why the others do not."""

from __future__ import annotations

import argparse
import os
import platform
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from importlib.metadata import PackageNotFoundError, version

import torch

from ..layers import Block, DeformableTokenMerging, PatchEmbed
from ..ops import OPERATORS, native, triton
from . import print_table

PACKAGES = "torchvision timm onnxruntime openvino executorch onedl-mmcv onedl-mmdetection onedl-mmsegmentation triton".split()
VARIABLES = ("LITV2_OPS", "LITV2_NATIVE", "LITV2_NATIVE_KERNELS", "LITV2_TRITON", "LITV2_DCN_BACKEND", "LITV2_DCN_CUDA")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    pass


def run(args: argparse.Namespace) -> None:
    print_table([*_machine(), *((name, os.environ[name]) for name in VARIABLES if name in os.environ)])
    for operator, case, arguments, context in _cases():
        with context:
            try:
                chosen = OPERATORS[operator].choose(*arguments).name
            except RuntimeError as error:  # a forced backend that cannot compute this
                chosen = f"none: {error}"
            reasons = OPERATORS[operator].explain(*arguments)
        print(f"\n{operator}, {case}: {chosen}")
        for name, reason in reasons.items():
            if name != chosen:
                print(f"  not {name}: {reason or f'it could, but {chosen} is preferred'}")


def _machine() -> Iterator[tuple[str, str]]:
    yield "python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    yield "torch", f"{torch.__version__}, {torch.get_num_threads()} threads, CPU instructions {torch.backends.cpu.get_cpu_capability()}"
    yield "native kernels", native.problem or torch.ops.litv2.native_kernels()
    if native.problem is None:
        yield "bfloat16 products", torch.ops.litv2.native_bfloat16_kernels() or "not supported by this processor"
        yield "int8 products", torch.ops.litv2.native_int8_kernels() or "not supported by this processor"
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(i)
            capability = f"{properties.major}.{properties.minor}"
            yield f"cuda:{i}", f"{properties.name}, compute capability {capability}, {properties.total_memory / 2**30:.0f} GiB"
    else:
        yield "cuda", "none"
    yield "triton kernels", triton.problem or "available, for CUDA"
    for package in PACKAGES:
        try:
            yield package, version(package)
        except PackageNotFoundError:
            yield package, "not installed"


def _cases() -> Iterator[tuple[str, str, tuple, AbstractContextManager]]:
    """Yields (operator, description, arguments, context) for typical calls: eight images in LITv2-S, most of them in its third stage."""
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    for device in devices:
        for dtype in (torch.float32, torch.bfloat16):
            block = Block(384, 12, 2, 0.9).to(device, dtype)
            tokens = torch.zeros(8, 14, 14, 384, device=device, dtype=dtype)
            hidden = torch.zeros(8, 14, 14, 1536, device=device, dtype=dtype)
            image = tokens.permute(0, 3, 1, 2)
            offset, weight = image.new_zeros(8, 8, 7, 7, dtype=torch.float32), image.new_zeros(768, 384, 2, 2)
            where = f"{str(dtype).removeprefix('torch.')} on {device}"
            images, embed = torch.zeros(8, 3, 224, 224, device=device, dtype=dtype), PatchEmbed(3, 96, 4).to(device, dtype)
            yield "patch_embed", f"inference, {where}", (images, embed), torch.no_grad()
            yield "block", f"training, {where}", (block, tokens), nullcontext()
            inference = Block(384, 12, 2, 0.9).to(device, dtype).eval()
            yield "block", f"inference, {where}", (inference, tokens), torch.no_grad()
            yield "attention", f"training, {where}", (tokens, block.attn), nullcontext()
            qkv, bias = tokens.new_zeros(8, 14, 14, 3 * block.attn.h_dim), block.attn.h_qkv.bias
            yield "window_attention", where, (qkv, bias, 2, block.attn.h_heads, block.attn.scale), nullcontext()
            q, kv = tokens.new_zeros(8, 14, 14, block.attn.l_dim), tokens.new_zeros(8, 7, 7, 2 * block.attn.l_dim)
            yield "pooled_attention", f"inference, {where}", (q, kv, block.attn.l_heads, block.attn.scale), torch.no_grad()
            l_kv, shift = block.attn.l_kv, kv.new_zeros(kv.shape[-1])
            yield "pooled_linear", f"inference, {where}", (tokens, 2, l_kv.weight, l_kv.bias, shift), torch.no_grad()
            both = block.attn.window[0], block.attn.h_heads, block.attn.l_heads, block.attn.scale
            yield "hilo_attention", f"inference, {where}", (qkv, bias, q, kv, *both), torch.no_grad()
            merging = DeformableTokenMerging(384, 768).to(device, dtype).eval()
            yield "token_merging", f"inference, {where}", (tokens, merging), torch.no_grad()
            yield "depthwise_gelu", where, (hidden, block.mlp.dwconv.dwconv), nullcontext()
            second = Block(192, 6, 0, 0.9).to(device, dtype)
            for name, linear in (("norm_linear", second.mlp.fc1), ("linear_add", second.mlp.fc2)):
                x, y = (tokens.new_zeros(8, 28, 28, size) for size in (linear.in_features, linear.out_features))
                rest = (1e-5,) if name == "norm_linear" else (y,)
                yield name, f"inference, {where}", (x, linear.weight, linear.bias, *rest), torch.no_grad()
            square = tokens.new_zeros(384, 384)
            yield "linear_add_norm", f"inference, {where}", (tokens, square, square[0], tokens, 1e-5), torch.no_grad()
            yield "deform_conv2d", where, (image, offset, weight, None, (2, 2), (0, 0), (1, 1), None), nullcontext()
