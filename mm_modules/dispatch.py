"""Operators with several backends: one function per operator, one file per backend, and this file, which chooses.

    conv = Operator("conv", [fast, reference])     # in order of preference; the last one always can
    conv(x, weight)                                # computed by the first backend that can
    conv.explain(x, weight)                        # {"fast": "it is for the CPU, not for cuda", "reference": None}

One environment variable forces backends, ``LITV2_OPS="conv=reference,block=torch"``, and so does ``with use(conv="reference")``. A forced
backend that cannot compute what it is given is an error; nothing else takes its place.
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
    """One way to compute an operator. Its functions take the operator's arguments.

    Args:
        run: computes it.
        why_not: the reason why this backend cannot, None if it can. The cheapest questions come first: it runs at each call.
        why_rather_not: the reason why another one is better although this one can; it does not count where this one is forced.
    """

    name: str
    run: Callable[..., Any]
    why_not: Callable[..., str | None] = _nothing
    why_rather_not: Callable[..., str | None] = _nothing


class Operator:
    """A function that the first of its backends computes that can. The last one is the reference, which always can.

    Raises:
        RuntimeError: the backend that is forced cannot; the message has its reason.
    """

    def __init__(self, name: str, backends: Sequence[Backend]):
        self.name = name
        self.backends = {backend.name: backend for backend in backends}
        OPERATORS[name] = self
        _check_forced(name, _forced.get(name))

    def __call__(self, *args: Any) -> Any:
        return self.choose(*args).run(*args)

    def choose(self, *args: Any) -> Backend:
        """The backend that computes these arguments."""
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
        raise AssertionError(f"{self.name}: the last backend must always be able to")

    def explain(self, *args: Any) -> dict[str, str | None]:
        """Of each backend the reason why it does not compute these arguments; None for those that could."""
        return {name: backend.why_not(*args) or backend.why_rather_not(*args) for name, backend in self.backends.items()}


OPERATORS: dict[str, Operator] = {}  # all that have been imported, by name


@contextmanager
def use(**choice: str) -> Iterator[None]:
    """Within it these operators are computed by these backends: ``with use(deform_conv2d="torch", block="torch")``. In all threads.

    Raises:
        ValueError: an unknown operator or backend.
    """
    before = dict(_forced)
    for operator, backend in choice.items():
        if operator not in OPERATORS:
            raise ValueError(f"use: there is no operator {operator!r}; there are {', '.join(OPERATORS)}")
        _check_forced(operator, backend)
    _forced.update(choice)
    try:
        yield
    finally:
        _forced.clear()
        _forced.update(before)


def check_forced_names() -> None:
    """To be called when all operators are there.

    Raises:
        ValueError: the environment forces the backend of an operator that does not exist.
    """
    for operator in _forced:
        if operator not in OPERATORS:
            raise ValueError(f"{VARIABLE}: there is no operator {operator!r}; there are {', '.join(OPERATORS)}")


def _check_forced(operator: str, backend: str | None) -> None:
    known = OPERATORS[operator].backends
    if backend is not None and backend not in known:
        raise ValueError(f"{VARIABLE}: {operator} has no backend {backend!r}; it has {', '.join(known)}")


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
    """Registers that ``backward``, a torch operator (such as ``litv2::conv_backward``) of a backend, cannot be differentiated itself."""
    def refuse(ctx, *gradients):
        raise NotImplementedError(
            f"{operator}: the {backend} backend has no second derivatives; {VARIABLE}={operator}=torch selects the backend that has them"
        )

    torch.library.register_autograd(backward, refuse)
