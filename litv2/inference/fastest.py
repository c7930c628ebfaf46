# SPDX-License-Identifier: Apache-2.0
"""Fastest inference in one line: ``fast = litv2.optimize(model, images)``.

Several forms of the model are built, checked against it on the example, and timed; the fastest is returned.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mm_modules.DCN import compiled as deform_conv

from ..model import LITv2
from ..ops import native
from ..ops.folding import inference_copy
from .compiled import Compiled
from .cuda_graph import CudaGraph, each_tensor
from .fused import fuse
from .packed import in_one_call, packed_model

__all__ = ["FORMS", "Optimized", "make_form", "optimize", "why_not"]

FORMS = {
    "native": "float32 blocks in two passes each, weights packed once",
    "native-bfloat16": "the same with bfloat16 products",
    "native-int8": "the same with int8 products",
    "compiled": "folded by fuse(), frozen weights, generated code",
    "graph": "folded by fuse(), torch's operators, launched as one CUDA graph",
    "fused": "folded by fuse(), torch's operators",
}
PRODUCTS = {"native": torch.float32, "native-bfloat16": torch.bfloat16, "native-int8": torch.int8}  # dtype of the products
INT8_ERROR = 0.1  # that is allowed, of the largest value
ROUNDS = 5


class Optimized(nn.Module):
    """A model for inference: takes images of ``dtype`` and returns the model's outputs in ``dtype``, without gradients.

    Attributes:
        form: one of ``FORMS``.
        dtype: dtype of the images and the outputs.
        compute_dtype: dtype of the weights and of the computation.
        seconds: time for the example by form, the plain model included.
        errors: largest error by form, relative to the largest output of the exact model; rejected forms included.
    """

    def __init__(self, module: Callable[[Tensor], Any], form: str, dtype: torch.dtype, compute_dtype: torch.dtype):
        super().__init__()
        self.module, self.form, self.dtype, self.compute_dtype = module, form, dtype, compute_dtype
        self.seconds: dict[str, float] = {}
        self.errors: dict[str, float] = {}

    @torch.no_grad()
    def forward(self, x: Tensor) -> Any:
        result = self.module(x.to(self.compute_dtype))
        return result if self.dtype == self.compute_dtype else each_tensor(lambda tensor: tensor.to(self.dtype), result)

    def extra_repr(self) -> str:
        return f"form={self.form}, dtype={self.dtype}, compute_dtype={self.compute_dtype}"


def optimize(
    model: LITv2,
    example: Tensor,
    dtype: torch.dtype | str | None = None,
    forms: Sequence[str] | None = None,
    report: Callable[[str], None] | None = print,
) -> Optimized:
    """Returns the fastest form of a model for inference on images like ``example``, with the same outputs.

    The result accepts other sizes too, but was chosen for the shape, device and number of threads of the example. It is on the
    example's device, wherever the model is. The form "graph" replays a CUDA graph at the example's shape and computes other shapes
    without one.

    Args:
        model: a classifier or backbone; it is not modified. Later changes to its weights do not affect the result.
        example: images (B, in_chans, H, W) on the target device, with the batch size that will be used.
        dtype: dtype of the images and the outputs; None for the model's. With bfloat16 on a processor without bfloat16
            instructions, the native form computes in float32, which is faster there and more accurate. On a processor that
            has them there is also "native-bfloat16", which rounds only the factors of its matrix products. On CUDA all weights are
            in this dtype, float16 and bfloat16 included: nothing is cast on the way, as autocast would. With int8
            ("int8" or ``torch.int8``) images and outputs keep the model's dtype, and the form is "native-int8": see
            ``packed_model``. It needs no calibration, since each token is scaled by its own largest and smallest value.
        forms: names from ``FORMS`` to try; None for all that this machine supports. Compiling takes about a minute.
        report: function that is called with each line of progress; None for no output.

    Raises:
        TypeError: the model is not a LITv2.
        ValueError: the dtype or a form is unknown, or none of the forms is available here.
        RuntimeError: no form is accurate enough. The error relative to the plain float32 model (on CUDA float64, as float32 may be
            TF32 there) may be 1e-4 of the largest output, or in lower precision twice the error of the plain model in that precision,
            with int8 0.1 of the largest output. If some forms are accurate enough, the others are reported and left out.
    """
    if not isinstance(model, LITv2):
        raise TypeError(f"optimize: expected a LITv2, got {type(model).__name__}; for a detector or segmenter, optimize its backbone")
    if forms is not None and not forms:
        raise ValueError(f"optimize: forms is empty; choose from {', '.join(FORMS)}")
    unknown = set(forms or ()) - FORMS.keys()
    if unknown:
        raise ValueError(f"optimize: unknown forms {sorted(unknown)}; choose from {', '.join(FORMS)}")
    log = report or (lambda line: None)
    int8 = dtype in (torch.int8, "int8")
    if isinstance(dtype, str) and not int8:
        raise ValueError(f"optimize: dtype={dtype!r}, expected a torch.dtype or 'int8'")
    dtype = dtype if isinstance(dtype, torch.dtype) and not int8 else next(model.parameters()).dtype
    example = example.to(dtype)
    wanted = forms or [form for form in FORMS if (form == "native-int8") == int8]
    missing = {form: why_not(form, example) for form in FORMS if form in wanted}
    if forms is not None:
        for form, reason in missing.items():
            if reason:
                log(f"{form}: left out, {reason}")
    forms = [form for form, reason in missing.items() if not reason]
    if not forms:
        raise ValueError(f"optimize: none of these forms is available: {missing}")

    device = next(model.parameters()).device
    if device != example.device:
        log(f"the model is on {device}, the images are on {example.device}: all forms are made there")
    model = inference_copy(model).to(example.device)
    plain = Optimized(inference_copy(model).to(dtype), "plain", dtype, dtype)
    # In float32 torch's convolutions on CUDA may round to TF32.
    wide = torch.float64 if example.is_cuda else torch.float32
    exact = _tensors(Optimized(inference_copy(model).to(wide), "plain", wide, wide)(example))
    candidates = {"plain": plain}
    for form in forms:
        candidates[form] = make_form(model, form, dtype)
    errors = {form: _error(_tensors(candidate(example)), exact) for form, candidate in candidates.items()}
    allowed = INT8_ERROR if int8 else max(1e-4, 2 * errors["plain"])
    for form in tuple(forms):
        if not errors[form] <= allowed:
            refused = f"its error against the plain model is {errors[form]:.1e}, more than {allowed:.1e}"
            if forms == [form]:
                raise RuntimeError(f"optimize: the {form} form is not accurate enough: {refused}")
            log(f"{form}: left out, {refused}")
            forms.remove(form)
            del candidates[form]
    seconds = _times(candidates, example)
    best = candidates[min(forms, key=seconds.__getitem__)]
    best.seconds, best.errors = seconds, errors
    for form in candidates:
        about = FORMS.get(form, "the model as it is")
        kind = str(candidates[form].compute_dtype).removeprefix("torch.")
        chosen = "  <- chosen" if form == best.form else ""
        log(f"{form + ':':17}{1e3 * seconds[form]:9.1f} ms in {kind}, error {errors[form]:.0e}, {about}{chosen}")
    return best


def why_not(form: str, example: Tensor) -> str | None:
    """Returns the reason why a form is not available for these images, or None."""
    if form == "graph":
        if example.device.type != "cuda":
            return f"it needs a CUDA device, got {example.device.type}"
        if problem := deform_conv.why_not(example):
            return f"it needs the compiled deformable convolution, as torchvision's is not launched where graphs record; {problem}"
    if not form.startswith("native"):
        return None
    if native.problem is not None:
        return native.problem
    if example.device.type != "cpu":
        return f"it supports the CPU only, got {example.device.type}"
    if form == "native-bfloat16" and not (example.dtype == torch.bfloat16 and torch.ops.litv2.native_bfloat16_kernels()):
        return f"it needs bfloat16 images, got {example.dtype}, and a processor with bfloat16 instructions"
    if form == "native-int8" and not torch.ops.litv2.native_int8_kernels():
        return "it needs a processor with instructions for int8 products (AVX-512 VNNI or AMX)"
    return None


def make_form(model: LITv2, form: str, dtype: torch.dtype) -> Optimized:
    """Builds one of ``FORMS``, neither checked nor timed."""
    if form.startswith("native"):
        packed = packed_model(inference_copy(model).to(torch.float32), PRODUCTS[form])
        return Optimized(in_one_call(packed), form, dtype, torch.float32)
    fused = fuse(model).to(dtype)
    wrapper = {"compiled": Compiled, "graph": CudaGraph}.get(form)
    return Optimized(wrapper(fused) if wrapper else fused, form, dtype, dtype)


def _tensors(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


def _error(results: list[Tensor], exact: list[Tensor]) -> float:
    """Returns the largest error relative to the largest value, for the worst output."""
    errors = [(a.to(b.dtype) - b).abs().max() / b.abs().max() for a, b in zip(results, exact)]
    return torch.stack(errors).max().item()  # NaN if any is NaN


def _times(candidates: dict[str, Optimized], example: Tensor) -> dict[str, float]:
    """Returns the median seconds of each candidate, timed in turns."""

    def once(candidate: Optimized) -> float:
        start = time.perf_counter()
        candidate(example)
        if example.is_cuda:
            torch.cuda.synchronize(example.device)
        return time.perf_counter() - start

    turns = [{form: once(candidate) for form, candidate in candidates.items()} for _ in range(ROUNDS + 1)]
    return {form: statistics.median(turn[form] for turn in turns[1:]) for form in candidates}
