# SPDX-License-Identifier: Apache-2.0
"""The compiled backend as an operator: registrations, precision, chunks, threads, devices. Its numbers are tested with the
other backends' in test_deform_conv.py."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from document_helpers import documented
from gpu_helpers import DEVICES, on_gpu
from helpers import ROOT, assert_as_precise, max_difference
from mm_modules import torch_state
from mm_modules.DCN import DeformConv2dPack, compiled, deform_conv, reference
from mm_modules.dispatch import use
from mm_modules.extension import SUFFIX

if compiled.problem:
    pytest.skip(f"the compiled backend is {compiled.problem}", allow_module_level=True)

operator = torch.ops.litv2.deform_conv2d.default
backward_operator = torch.ops.litv2.deform_conv2d_backward.default
DTYPES = compiled.DTYPES
DTM = ((2, 2), (0, 0), (1, 1))
GENERAL = ((2, 1), (1, 2), (1, 2))  # stride, padding, dilation: different in h and w


def tensors(geometry, dtype=torch.float64, device="cpu", groups=1, offset_groups=1, masked=False, B=2, C=8, H=9, W=7, O=6):
    """input, offset, weight, bias and mask (or None) of a 2 x 2 kernel, all with gradients."""
    stride, padding, dilation = geometry
    Ho, Wo = ((size + 2 * padding[i] - dilation[i] - 1) // stride[i] + 1 for i, size in enumerate((H, W)))
    position = torch.promote_types(dtype, torch.float32)
    values = [
        torch.randn(B, C, H, W, dtype=dtype),
        torch.randn(B, 8 * offset_groups, Ho, Wo, dtype=position) * 2,
        torch.randn(O, C // groups, 2, 2, dtype=dtype),
        torch.randn(O, dtype=dtype),
        torch.rand(B, 4 * offset_groups, Ho, Wo, dtype=position) if masked else None,
    ]
    return [None if value is None else value.to(device).requires_grad_() for value in values]


CASES = [
    dict(geometry=DTM),
    dict(geometry=GENERAL, groups=2, offset_groups=4, masked=True),
    dict(geometry=GENERAL, groups=2, offset_groups=1),
    dict(geometry=DTM, groups=1, offset_groups=2, B=1, masked=True),
]


def gradients(function, values, geometry, seed):
    """The output, and the gradients of all tensors."""
    input, offset, weight, bias, mask = values
    out = function(input, offset, weight, bias, *geometry, mask)
    return [out, *torch.autograd.grad(out, [v for v in values if v is not None], seed.to(out.dtype))]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_registrations(case, dtype, device):
    values = tensors(**case, dtype=dtype, device=device)
    geometry = case["geometry"]
    tolerance = dict(rtol=0.05, atol=0.05) if dtype.itemsize == 2 else {}
    torch.library.opcheck(operator, (*values, *geometry), **tolerance)
    gradient = torch.randn_like(operator(*values, *geometry))
    input, offset, weight, _, mask = (None if value is None else value.detach() for value in values)
    if dtype == torch.bfloat16:
        torch.library.opcheck(operator, (*values, *geometry, True), **tolerance)
    for wanted in ("input offset weight mask", "offset", "input", "weight"):
        needs = [name in wanted.split() and (name != "mask" or mask is not None) for name in ("input", "offset", "weight", "mask")]
        torch.library.opcheck(backward_operator, (gradient.detach(), input, offset, weight, mask, *geometry, *needs), **tolerance)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype, emulated", [(torch.bfloat16, False), (torch.bfloat16, True), (torch.float16, False)], ids=str)
def test_low_precision_is_as_good_as_plain_pytorch(case, dtype, emulated, device, monkeypatch):
    """Each result is within twice the error of the PyTorch version in that precision, and positions stay float32."""
    monkeypatch.setattr(torch_state, "bfloat16_is_emulated", lambda: emulated)
    low = tensors(**case, dtype=dtype, device=device)
    exact = [None if value is None else value.detach().double().requires_grad_() for value in low]
    seed = torch.randn_like(operator(*low, *case["geometry"]))
    truth = gradients(reference.deform_conv2d, exact, case["geometry"], seed)
    plain = gradients(reference.deform_conv2d, low, case["geometry"], seed)
    ours = gradients(compiled.deform_conv2d, low, case["geometry"], seed)
    for a, b, t in zip(ours, plain, truth):
        assert a.dtype == b.dtype
        rounding = torch.finfo(a.dtype).eps * t.abs().max().item()
        assert max_difference(a, t) <= 2 * max(max_difference(b, t), rounding)


@pytest.mark.parametrize("groups, masked", [(1, False), (2, True)])
def test_chunks(groups, masked):
    """Columns of 44 MiB, in two chunks that meet in the middle of an image."""
    values = tensors(DTM, torch.float32, groups=groups, offset_groups=groups, masked=masked, B=3, C=96, H=161, W=250, O=4)
    assert values[1][:, 0].numel() * 4 * 96 * 4 > 40 * 2**20
    seed = torch.randn_like(operator(*values, *DTM))
    ours = gradients(compiled.deform_conv2d, values, DTM, seed)
    for a, b in zip(ours, gradients(reference.deform_conv2d, values, DTM, seed)):
        assert max_difference(a, b) < 2e-5 * b.abs().max()


def test_threads():
    """One image on several threads: each gets channels of its own, and every number of threads gives the same."""
    values = tensors(DTM, C=96, B=1, offset_groups=2, masked=True)
    seed = torch.randn_like(operator(*values, *DTM))
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 16):
            torch.set_num_threads(count)
            results.append(gradients(compiled.deform_conv2d, values, DTM, seed))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(max_difference(a, b) < 1e-12 for a, b in zip(result, results[0]))


def test_nan_offset_touches_no_pixel():
    """A NaN sample has no place to put a gradient: the input's stays finite, the offset's own is NaN, the others' are not."""
    input, offset, weight, *_ = tensors(DTM)
    with torch.no_grad():
        offset[1, 2, 1, 1] = float("nan")
    out = operator(input, offset, weight, None, None, *DTM)
    out.nansum().backward()
    assert input.grad.isfinite().all()
    assert offset.grad.isnan().nonzero().tolist() == [[1, 2, 1, 1], [1, 3, 1, 1]]


def test_infinite_pixel_outside_the_sample_is_not_read():
    """0 * infinity is NaN: a corner outside the image must be skipped, not read elsewhere with the weight 0."""
    input, offset, weight = torch.ones(1, 1, 4, 4), torch.zeros(1, 8, 2, 2), torch.ones(1, 1, 2, 2)
    input[0, 0, 0, 0] = float("inf")
    offset[0, 7, 1, 1] = 0.5  # the last tap, half out of the image
    out = operator(input, offset, weight, None, None, *DTM)
    assert out[0, 0, 0, 0].isinf() and out[0, 0, 1, 1] == 3.5


def test_compile_and_export():
    """A compiled graph holds the operator; an exported one plain operations, unless this backend is forced."""
    module = DeformConv2dPack(4, 8, 2, stride=2)
    nn.init.normal_(module.conv_offset.weight, std=0.3)
    x = torch.randn(3, 4, 9, 8)
    graphs = []

    def recorder(graph, inputs):
        graphs.append(str(graph.code))
        return graph

    compiled = torch.compile(module, fullgraph=True, backend=recorder, dynamic=True)
    assert max_difference(compiled(x), module(x)) < 1e-6 and "litv2.deform_conv2d" in graphs[0]
    trained = torch.compile(module, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(module(x).square().sum(), list(module.parameters()))
    for a, b in zip(torch.autograd.grad(trained(x).square().sum(), list(module.parameters())), expected):
        assert max_difference(a, b) < 1e-4

    # Of the nodes alone: whole programs are printed with the paths of sources, and a path may hold any word.
    exported, traced = torch.export.export(module, (x,)).graph.nodes, torch.jit.trace(module, (x,)).inlined_graph.nodes()
    assert not any("deform_conv2d" in str(node.target) for node in exported)
    assert not any("deform_conv2d" in node.kind() for node in traced)
    with use(deform_conv2d="compiled"):
        program = torch.export.export(module, (x,))
    assert any("litv2.deform_conv2d" in str(node.target) for node in program.graph.nodes)
    assert max_difference(program.module()(x), module(x)) < 1e-6


def test_forward_derivatives():
    """The operator has none (it would give zeros): plain PyTorch stands in, and a backend that was asked for by name says so."""
    input, offset, weight, bias, _ = (None if value is None else value.detach() for value in tensors(DTM))
    tangents, h = (torch.randn_like(input), torch.randn_like(offset)), 1e-6

    def convolve(input, offset):
        return deform_conv.deform_conv2d(input, offset, weight, bias, *DTM)

    ours = torch.func.jvp(convolve, (input, offset), tangents)[1]
    ahead, behind = (convolve(input + s * h * tangents[0], offset + s * h * tangents[1]) for s in (1, -1))
    assert max_difference(ours, (ahead - behind) / (2 * h)) < 1e-6
    with use(deform_conv2d="compiled"), pytest.raises(RuntimeError, match="it has no rules for torch.func's transforms"):
        torch.func.jvp(convolve, (input, offset), tangents)


def test_double_backward_is_an_error():
    input, offset, weight, *_ = tensors(DTM)
    (gradient,) = torch.autograd.grad(operator(input, offset, weight, None, None, *DTM).square().sum(), input, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivatives; LITV2_OPS=deform_conv2d=torch"):
        gradient.sum().backward()


@pytest.mark.parametrize("device", DEVICES)
def test_autocast_of_the_operator(device):
    values = tensors(DTM, torch.float32, device=device)
    with torch.autocast(device, torch.bfloat16):
        low = operator(*values, *DTM)
    assert low.dtype == torch.bfloat16
    input, offset, weight, bias, _ = values
    plain = reference.deform_conv2d(input.bfloat16(), offset, weight.bfloat16(), bias.bfloat16(), *DTM, None)
    assert_as_precise(low, plain, operator(*values, *DTM))


def to_cuda(values):
    return [None if value is None else value.detach().cuda().requires_grad_() for value in values]


def assert_cuda_equals_cpu(on_cpu, on_cuda, geometry):
    seed = torch.randn_like(operator(*on_cpu, *geometry))
    expected = gradients(compiled.deform_conv2d, on_cpu, geometry, seed)
    for a, b in zip(gradients(compiled.deform_conv2d, on_cuda, geometry, seed.cuda()), expected):
        assert torch.equal(a.isnan().cpu(), b.isnan())
        a, b = a.cpu().nan_to_num(0), b.nan_to_num(0)
        assert max_difference(a, b) <= 16 * torch.finfo(on_cpu[0].dtype).eps * b.abs().max().item()


@on_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "case",
    [
        *CASES,
        dict(geometry=DTM, C=96, H=8, W=14, O=32),
        dict(geometry=DTM, C=264, H=14, W=6, O=32),  # more vectors of 128 bits than a warp has lanes
        dict(geometry=GENERAL, C=64, H=5, W=12, groups=2, offset_groups=4, masked=True),
        dict(geometry=GENERAL, C=7, masked=True),  # no multiple of a vector
    ],
    ids=str,
)
def test_cuda_equals_cpu(case, dtype):
    on_cpu = tensors(**case, dtype=dtype)
    with torch.no_grad():
        on_cpu[1][0, :2, 0, 0] = torch.tensor([0.5, float("nan")])
        on_cpu[1][-1, :2, -1, -1] = torch.tensor([-1e30, float("inf")])
    assert_cuda_equals_cpu(on_cpu, to_cuda(on_cpu), case["geometry"])


@on_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_address_that_fits_no_vector(dtype):
    """Channels-last input that begins within 128 bits of memory."""
    on_cpu = tensors(DTM, dtype=dtype, C=32)
    on_cuda = to_cuda(on_cpu)
    B, C, H, W = on_cpu[0].shape
    moved = torch.empty(on_cpu[0].numel() + 1, dtype=dtype, device="cuda")[1:].view(B, H, W, C).permute(0, 3, 1, 2)
    on_cuda[0] = moved.copy_(on_cuda[0].detach()).requires_grad_()
    assert_cuda_equals_cpu(on_cpu, on_cuda, DTM)


@on_gpu
def test_deterministic_algorithms():
    """Two runs give the same bits, where many samples add to a pixel, in two chunks of positions. In a process of its own: cuBLAS reads
    its setting once."""
    code = """
import torch
from mm_modules.DCN import deform_conv2d
def run(dtype):
    torch.manual_seed(0)
    values = [torch.randn(64, 96, 28, 54), torch.randn(64, 8, 14, 27) * 4, torch.randn(192, 96, 2, 2)]
    input, offset, weight = (value.cuda().requires_grad_() for value in values)
    out = deform_conv2d(input.to(dtype), offset, weight.to(dtype), stride=2)
    return [out, *torch.autograd.grad(out.float().square().sum(), (input, offset, weight))]
for dtype in (torch.float32, torch.float16):
    free = run(dtype)
    torch.use_deterministic_algorithms(True)
    first, second = run(dtype), run(dtype)
    torch.use_deterministic_algorithms(False)
    print(all(torch.equal(a, b) for a, b in zip(first, second)))
    print(all(((a - b).abs().max() < 1e-3 * b.abs().max()).item() for a, b in zip(first, free)))
"""
    done = run(["-c", code], CUBLAS_WORKSPACE_CONFIG=":4096:8", LITV2_OPS="deform_conv2d=compiled")
    assert done.stdout.split() == ["True"] * 4, done.stderr[-2000:]


@on_gpu
def test_weight_gradient_is_summed_in_float32():
    """Three chunks of positions: rounded to float16 they would make 186.25 of what is 186.156."""
    shape = (23, 128, 256)
    input = torch.ones(shape[0], 64, *shape[1:], device="cuda", dtype=torch.float16)
    offset, weight = torch.zeros(shape[0], 2, *shape[1:], device="cuda"), torch.zeros(1, 64, 1, 1, device="cuda", dtype=torch.float16)
    gradient = torch.full((shape[0], 1, *shape[1:]), 2.0**-12 * (1 + 12 / 1024), device="cuda", dtype=torch.float16)
    operator(input, offset, weight.requires_grad_(), None, None, (1, 1), (0, 0), (1, 1)).backward(gradient)
    assert (weight.grad == 186.125).all()


@pytest.mark.parametrize("device", DEVICES)
def test_empty_batch(device):
    values = tensors(GENERAL, groups=2, offset_groups=4, masked=True, B=0, device=device)
    seed = torch.zeros_like(operator(*values, *GENERAL))
    for gradient, value in zip(gradients(compiled.deform_conv2d, values, GENERAL, seed)[1:], values):
        assert gradient.shape == value.shape and not gradient.any()


def test_a_gpu_without_kernels(monkeypatch):
    """The library was compiled for other GPUs: said before a launch fails, with the remedy."""
    monkeypatch.setattr(compiled, "_DEVICES", ["cpu", "cuda"])
    monkeypatch.setattr(compiled, "_fits", lambda device: False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla V100")
    x = SimpleNamespace(device=torch.device("cuda", 0), dtype=torch.float16)
    expected = "it was compiled for other GPUs than Tesla V100; compile it again with TORCH_CUDA_ARCH_LIST=7.0 in the environment"
    assert compiled.why_not(x) == expected
    monkeypatch.setattr(compiled, "_fits", lambda device: True)
    assert compiled.why_not(x) is None


@pytest.mark.skipif("cuda" not in compiled._DEVICES, reason="built without CUDA kernels")
def test_the_library_knows_its_gpus(monkeypatch):
    """It finds a kernel for a GPU of this machine, and none where there is no GPU; a compiled graph takes the answer as a constant."""
    assert sys.modules["mm_modules.DCN._C"].cuda_kernels_fit() == torch.cuda.is_available()
    for fits in (True, False):
        def asked(device, fits=fits):
            with open(os.devnull):  # which no graph can hold
                return fits

        monkeypatch.setattr(compiled, "_asked_once", asked)
        graph = torch.compile(lambda x: x + 1 if compiled._fits(x.device) else x - 1, fullgraph=True, backend="eager")
        assert graph(torch.zeros(())).item() == (1 if fits else -1)
        torch.compiler.reset()


@pytest.mark.skipif(torch.version.cuda is None or shutil.which("nvcc") is None, reason="no nvcc, or a torch without CUDA")
def test_cuda_kernels_are_built():
    assert os.environ.get("LITV2_DCN_CUDA") == "0" or "cuda" in compiled._DEVICES


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(input=torch.zeros(2, 4, 6, 6, dtype=torch.int32)), "input is Int"),
        (dict(input=torch.zeros(4, 6, 6)), r"input must be 4-D, got shape \[4, 6, 6\]"),
        (dict(offset=torch.zeros(2, 8, 3, 3, dtype=torch.bfloat16)), "offset is BFloat16, expected Float"),
        (dict(offset=torch.zeros(2, 8, 3, 2)), r"offset has shape \[2, 8, 3, 2\], expected \[2, 8, 3, 3\]"),
        (dict(offset=torch.zeros(2, 12, 3, 3)), r"offset \[2, 12, 3, 3\] does not fit"),
        (dict(weight=torch.zeros(6, 3, 2, 2)), r"weight \[6, 3, 2, 2\] does not fit input \[2, 4, 6, 6\]"),
        (dict(weight=torch.zeros(6, 4, 2, 2).double()), "weight is Double, expected Float"),
        (dict(weight=torch.zeros(6, 4, 9, 9)), "does not fit|output would be"),
        (dict(bias=torch.zeros(5)), r"bias \[5\] does not fit weight"),
        (dict(mask=torch.zeros(2, 4, 3, 2)), r"mask has shape \[2, 4, 3, 2\], expected \[2, 4, 3, 3\]"),
        (dict(stride=(0, 1)), r"stride=\[0, 1\]"),
        (dict(padding=(-1, 0)), r"padding=\[-1, 0\]"),
        (dict(dilation=(1, 0)), r"dilation=\[1, 0\]"),
    ],
)
def test_bad_arguments_of_the_operator(change, words):
    good = dict(input=torch.zeros(2, 4, 6, 6), offset=torch.zeros(2, 8, 3, 3), weight=torch.zeros(6, 4, 2, 2), bias=None, mask=None)
    good |= dict(stride=(2, 2), padding=(0, 0), dilation=(1, 1))
    assert operator(**good).shape == (2, 6, 3, 3)
    with pytest.raises(ValueError, match=words):
        operator(**{**good, **change})
    gradient = torch.zeros(2, 6, 3, 3)
    if "bias" not in change:
        arguments = {**good, **change, **{f"need_{name}": True for name in ("input", "offset", "weight")}, "need_mask": False}
        del arguments["bias"]
        with pytest.raises(ValueError, match=words):
            backward_operator(gradient, **arguments)


def test_bad_gradient():
    input, offset, weight, *_ = (None if value is None else value.detach() for value in tensors(DTM))
    needs = (True, True, True)
    for gradient, words in ((torch.zeros(2, 6, 4, 4).double(), r"\[2, 6, 4, 4\]"), (torch.zeros(2, 6, 4, 3), "Float")):
        with pytest.raises(ValueError, match=words):
            backward_operator(gradient, input, offset, weight, None, *DTM, *needs, False)
    with pytest.raises(ValueError, match="mask is None"):
        backward_operator(torch.zeros(2, 6, 4, 3).double(), input, offset, weight, None, *DTM, *needs, True)


def run(code_or_module, **environment):
    command = [sys.executable, *code_or_module]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True)


@pytest.mark.parametrize("command", documented("mm_modules/DCN/README.md", r"python -m mm_modules\.DCN"), ids=str)
def test_choice_by_environment(command):
    done = run(command.words[1:], LITV2_DCN_BACKEND="torch", OMP_NUM_THREADS="1")
    lines = done.stdout.splitlines()
    assert [line.split()[1] for line in lines if line.startswith("  cpu")] == ["onnx", "compiled", "torchvision", "torch"]
    assert [line.split()[1] for line in lines if line.startswith("  cpu") and "<- used" in line] == ["torch"]
    done = run(["-c", "import mm_modules.DCN"], LITV2_DCN_BACKEND="fast")
    assert "deform_conv2d has no backend 'fast'; choose from onnx, compiled, torchvision, torch" in done.stderr


def test_choice(monkeypatch):
    x, choose = torch.zeros(1, 1, 1, 1), deform_conv.operator.choose
    assert choose(x).name == "compiled"
    monkeypatch.setattr(compiled, "_DEVICES", ("cuda",))
    assert choose(x).name == "torch"
    with use(deform_conv2d="compiled"), pytest.raises(RuntimeError, match="is forced .*, but it was built for cuda only, got cpu"):
        choose(x)


def test_an_extension_that_does_not_load_is_said(tmp_path):
    """A file of another torch or Python version: a warning with the way out, and the other backends work."""
    shutil.copytree(ROOT / "mm_modules", tmp_path / "mm_modules", ignore=shutil.ignore_patterns("_C*", "build", "csrc"))
    (tmp_path / "mm_modules" / "DCN" / f"_C{SUFFIX}").write_bytes(b"not a library")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\nfrom mm_modules.DCN import DeformConv2dPack\nimport torch\n"
    code += "print(DeformConv2dPack(1, 1, 2)(torch.zeros(1, 1, 4, 4)).shape)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert "it is for another torch, Python or processor" in done.stderr and "setup.py build_ext --inplace" in done.stderr
    assert done.stdout.strip() == "torch.Size([1, 1, 3, 3])"


@pytest.mark.skipif(torch.version.cuda is None, reason="a torch without CUDA")
def test_build_falls_back_when_cuda_does_not_compile(tmp_path):
    """With an nvcc that fails, and a C++ compiler that only makes empty files, which is fast."""
    shutil.copytree(ROOT / "mm_modules", tmp_path / "mm_modules", ignore=shutil.ignore_patterns("_C*", "build"))
    bin = tmp_path / "cuda/bin"
    bin.mkdir(parents=True)
    version = f'*--version*) echo "release {torch.version.cuda}, V{torch.version.cuda}.0"; exit 0;;'
    answer = f'case "$*" in {version} *--list-gpu-arch*) echo compute_90; exit 0;; esac'
    (bin / "nvcc").write_text(f"#!/bin/sh\n{answer}\nexit 1\n")
    for name in ("c++", "g++"):
        real = shutil.which(name)
        make_output = 'for word; do [ "$last" = -o ] && touch "$word" && made=1; last=$word; done'
        (bin / name).write_text(f'#!/bin/sh\n{make_output}\n[ "$made" ] || exec {real} "$@"\n')
    for script in bin.iterdir():
        script.chmod(0o755)
    folder = tmp_path / "mm_modules/DCN"
    environment = {**os.environ, "CUDA_HOME": str(tmp_path / "cuda"), "PATH": f"{bin}:{os.environ['PATH']}", "LITV2_DCN_CUDA": ""}
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "CPU kernels, no CUDA kernels: they do not compile" in done.stdout.splitlines()[-1]
    assert len(list(folder.glob("_C*.so"))) == 1
