"""One line to the fastest inference: ``fast = litv2.optimize(model, images)``.

Several forms of the model are made, proven against it on the example, and timed; the fastest is returned.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..model import LITv2
from ..ops import native
from ..ops.folding import inference_copy
from .fused import fuse
from .packed import packed_model

__all__ = ["FORMS", "Optimized", "make_form", "optimize", "why_not"]

FORMS = {
    "native": "float32 blocks in two passes each, weights packed once",
    "native-bfloat16": "the same with bfloat16 products",
    "native-int8": "the same with int8 products",
    "compiled": "folded by fuse(), frozen weights, generated code",
    "fused": "folded by fuse(), torch's operators",
}
PRODUCTS = {"native": torch.float32, "native-bfloat16": torch.bfloat16, "native-int8": torch.int8}  # dtype of the products
INT8_ERROR = 0.1  # that is allowed, of the largest value
ROUNDS = 5


class Optimized(nn.Module):
    """A model for inference: images of ``dtype`` -> what the model gives, of ``dtype``, without gradients.

    Attributes:
        form: of ``FORMS``.
        dtype: of images and results.
        compute_dtype: dtype of the weights and of what is computed.
        seconds: of the example, by form; of the plain model too.
        errors: largest error over the largest value of the plain float32 model's results, by form; of those left out too.
    """

    def __init__(self, module: Callable[[Tensor], Any], form: str, dtype: torch.dtype, compute_dtype: torch.dtype):
        super().__init__()
        self.module, self.form, self.dtype, self.compute_dtype = module, form, dtype, compute_dtype
        self.seconds: dict[str, float] = {}
        self.errors: dict[str, float] = {}

    @torch.no_grad()
    def forward(self, x: Tensor) -> Any:
        result = self.module(x.to(self.compute_dtype))
        if self.dtype == self.compute_dtype:
            return result
        return result.to(self.dtype) if isinstance(result, Tensor) else type(result)(level.to(self.dtype) for level in result)

    def extra_repr(self) -> str:
        return f"form={self.form}, dtype={self.dtype}, compute_dtype={self.compute_dtype}"


def optimize(
    model: LITv2,
    example: Tensor,
    dtype: torch.dtype | str | None = None,
    forms: Sequence[str] | None = None,
    report: Callable[[str], None] | None = print,
) -> Optimized:
    """The fastest form of a model for inference on images like ``example``, whose numbers are the model's own.

    The result takes other sizes too; it was chosen and timed for the example's shape, device and number of threads.

    Args:
        model: a classifier or backbone; it is left as it is. Later changes of its weights do not reach the result.
        example: images (B, in_chans, H, W) on the device that will be used, as many as in earnest.
        dtype: of the images and the results, None for the model's. With bfloat16 on a processor that has no instructions
            for it, the native form computes in float32: faster there, and more exact. On one that has them there is
            also "native-bfloat16", whose products alone are rounded. With int8 images and results have the model's
            dtype, and the form is "native-int8" (see ``packed_model``). It needs no calibration: each token is scaled by
            its own largest and smallest value.
        forms: those to try, of ``FORMS``; None for all that this machine has. Compiling takes about a minute.
        report: what gets the lines that say what was done; None for nobody.

    Raises:
        TypeError: the model is not a LITv2.
        ValueError: an unknown form, or none that can be had here.
        RuntimeError: of every form the results are further from the plain float32 model's than 1e-4 of their largest value, in
            lower precision than twice the plain model's in that precision, in int8 than 0.1 of their largest value. One of
            several is left out, which is said.
    """
    if not isinstance(model, LITv2):
        raise TypeError(f"optimize: expected a LITv2, not {type(model).__name__}; of a detector or segmenter optimize the backbone")
    if forms is not None and not forms:
        raise ValueError(f"optimize: no forms to try; there are {', '.join(FORMS)}")
    unknown = set(forms or ()) - FORMS.keys()
    if unknown:
        raise ValueError(f"optimize: unknown forms {sorted(unknown)}; there are {', '.join(FORMS)}")
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
        raise ValueError(f"optimize: none of these forms can be had: {missing}")

    plain = Optimized(inference_copy(model).to(dtype), "plain", dtype, dtype)
    exact = _tensors(Optimized(inference_copy(model).to(torch.float32), "plain", torch.float32, torch.float32)(example))
    allowed = 1e-4 if dtype == torch.float32 else max(1e-4, 2 * _error(_tensors(plain(example)), exact))
    if int8:
        allowed = INT8_ERROR
    candidates = {"plain": plain}
    for form in forms:
        candidates[form] = make_form(model, form, dtype)
    errors = {form: _error(_tensors(candidate(example)), exact) for form, candidate in candidates.items()}
    for form in tuple(forms):
        if not errors[form] <= allowed:
            refused = f"{errors[form]:.1e} from the plain model, {allowed:.1e} are allowed"
            if forms == [form]:
                raise RuntimeError(f"optimize: the {form} form is {refused}")
            log(f"{form}: left out, {refused}")
            forms.remove(form)
            del candidates[form]
    seconds = _times(candidates, example)
    best = candidates[min(forms, key=seconds.__getitem__)]
    best.seconds, best.errors = seconds, errors
    for form in candidates:
        about = FORMS.get(form, "the model as it is")
        kind = "" if candidates[form].compute_dtype == dtype else f" in {candidates[form].compute_dtype}".replace("torch.", "")
        chosen = "  <- chosen" if form == best.form else ""
        log(f"{form + ':':17}{1e3 * seconds[form]:9.1f} ms{kind}, error {errors[form]:.0e}, {about}{chosen}")
    return best


def why_not(form: str, example: Tensor) -> str | None:
    """The reason why a form cannot be had for these images, or None."""
    if not form.startswith("native"):
        return None
    if native.problem is not None:
        return native.problem
    if example.device.type != "cpu":
        return f"it is for the CPU, not for {example.device.type}"
    if form == "native-bfloat16" and not (example.dtype == torch.bfloat16 and torch.ops.litv2.native_bfloat16_kernels()):
        return f"it is for bfloat16 images, not for {example.dtype}, on processors with bfloat16 products"
    if form == "native-int8" and not torch.ops.litv2.native_int8_kernels():
        return "this processor has no instructions for int8 products (AVX-512 VNNI or AMX)"
    return None


def make_form(model: LITv2, form: str, dtype: torch.dtype) -> Optimized:
    """One of ``FORMS``, neither proven nor timed."""
    if form.startswith("native"):
        packed = packed_model(inference_copy(model).to(torch.float32), PRODUCTS[form])
        return Optimized(packed, form, dtype, torch.float32)
    fused = fuse(model).to(dtype)
    if form == "compiled":
        return Optimized(torch.compile(fused, options={"freezing": True}), form, dtype, dtype)
    return Optimized(fused, form, dtype, dtype)


def _tensors(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


def _error(results: list[Tensor], exact: list[Tensor]) -> float:
    """Largest error over largest value, of the worst result."""
    errors = [(a.float() - b).abs().max() / b.abs().max() for a, b in zip(results, exact)]
    return torch.stack(errors).max().item()  # NaN where one is


def _times(candidates: dict[str, Optimized], example: Tensor) -> dict[str, float]:
    """Median seconds of each; they take turns."""

    def once(candidate: Optimized) -> float:
        start = time.perf_counter()
        candidate(example)
        if example.is_cuda:
            torch.cuda.synchronize(example.device)
        return time.perf_counter() - start

    turns = [{form: once(candidate) for form, candidate in candidates.items()} for _ in range(ROUNDS + 1)]
    return {form: statistics.median(turn[form] for turn in turns[1:]) for form in candidates}
