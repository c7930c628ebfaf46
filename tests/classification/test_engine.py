# SPDX-License-Identifier: Apache-2.0
"""The loops on small models whose right answers are computed by hand."""

from __future__ import annotations

import math
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn

from config import load_config
from data.dataset import Batch
from engine import NonFiniteLoss, Progress, Step, evaluate, train_one_epoch
from gpu_helpers import DEVICES
from helpers import ROOT, assert_as_precise, normal, tiny_model
from litv2.errors import UserError
from litv2.runs.signals import StopRequested, StopSignals
from litv2.runs.unreadable import BadFiles
from optim import build_scheduler
from precision import Precision, choose_precision, set_tf32
from throughput import measure_throughput

CPU = torch.device("cpu")


def batches(sizes, classes=7, channels=3, size=8):
    torch.manual_seed(1)
    return [
        Batch(torch.randn(n, channels, size, size), torch.randint(0, classes, (n,)), [f"{b}-{i}.png" for i in range(n)], [])
        for b, n in enumerate(sizes)
    ]


def linear(classes=7, inputs=3 * 8 * 8):
    torch.manual_seed(2)
    return nn.Sequential(nn.Flatten(), nn.Linear(inputs, classes))


def train(model, loader, *, mode="off", optimizer=None, clip_grad=0.0, max_nonfinite=0, **kwargs):
    config = load_config(ROOT / "classification/configs/litv2-digits.yaml")
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = build_scheduler(config, optimizer, 10_000, 10_000)
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    scheduler.step_update = lambda update: None  # these tests want a constant rate
    progress = kwargs.pop("progress", Progress())
    step = Step(model, optimizer, scheduler, nn.CrossEntropyLoss(), Precision(CPU, mode), clip_grad=clip_grad, max_nonfinite=max_nonfinite)
    train_one_epoch(step, loader, **{**dict(steps=len(loader), progress=progress, bad_files=BadFiles(0, print)), **kwargs})
    return progress


@pytest.mark.parametrize(
    "sizes, accumulation, groups", [([4, 4, 4, 4], 2, [(0, 1), (2, 3)]), ([4] * 5, 2, [(0, 1), (2, 3), (4,)]), ([4] * 3, 8, [(0, 1, 2)])]
)
@pytest.mark.parametrize("clip", [0.0, 0.05])
def test_accumulation(sizes, accumulation, groups, clip):
    """One clipped step per group on the mean loss of its batches, the short last group included."""
    loader, model, expected = batches(sizes), linear(), linear()
    records = []
    progress = train(model, loader, accumulation=accumulation, clip_grad=clip, on_update=lambda update, seconds: records.append(update))
    for group in groups:
        loss = torch.stack([nn.functional.cross_entropy(expected(loader[i].images), loader[i].targets) for i in group]).mean()
        gradients = torch.autograd.grad(loss, expected.parameters())
        norm = torch.stack([g.norm() for g in gradients]).norm()
        factor = min(1.0, clip / (norm.item() + 1e-6)) if clip else 1.0
        with torch.no_grad():
            for parameter, gradient in zip(expected.parameters(), gradients):
                parameter -= 0.1 * factor * gradient
    for a, b in zip(model.parameters(), expected.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    assert progress.updates == len(groups) == len(records) and progress.step == len(sizes)
    assert [record.images for record in records] == [4 * len(group) for group in groups]


@pytest.mark.parametrize("sizes", [[5, 3, 1], [8], [1, 1]])
@pytest.mark.parametrize("classes", [7, 3])
def test_evaluation_is_exact(sizes, classes):
    loader, model = batches(sizes, classes), linear(classes)
    images, targets = torch.cat([b.images for b in loader]), torch.cat([b.targets for b in loader])
    logits = model(images)
    order = logits.argsort(dim=1, descending=True)
    result = evaluate(model, loader, Precision(CPU), expected=sum(sizes), bad_files=BadFiles(0, print), log=print)
    count = len(targets)
    assert result["images"] == count
    assert result["top1"] == pytest.approx(100 * sum(order[i, 0] == targets[i] for i in range(count)).item() / count)
    assert result["top5"] == pytest.approx(100 * sum(targets[i] in order[i, :5] for i in range(count)) / count)
    assert result["loss"] == pytest.approx(-logits.log_softmax(1)[range(count), targets].mean().item(), rel=1e-5)


def test_evaluation_counts_images():
    loader, model = batches([4, 2]), linear()
    with pytest.raises(RuntimeError, match="saw 6 images .* but the data set has 7"):
        evaluate(model, loader, Precision(CPU), expected=7, bad_files=BadFiles(5, print), log=print)
    lines = []
    loader[1] = loader[1]._replace(unreadable=["a.png: truncated"])
    result = evaluate(model, loader, Precision(CPU), expected=7, bad_files=BadFiles(5, print), log=lines.append)
    assert result["images"] == 6 and "leaves out 1 unreadable" in lines[0]
    with pytest.raises(UserError, match="a.png: truncated"):
        evaluate(model, loader, Precision(CPU), expected=7, bad_files=BadFiles(0, print), log=print)


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_loss_that_is_not_finite_stops_before_the_step(where):
    """The message has the step and the files; weights, batch-norm statistics and optimizer are those from before."""
    model = tiny_model().train()
    loader = batches([4, 4, 4], classes=10, size=32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    train(model, loader[:1], optimizer=optimizer)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    if where == "loss":
        loader[1].images[2, 0, 0, 0] = math.nan
    else:
        model.head.weight.register_hook(lambda gradient: gradient * math.inf)
    progress = Progress(step=1, updates=1)
    with pytest.raises(NonFiniteLoss, match="update 1; the images of this step:(.|\n)*1-2.png"):
        train(model, loader[1:], optimizer=optimizer, progress=progress, steps=3)
    assert progress == Progress(step=1, updates=1)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert {state["step"].item() for state in optimizer.state.values()} == {1.0}


def test_steps_that_are_not_finite_can_be_skipped():
    model, expected = linear(), linear()
    loader = batches([4, 4, 4])
    loader[1].images[0] = math.inf
    progress = train(model, loader, max_nonfinite=1)
    train(expected, [loader[0], loader[2]])
    assert progress.nonfinite == 1 and progress.updates == 3
    for a, b in zip(model.parameters(), expected.parameters()):
        assert torch.equal(a, b)
    with pytest.raises(NonFiniteLoss):
        train(model, [loader[1]], max_nonfinite=1, progress=progress, steps=4)


def test_stop_between_steps():
    stop = StopSignals()
    stop.received = 15
    progress = Progress()
    with pytest.raises(StopRequested, match="SIGTERM"):
        train(linear(), batches([4, 4]), stop=stop, progress=progress)
    assert progress.step == 1


@pytest.mark.parametrize("mode", ["bf16", "fp16"])
def test_mixed_precision_trains(mode):
    model, losses = tiny_model().train(), []
    loader = batches([8], classes=10, size=32) * 5
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    progress = Progress()
    config = load_config(ROOT / "classification/configs/litv2-digits.yaml")
    scheduler = build_scheduler(config, optimizer, 100, 64)
    precision = Precision(CPU, mode)
    assert precision.scaler.is_enabled() == (mode == "fp16")
    step = Step(model, optimizer, scheduler, nn.CrossEntropyLoss(), precision, clip_grad=5.0)
    bad_files = BadFiles(0, print)
    train_one_epoch(step, loader, 5, progress, bad_files=bad_files, on_update=lambda update, seconds: losses.append(update.loss))
    assert losses[-1] < losses[0] and all(p.dtype == torch.float32 for p in model.parameters())


def test_unreadable_files_stop_training():
    loader = batches([4, 4])
    loader[1] = loader[1]._replace(unreadable=["b.png: no image"])
    with pytest.raises(UserError, match="b.png: no image"):
        train(linear(), loader)


def test_throughput():
    calls = []
    model = linear()
    model.register_forward_hook(lambda *_: calls.append(1))
    result = measure_throughput(model, torch.randn(4, 3, 8, 8), warm_up=3, timed=5)
    assert len(calls) == 8
    assert result["latency_ms_p10"] <= result["latency_ms_median"] <= result["latency_ms_p90"]
    assert result["images_per_second"] == pytest.approx(4e3 / result["latency_ms_median"]) and result["peak_memory_mb"] > 0


@pytest.mark.parametrize(
    "amp, device, mode, words",
    [
        ("auto", "cpu", "off", "off, float32 throughout (AMP is auto, and the device is cpu, not cuda)"),
        ("auto", "mps", "off", "the device is mps, not cuda"),
        ("auto", "cuda", "fp16", "float16 (AMP is auto: as in the release's training on CUDA)"),
        ("on", "cpu", "bf16", "bfloat16 (AMP is on, and the device is cpu)"),
        ("on", "cuda", "fp16", "float16 (AMP is on"),
        ("bf16", "cuda", "bf16", "bfloat16 (AMP is bf16)"),
        ("off", "cuda", "off", "off, float32 throughout (AMP is off)"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*GradScaler.*")  # there may be no such device
def test_the_precision_and_why(amp, device, mode, words):
    precision, line = choose_precision(amp, torch.device(device))
    assert precision.mode == mode and line.startswith("mixed precision: ") and words in line


@pytest.mark.parametrize("amp, line", [("auto", "float16"), ("bf16", "bfloat16")])
@pytest.mark.filterwarnings("ignore:.*GradScaler.*")
def test_the_log_says_how_evaluation_computes(amp, line):
    assert choose_precision(amp, torch.device("cuda"))[1].endswith(f"; evaluation takes {line} weights instead of autocast")
    assert "evaluation" not in choose_precision("off", torch.device("cuda"))[1]


def test_tf32_is_stated_and_set():
    for allowed in (True, False):
        line = set_tf32(allowed, torch.device("cuda"))
        assert torch.backends.cuda.matmul.allow_tf32 == torch.backends.cudnn.allow_tf32 == allowed
        assert line.startswith("TF32: on" if allowed else "TF32: off")
    assert "no effect" in set_tf32(True, CPU) and not torch.backends.cudnn.allow_tf32


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("mode", ["bf16", "fp16"])
@torch.inference_mode()
def test_inference_with_half_precision_weights(mode, device):
    """As precise as autocast, without it; offsets and batch norm keep their float32 weights, and the model is left alone."""
    model, x = tiny_model().to(device).eval(), normal(0, 4, 3, 64, 64).to(device)
    exact = model(x)
    precision = Precision(torch.device(device), mode)
    half = precision.for_inference(model)
    with precision.context():
        autocast = model(x)
    assert_as_precise(half(x.to(precision.dtype)), autocast, exact, factor=1.5)
    for name, value in half.state_dict().items():
        kept = "conv_offset" in name or "norm_layer" in name and "downsample" in name
        assert value.dtype == (model.state_dict()[name].dtype if kept else precision.dtype), name
        if kept:
            assert torch.equal(value, model.state_dict()[name]), name
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


def test_attention_of_bfloat16_training_on_the_cpu():
    """It is torch's plain attention, and as close to float32's gradients as the fused one; evaluation takes the fused one."""
    model, x = tiny_model().train(), normal(0, 2, 3, 64, 64)
    precision = Precision(CPU, "bf16")

    def gradient(context) -> tuple[Tensor, set[str]]:
        model.zero_grad()
        with context:
            loss = model(x).float().square().sum()
        operators, nodes = set(), [loss.grad_fn]
        while nodes:
            node = nodes.pop()
            if node is not None and node not in operators:
                operators.add(node)
                nodes += [after for after, _ in node.next_functions]
        loss.backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()]), {operator.name() for operator in operators}

    exact, _ = gradient(nullcontext())
    fused, fused_operators = gradient(torch.autocast("cpu", torch.bfloat16))
    ours, operators = gradient(precision.context())
    assert any("FlashAttention" in name for name in fused_operators) and not any("FlashAttention" in name for name in operators)
    assert (ours - exact).norm() <= 1.5 * (fused - exact).norm()
    with torch.no_grad(), precision.context():
        assert torch.backends.cuda.flash_sdp_enabled()
