# SPDX-License-Identifier: Apache-2.0
"""What the tests of the Triton kernels share: without a GPU, kernels are interpreted on the CPU, and compiled without being run."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from torch.utils._python_dispatch import TorchDispatchMode

from gpu_helpers import cuobjdump
from litv2.ops import triton as room

triton = pytest.importorskip("triton", reason="triton is not installed")
import triton.language as tl  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402
from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

CAPABILITIES = (80, 86, 89, 90, 100, 120)
POINTERS = {"float16": "*fp16", "bfloat16": "*bf16", "float32": "*fp32"}


@contextmanager
def interpreting() -> Iterator[None]:
    """Kernels compute on tensors of the CPU, which backends take for a GPU's.

    Triton's interpreter takes kernels that were decorated while TRITON_INTERPRET is set: a second copy of each of our modules takes the
    place of the first, where operators look for it, and so do copies of the functions of Triton's library that are themselves kernels,
    such as ``tl.cdiv``. Whatever else is in the process keeps its kernels.
    """
    with pytest.MonkeyPatch.context() as patch, _unchanged_library():
        patch.setenv("TRITON_INTERPRET", "1")
        for owner in (tl, tl.standard):
            for name, member in list(vars(owner).items()):
                if isinstance(member, JITFunction):
                    patch.setattr(owner, name, InterpretedFunction(member.fn))
        for name, module in interpreted().items():
            patch.setitem(sys.modules, f"{room.__name__}.{name}", module)
            patch.setattr(room, name, module, raising=False)
        patch.setattr(InterpreterBuilder, "create_dot", _dot)
        patch.setattr(room, "why_not", lambda x: None)
        yield


@cache
def interpreted() -> dict[str, ModuleType]:
    """A copy of each module of kernels, by name; to be called within ``interpreting``."""
    names = {path.stem: f"{room.__name__}.{path.stem}" for path in Path(room.__file__).parent.glob("[a-z]*.py")}
    before = {stem: sys.modules.pop(name) for stem, name in names.items() if name in sys.modules}
    for stem in before:
        delattr(room, stem)  # where they would find each other before they are copied
    copies = {stem: importlib.import_module(name) for stem, name in names.items()}  # they also import each other
    for stem, name in names.items():
        del sys.modules[name]
        delattr(room, stem)
    for stem, module in before.items():
        sys.modules[names[stem]] = module
        setattr(room, stem, module)
    return copies


_product = InterpreterBuilder.create_dot


def _dot(builder: InterpreterBuilder, a: Any, b: Any, *others: Any) -> Any:
    """The interpreter keeps bfloat16 as the integers of its bits, and multiplies these."""
    a, b = (builder.cast_impl(x, tl.float32) if x.get_element_ty() == tl.bfloat16 else x for x in (a, b))
    return _product(builder, a, b, *others)


@contextmanager
def _unchanged_library() -> Iterator[None]:
    """The interpreter patches Triton's library, and leaves it so where one kernel calls another."""
    modules = [module for name, module in sys.modules.items() if name.startswith("triton.language")]
    classes = {member for module in modules for member in vars(module).values() if isinstance(member, type)}
    before = [(owner, dict(vars(owner))) for owner in (*modules, *classes)]
    yield
    for owner, members in before:
        for name, member in members.items():
            if vars(owner)[name] is not member:
                setattr(owner, name, member)


@dataclass(frozen=True)
class Resources:
    """What the compiler made of a kernel: registers of a thread, bytes of stack (where registers are spilled to), shared bytes, code."""

    registers: int
    stack: int
    shared: int
    code: str

    def count(self, instruction: str) -> int:
        """How often an instruction that matches is in the code, such as ``LDG.E.128`` or ``HG?MMA``."""
        return len(re.findall(rf"\b{instruction}\b", self.code))


class _Decide(ast.NodeTransformer):
    """Leaves of each ``if NAME:`` only the branch that a compile-time argument takes."""

    def __init__(self, constexprs: dict[str, Any]):
        self.constexprs = constexprs

    def visit_If(self, node: ast.If) -> Any:
        self.generic_visit(node)
        if isinstance(node.test, ast.Name) and node.test.id in self.constexprs:
            return (node.body if self.constexprs[node.test.id] else node.orelse) or ast.Pass()
        return node


def _changed_in_loops(kernel: Any, constexprs: dict[str, Any]) -> set[int]:
    """The numbers of variables that the loops of a kernel's source change and that exist before: a loop must carry them on.

    Triton leaves out a variable that gets the tensor that it, or another one, had before the loop. The interpreter, which runs the source,
    does not.
    """
    found = set()

    def stored(nodes: list[ast.stmt]) -> set[str]:
        return {name.id for node in nodes for name in ast.walk(node) if isinstance(name, ast.Name) and isinstance(name.ctx, ast.Store)}

    def visit(nodes: list[ast.stmt], known: set[str]) -> set[str]:
        for node in nodes:
            if isinstance(node, ast.If):
                known = visit(node.body, known) | visit(node.orelse, known)
            elif isinstance(node, ast.For):
                unrolled = ast.unparse(node.iter).startswith("tl.static_range")
                found.update(() if unrolled else [len(stored(node.body) & known)])
                inside = visit(node.body, known | stored([ast.Expr(node.target)]))
                known = inside if unrolled else known
            else:
                known = known | stored([node])
        return known

    (function,) = _Decide(constexprs).visit(ast.parse(textwrap.dedent(inspect.getsource(kernel.fn)))).body
    assert isinstance(function, ast.FunctionDef)
    visit(function.body, {argument.arg for argument in function.args.args})
    return found


def _carried_in(code: str) -> dict[str, set[int]]:
    """The same of Triton's intermediate code, by function: the kernel and what it calls, without loops that are not compiled."""
    found: dict[str, set[int]] = {}
    for line in code.splitlines():
        if (head := re.search(r'tt\.func \w+ @"?([\w.]+?)(?:__|"?\()', line)) is not None:  # two underscores precede the types
            loops = found.setdefault(head[1], set())
        elif "scf.for" in line:
            loops.add(line.partition("iter_args(")[2].partition(") ->")[0].count(" = "))
    return found


def compile_for(kernel: Any, signature: dict[str, str], constexprs: dict[str, Any], capability: int, **options: int) -> Resources:
    """Compiles a kernel for GPUs of a compute capability (90 is 9.0), as a launch with aligned tensors would; skips without cuobjdump.

    Args:
        signature: types of the arguments: ``float16`` is a pointer to such values, ``i32`` and ``fp32`` are numbers. Those that are not
            named are integers that 16 divides, such as a number of channels.
        constexprs: values of the compile-time arguments.
        options: num_warps, num_stages.
    """
    if (tool := cuobjdump()) is None:
        pytest.skip("no cuobjdump: neither the CUDA toolkit nor Triton has one here")
    types = {name: "constexpr" if name in constexprs else signature.get(name, "aligned") for name in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(types.values()) if kind in POINTERS or kind == "aligned"}
    types = {name: POINTERS.get(kind, "i32" if kind == "aligned" else kind) for name, kind in types.items()}
    target = GPUTarget("cuda", capability, 32)
    compiled = triton.compile(ASTSource(kernel, types, constexprs, aligned), target=target, options=options)
    for name, carried in _carried_in(compiled.asm["source"]).items():
        function = kernel if name == kernel.fn.__name__ else pkgutil.resolve_name(name)
        changed = _changed_in_loops(function, constexprs)  # a compile-time argument has the same name in what the kernel calls
        assert carried <= changed, f"a loop of {name} does not carry all that it changes"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, code = (
            subprocess.run([tool, flag, file.name], capture_output=True, text=True, check=True).stdout for flag in ("-res-usage", "-sass")
        )
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found is not None, usage
    return Resources(int(found[1]), int(found[2]), compiled.metadata.shared, code)


class Called(TorchDispatchMode):
    """The Triton kernels that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.name().startswith("litv2::triton_"):
            self.names.append(function.name().removeprefix("litv2::triton_"))
        return function(*args, **(kwargs or {}))
