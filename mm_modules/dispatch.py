# SPDX-License-Identifier: Apache-2.0
"""Operators with several backends: one function per operator, one file per backend, and this file, which selects the backend.

    conv = Operator("conv", [fast, reference])     # in order of preference; the last one supports everything
    conv(x, weight)                                # computed by the first backend that supports the arguments
    conv.explain(x, weight)                        # {"fast": "it supports the CPU only, got cuda", "reference": None}

The environment variable ``LITV2_OPS="conv=reference,block=torch"`` forces backends, and so does ``with use(conv="reference")``. If a
forced backend does not support its arguments, that is an error; there is no fallback.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["OPERATORS", "Backend", "Operator", "check_forced_names", "use", "without_second_derivatives"]

VARIABLE = "LITV2_OPS"


def _nothing(*args: Any) -> None:
    """No reason."""


@dataclass(frozen=True)
class Backend:
    """One implementation of an operator. Its functions take the operator's arguments.

    Args:
        run: computes the operator.
        why_not: returns the reason why this backend does not support the arguments, or None. It runs in every call, so the cheapest
            checks come first.
        why_rather_not: returns the reason why another backend is preferable although this one would work, or None; ignored if this
            backend is forced.
    """

    name: str
    run: Callable[..., Any]
    why_not: Callable[..., str | None] = _nothing
    why_rather_not: Callable[..., str | None] = _nothing


class Operator:
    """A function computed by the first of its backends that supports the arguments. The last one, the reference, always does.

    Raises:
        RuntimeError: the forced backend does not support the arguments; the message gives the reason.
    """

    def __init__(self, name: str, backends: Sequence[Backend]):
        self.name = name
        self.backends = {backend.name: backend for backend in backends}
        OPERATORS[name] = self
        _check_forced(name, _forced.get(name))

    def __call__(self, *args: Any) -> Any:
        return self.choose(*args).run(*args)

    def choose(self, *args: Any) -> Backend:
        """Returns the backend that computes these arguments."""
        forced = _forced.get(self.name)
        if forced is not None:
            backend = self.backends[forced]
            reason = backend.why_not(*args)
            if reason is not None:
                raise RuntimeError(f"{self.name}: the backend {forced!r} is forced (by {VARIABLE} or use()), but {reason}")
            return backend
        for backend in self.backends.values():
            if backend.why_not(*args) is None and backend.why_rather_not(*args) is None:
                return backend
        raise AssertionError(f"{self.name}: the last backend must support all arguments")

    def explain(self, *args: Any) -> dict[str, str | None]:
        """Returns the reason why each backend does not compute these arguments; None for those that could."""
        return {name: backend.why_not(*args) or backend.why_rather_not(*args) for name, backend in self.backends.items()}


OPERATORS: dict[str, Operator] = {}  # all imported operators, by name


@contextmanager
def use(**choice: str) -> Iterator[None]:
    """Forces the backends of operators within the block, in all threads: ``with use(deform_conv2d="torch", block="torch")``.

    Raises:
        ValueError: an operator or backend is unknown.
    """
    before = dict(_forced)
    for operator, backend in choice.items():
        if operator not in OPERATORS:
            raise ValueError(f"use: there is no operator {operator!r}; choose from {', '.join(OPERATORS)}")
        _check_forced(operator, backend)
    _forced.update(choice)
    try:
        yield
    finally:
        _forced.clear()
        _forced.update(before)


def check_forced_names() -> None:
    """Checks the operators named in the environment; to be called once all operators are imported.

    Raises:
        ValueError: the environment names an operator that does not exist.
    """
    for operator in _forced:
        if operator not in OPERATORS:
            raise ValueError(f"{VARIABLE}: there is no operator {operator!r}; choose from {', '.join(OPERATORS)}")


def _check_forced(operator: str, backend: str | None) -> None:
    known = OPERATORS[operator].backends
    if backend is not None and backend not in known:
        raise ValueError(f"{VARIABLE}: {operator} has no backend {backend!r}; choose from {', '.join(known)}")


def _read_environment() -> dict[str, str]:
    forced = {}
    for entry in filter(None, os.environ.get(VARIABLE, "").replace(" ", "").split(",")):
        operator, equals, backend = entry.partition("=")
        if not (operator and equals and backend):
            raise ValueError(f"{VARIABLE}: {entry!r} must be OPERATOR=BACKEND, as in {VARIABLE}=deform_conv2d=torch,block=torch")
        forced[operator] = backend
    old = os.environ.get("LITV2_DCN_BACKEND", "auto")  # the older name of LITV2_OPS=deform_conv2d=...
    if old != "auto":
        forced.setdefault("deform_conv2d", old)
    return forced


_forced: dict[str, str] = _read_environment()  # backend by operator; the environment is read once, at import


def without_second_derivatives(backward: str, operator: str, backend: str) -> None:
    """Registers that ``backward``, a torch operator of a backend such as ``litv2::conv_backward``, cannot itself be differentiated."""

    def refuse(ctx, *gradients):
        raise NotImplementedError(
            f"{operator}: the {backend} backend has no second derivatives; {VARIABLE}={operator}=torch selects one that supports them"
        )

    torch.library.register_autograd(backward, refuse)
