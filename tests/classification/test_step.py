# SPDX-License-Identifier: Apache-2.0
"""A training step that the host does not wait for: what it computes, what it reads and when, and what is left when a step is bad."""

from __future__ import annotations

import copy
import math
import os
import signal
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from timm.loss import SoftTargetCrossEntropy
from timm.utils import ModelEmaV3
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import distributed
import engine
from config import load_config
from data.dataset import Batch
from data.mixup import AnyBatchMixup
from engine import NonFiniteLoss, Progress, Step, evaluate, train_one_epoch
from gpu_helpers import on_gpu
from helpers import FAST, ROOT, run_ranks, same, tiny_model, write_images
from litv2.errors import run_program
from litv2.runs.signals import StopRequested, StopSignals
from litv2.runs.unreadable import BadFiles
from litv2.weights.reading import read_checkpoint
from main import main
from metrics import read_metrics
from optim import build_optimizer, build_scheduler
from precision import Precision
from reading import Reading

CONFIG = load_config(ROOT / "classification/configs/litv2-digits.yaml")


class Run:
    """A training of a tiny LITv2 with everything that a step can have, and the records of what it reported."""

    def __init__(self, lag: bool | None, mode: str = "off", device: str = "cpu", optimizer: str = "adamw", compiled=False, **settings):
        torch.manual_seed(3)
        self.device = torch.device(device)
        model = tiny_model(drop_path_rate=0.1).to(self.device)
        config = CONFIG.clone()
        config.defrost()
        config.TRAIN.OPTIMIZER.NAME = optimizer
        optimizer = build_optimizer(config, model, 512)
        runner = distributed.parallel(model, self.device, compiled)
        precision = Precision(self.device, mode)
        if mode == "fp16":  # a scale that does not overflow in this model
            precision.scaler = torch.amp.GradScaler(device, init_scale=8.0)
        mixup = AnyBatchMixup(mixup_alpha=0.8, cutmix_alpha=1.0, num_classes=10)
        self.step = Step(
            runner, optimizer, build_scheduler(config, optimizer, 4, 512), SoftTargetCrossEntropy(), precision, mixup,
            ModelEmaV3(model, decay=0.9), lag=lag, **{**dict(clip_grad=5.0), **settings},
        )  # fmt: skip
        self.progress = Progress()
        self.updates: list[tuple] = []  # update number and figures
        self.saved: list[dict] = []  # states

    def train(self, batches: list[Batch], **kwargs) -> Run:
        torch.manual_seed(4)
        np.random.seed(5)  # of mixup
        train_one_epoch(
            self.step, batches, len(batches), self.progress, bad_files=BadFiles(0, print),
            on_update=lambda update, seconds: self.updates.append((self.progress.updates, update)),
            on_save=lambda: self.saved.append(copy.deepcopy(self.state())), **kwargs,
        )  # fmt: skip
        return self

    def state(self) -> dict:
        step = self.step
        return dict(
            model=distributed.unwrap(step.model).state_dict(),
            ema=step.ema.module.state_dict(),
            optimizer=step.optimizer.state_dict(),
            scheduler=step.scheduler.state_dict(),
            scaler=step.precision.scaler.state_dict(),
            progress=asdict(self.progress),
        )


def batches(count: int, bad: tuple[int, ...] = ()) -> list[Batch]:
    """Random batches of four images; the numbered ones have a NaN."""
    torch.manual_seed(1)
    result = [Batch(torch.randn(4, 3, 32, 32), torch.randint(0, 10, (4,)), [f"{i}-{j}.png" for j in range(4)], []) for i in range(count)]
    for i in bad:
        result[i].images[1, 0, 0, 0] = math.nan
    return result


@pytest.mark.parametrize("mode", ["off", "bf16", "fp16"])
@pytest.mark.parametrize("bad", [(), (2,), (4,)])
def test_with_lag_a_run_is_the_same(mode, bad):
    """Figures, weights, moving average, optimizer, scaler and what was saved on the way, a skipped step included."""
    accumulation = 2 if mode == "off" else 1
    immediate, lagging = (
        Run(lag, mode, max_nonfinite=1).train(batches(5, bad), accumulation=accumulation, save_steps=2) for lag in (False, True)
    )
    assert len(immediate.updates) == immediate.progress.updates == (3 if mode == "off" else 5)
    assert immediate.progress.nonfinite == len(bad)
    assert len(immediate.saved) == len(immediate.updates) // 2
    assert str(immediate.updates) == str(lagging.updates)  # a NaN differs from itself
    same(immediate.saved, lagging.saved)
    same(immediate.state(), lagging.state())
    assert all(value.isfinite().all() for value in lagging.state()["ema"].values())


@pytest.mark.parametrize("lag", [False, True])
@pytest.mark.parametrize("mode", ["off", "fp16"])
@pytest.mark.parametrize("bad, count, accumulation", [(0, 3, 1), (1, 3, 1), (2, 3, 1), (3, 5, 2), (4, 5, 2)])
def test_a_run_that_stops_is_left_as_before_the_bad_step(lag, mode, bad, count, accumulation):
    """Although the next step was begun: the bad one may be the first, in the middle, or the last of the epoch."""
    good = bad // accumulation * accumulation  # batches before the bad step
    run, expected = Run(lag, mode), Run(False, mode)
    if good:
        expected.train(batches(count)[:good], accumulation=accumulation)
    with pytest.raises(NonFiniteLoss, match=rf"not finite at epoch 0, step {good}, update {good // accumulation}; .*(.|\n)*{bad}-1.png"):
        run.train(batches(count, (bad,)), accumulation=accumulation)
    assert str(run.updates) == str(expected.updates)
    found, left = run.state(), expected.state()
    if not good:  # an optimizer that has done nothing has no state, one that has skipped a step has zeros
        zeros = [value for entry in found["optimizer"].pop("state").values() for value in entry.values()]
        assert not any(value.any() for value in zeros) and not left["optimizer"].pop("state")
    found.pop("scaler"), left.pop("scaler")  # its scale is smaller after a step that was skipped
    same(found, left)


@pytest.mark.parametrize("lag", [False, True])
@pytest.mark.parametrize("mode", ["off", "fp16"])
def test_a_bad_loss_is_enough(lag, mode):
    """Its gradients may be finite, so that a gradient scaler sees nothing wrong."""
    run = Run(lag, mode, max_nonfinite=2)
    run.train(batches(1))
    with torch.no_grad():
        run.step.ema.module.head.weight.zero_()  # unlike the weights, which an update would show
    before = copy.deepcopy(run.state())
    run.progress.step = 0
    run.step.loss_fn = lambda logits, targets: SoftTargetCrossEntropy()(logits, targets) + math.inf
    run.train(batches(2))
    assert (run.progress.nonfinite, run.progress.updates) == (2, 3) and all(math.isfinite(update.grad_norm) for _, update in run.updates)
    for part in ("model", "ema"):
        same(run.state()[part], before[part])


def test_gradients_that_overflow_are_normal_with_a_scaler():
    """The scale was too large: the step is skipped and the scale reduced, but the run goes on."""
    run = Run(True, "fp16")
    model = distributed.unwrap(run.step.model)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    hook = model.head.weight.register_hook(lambda gradient: gradient * math.inf)
    scale = run.step.precision.scaler.get_scale()
    run.train(batches(2))
    assert run.progress.nonfinite == 0 and run.step.precision.scaler.get_scale() == scale / 4
    same(dict(model.named_parameters()), before)
    hook.remove()
    run.progress.step = 0
    run.train(batches(2))
    assert not torch.equal(model.head.weight, before["head.weight"])


@pytest.mark.parametrize("lag", [False, True])
def test_a_signal_stops_between_steps(lag):
    run, stop = Run(lag), StopSignals()
    stop.received = signal.SIGTERM
    with pytest.raises(StopRequested, match="SIGTERM"):
        run.train(batches(5), stop=stop)
    steps = 2 if lag else 1  # with lag the request is seen one step later, and the step under way is finished
    assert run.progress.step == len(run.updates) == steps
    same(run.state(), Run(False).train(batches(steps)).state())


class HostRead(AssertionError):
    """Something asked for the value of a tensor."""


class _NoReads(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        masks = [index for index in args[1] or () if index is not None] if "index" in func.name() and len(args) > 1 else []
        by_mask = any(isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8) for index in masks)
        dynamic = torch.Tag.dynamic_output_shape in func.tags and "index" not in func.name()
        if torch.Tag.data_dependent_output in func.tags or dynamic or by_mask:
            raise HostRead(func.name())
        return func(*args, **(kwargs or {}))


@contextmanager
def no_host_reads(patch: pytest.MonkeyPatch):
    """Makes an error of everything that would make the host wait for a GPU, except ``Reading.numbers``; counts those."""
    counts = SimpleNamespace(readings=0)
    numbers = Reading.numbers

    def refuse(name: str):
        def read(self, *args):
            if counts.allowed:
                return originals[name](self, *args)
            raise HostRead(name)

        return read

    def allowed(self):
        counts.readings += 1
        counts.allowed = True
        try:
            return numbers(self)
        finally:
            counts.allowed = False

    counts.allowed = False
    originals = {name: getattr(Tensor, name) for name in ("tolist", "numpy", "cpu")}  # these do not pass through the dispatcher
    with patch.context() as within, _NoReads():
        for name in originals:
            within.setattr(Tensor, name, refuse(name))
        within.setattr(Reading, "numbers", allowed)
        yield counts


@pytest.mark.parametrize(
    "read", [lambda x: x.item(), bool, float, lambda x: x.tolist(), lambda x: x.cpu(), lambda x: x[x > 0], torch.nonzero]
)
def test_the_check_finds_reads(read, monkeypatch):
    with no_host_reads(monkeypatch), pytest.raises(HostRead):
        read(torch.ones(1))


@pytest.mark.parametrize("mode", ["off", "bf16", "fp16"])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_step_reads_nothing(mode, optimizer, monkeypatch):
    """Only the figures of the step before, once."""
    run = Run(True, mode, optimizer=optimizer, max_nonfinite=1)
    with no_host_reads(monkeypatch) as counts:
        run.train(batches(7, bad=(2,)), accumulation=2)
    assert counts.readings == run.progress.updates == 4 and run.progress.nonfinite == 1


def test_figures_are_read_while_the_next_step_is_computed(monkeypatch):
    """The order of what the device gets and the host reads: the next backward pass is queued before the host waits."""
    events = []

    def noting(name, function):
        def call(*args, **kwargs):
            events.append(name)
            return function(*args, **kwargs)

        return call

    monkeypatch.setattr(Reading, "numbers", noting("read", Reading.numbers))
    run = Run(True)
    monkeypatch.setattr(run.step, "_backward", noting("backward", run.step._backward))
    monkeypatch.setattr(run.step.optimizer, "step", noting("apply", run.step.optimizer.step))
    run.train(batches(3))
    assert events == ["backward", "apply", "backward", "read", "apply", "backward", "read", "apply", "read"]


def test_an_evaluation_reads_once(monkeypatch):
    model, loader, precision = tiny_model(), batches(3), Precision(torch.device("cpu"))
    with no_host_reads(monkeypatch) as counts:
        evaluate(model, loader, precision, expected=12, bad_files=BadFiles(0, print), log=print)
    assert counts.readings == 1


def trainer(*flags) -> int:
    """The exit status of the program, run in this process on ten images in batches of two, saved every second step."""
    opts = [*FAST, "DATA.DATASET", "folder", "SAVE_STEPS", "2", "TRAIN.EMA_DECAY", "0.9", "MODEL.DROP_PATH_RATE", "0.2"]
    config = ["--cfg", str(ROOT / "classification/configs/litv2-digits.yaml"), "--workers", "0", "--batch-size", "2"]
    return run_program(lambda: main([*config, *map(str, flags), "--opts", *opts]))


def test_with_lag_the_trainer_writes_the_same(tmp_path, monkeypatch):
    """Checkpoints and metrics, of a run that was stopped by a signal and resumed with lag, and one that was never stopped."""
    write_images(tmp_path / "data/train", {"a": 6, "b": 4}, size=32)
    write_images(tmp_path / "data/val", {"a": 2, "b": 2}, size=32)
    flags = ("--data-path", tmp_path / "data", "--output")
    assert trainer(*flags, tmp_path / "immediate") == 0
    monkeypatch.setattr(engine, "Step", partial(Step, lag=True))
    forward, calls = Step._backward, []

    def interrupted(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 7:  # in the second epoch
            os.kill(os.getpid(), signal.SIGTERM)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(Step, "_backward", interrupted)
    assert trainer(*flags, tmp_path / "lagging") == 128 + signal.SIGTERM
    stopped = read_checkpoint(tmp_path / "lagging/litv2_digits/default/latest.pth")["progress"]
    assert (stopped["epoch"], stopped["step"]) == (1, 3), "the step under way was finished"
    assert trainer(*flags, tmp_path / "lagging") == 0
    a, b = (tmp_path / name / "litv2_digits/default" for name in ("immediate", "lagging"))
    for name in ("latest.pth", "previous.pth", "best.pth"):
        states = [read_checkpoint(folder / name) for folder in (a, b)]
        for state in states:
            state.pop("config")  # has the output folder
        same(*states, name)
    figures = [[{**row, "images_per_second": 0, "memory_mb": 0} for row in read_metrics(folder)] for folder in (a, b)]
    assert figures[0] == figures[1] and len(figures[0]) == 12


@pytest.mark.extra
def test_two_processes_agree_on_a_bad_step_and_a_signal():
    """One rank's loss is not finite: all skip the step, then all stop. Another time one rank gets a signal: all stop at the same step.
    Batch norm's statistics are each rank's own until an evaluation."""
    run_ranks("""
sys.path[:0] = ["tests/classification", "tests"]
import test_step as t
rank = distributed.rank()
stop = t.StopSignals()
stop.received = t.signal.SIGTERM if rank else 0
for lag in (False, True):
    run = t.Run(lag, max_nonfinite=1)
    model = distributed.unwrap(run.step.model)
    for buffer in model.buffers():
        buffer.fill_(100 * rank)
    try:
        run.train([batch._replace(images=batch.images + rank) for batch in t.batches(4, bad=(1, 2) if rank else ())])
        raise AssertionError("it must stop")
    except t.NonFiniteLoss as error:
        assert ("2-1.png" in str(error)) == (rank == 1) and ("another process" in str(error)) == (rank == 0), error
    assert (run.progress.step, run.progress.nonfinite) == (2, 1), run.progress
    weights, statistics = (torch.cat([x.detach().flatten() for x in xs()]) for xs in (model.parameters, model.buffers))
    assert weights.isfinite().all() and statistics.isfinite().all()
    assert torch.equal(*distributed.gather(weights)) and (statistics.mean() > 50) == (rank == 1)
    distributed.broadcast_buffers(model)
    assert torch.equal(*distributed.gather(torch.cat([x.flatten() for x in model.buffers()])))

    run = t.Run(lag)
    try:
        run.train(t.batches(6), stop=stop)
        raise AssertionError("it must stop")
    except t.StopRequested as request:
        assert request.number == t.signal.SIGTERM
    assert run.progress.step == (2 if lag else 1), run.progress
""")


def test_compiled_graphs_end_where_gradients_are_sent(monkeypatch):
    """DDP is inside torch.compile, which then splits the graph at DDP's buckets: their exchange overlaps with the backward pass."""
    monkeypatch.setattr(distributed, "world_size", lambda: 2)  # of which this is the only one
    graphs = []

    def count(graph, inputs, options):
        graphs.append(graph)
        return graph

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=count))
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        model = tiny_model(embed_dim=64)  # of 9 MiB; the first of DDP's buckets is of 1 MiB
        runner = distributed.parallel(model, torch.device("cpu"), compiled=True)
        runner(torch.randn(2, 3, 32, 32)).sum().backward()
        assert len(graphs) > 1 and distributed.unwrap(runner) is model
    finally:
        torch.distributed.destroy_process_group()
        torch._dynamo.reset()


@on_gpu
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("mode", ["fp16", "bf16"])
@pytest.mark.parametrize("processes", [1, 2])
def test_no_step_waits_for_the_gpu(mode, compiled, processes, monkeypatch):
    """CUDA reports every call that would make the host wait. With DDP, if there were two processes; this is the only one of them."""
    if processes == 2:
        monkeypatch.setattr(distributed, "world_size", lambda: 2)
        torch.distributed.init_process_group("cpu:gloo,cuda:nccl", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        run = Run(None, mode, "cuda", compiled=compiled)
        loader = [batch._replace(images=batch.images.pin_memory(), targets=batch.targets.pin_memory()) for batch in batches(6)]
        run.train(loader[:2])  # the first steps compile, initialise the optimizer and choose algorithms
        run.progress.step = 0
        torch.cuda.set_sync_debug_mode("error")
        try:
            run.train(loader, accumulation=2)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert run.progress.updates == 5 and all(math.isfinite(update.loss) for _, update in run.updates)
    finally:
        if processes == 2:
            torch.distributed.destroy_process_group()


@on_gpu
@pytest.mark.parametrize("bad", [0, 1, 2])
def test_on_a_gpu_a_bad_step_leaves_nothing(bad):
    run = Run(None, "fp16", "cuda")
    with pytest.raises(NonFiniteLoss, match=f"update {bad}; .*(.|\n)*{bad}-1.png"):
        run.train(batches(3, (bad,)))
    assert run.progress.updates == bad
    state = run.state()
    assert all(value.isfinite().all() for name in ("model", "ema") for value in state[name].values())
