# SPDX-License-Identifier: Apache-2.0
"""The stages of gpu.py that no other benchmark has, each as a process of its own: python benchmarks/gpu_stages.py STAGE --out STEM.

A stage writes STEM.json whenever it has new rows, so that one that is stopped keeps what it has.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch._inductor.config
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from gpu_predictions import predicted_ms
from harness import (
    ROOT,
    device_name,
    environment,
    event_samples,
    percentiles,
    positive,
    rounded,
    samples,
    say,
    stem,
    synchronise,
    write_json,
)
from litv2.errors import UserError, listed, run_program
from models import CANDIDATES, GEMM_SIZE, Candidate, in_a_line, prepare
from roofline import GPU_MODELS, Ceilings, trace

torch._inductor.config.compile_threads = 2  # of each process, one of which there is for a model


@dataclass(frozen=True)
class Sizes:
    models: tuple[str, ...]
    dtypes: tuple[str, ...]  # compiled in the first one only: it takes a minute or two per model and batch
    batches: tuple[int, ...]
    image: int
    rounds: int
    warm_up: int
    product: int  # side of the matrices whose product's rate is the ceiling
    copy: int  # bytes
    tests: tuple[str, ...]

    def groups(self) -> Iterator[tuple[str, int]]:
        """What is timed in turns."""
        return ((dtype, batch) for dtype in self.dtypes for batch in self.batches)


FULL = Sizes(tuple(GPU_MODELS), ("float16", "bfloat16"), (64, 1), 224, 30, 10, GEMM_SIZE, 2**30, ("-n", "4"))
TINY = Sizes(("litv2_small", "resnet50"), ("float16",), (2, 1), 64, 2, 1, 64, 2**16, ("-n", "0", "tests/ops/test_every_backend.py"))


@dataclass(frozen=True)
class Run:
    """What a stage is called with.

    Attributes:
        ceilings: of this GPU, if they were measured.
    """

    device: str
    sizes: Sizes
    out: Path
    ceilings: Ceilings | None

    def modes(self, dtype: str) -> list[str]:
        return ["eager", *(["graph"] if self.device != "cpu" else []), *(["compiled"] if dtype == self.sizes.dtypes[0] else [])]

    def write(self, rows: list[dict], **about) -> None:
        write_json(self.out.with_suffix(".json"), dict(about, rows=rows))


def environment_stage(run: Run) -> None:
    """The machine, and its two ceilings: bytes/s of a copy, read and written, and operations/s of large products."""
    about = environment(run.device)
    torch.backends.cuda.matmul.allow_tf32 = True  # after the default was recorded: what convolutions in float32 have
    source, side = torch.rand(run.sizes.copy // 4, device=run.device), run.sizes.product
    work: dict[str, float] = {"copy": 2 * source.nbytes}
    functions: dict[str, Callable[[], object]] = {"copy": partial(torch.empty_like(source).copy_, source)}
    for dtype in dict.fromkeys((*run.sizes.dtypes, "float32")):
        a, b = torch.randn(2, side, side, device=run.device).to(getattr(torch, dtype))
        work[dtype], functions[dtype] = 2 * side**3, partial(torch.mm, a, b)
    seconds = event_samples(functions, run.sizes.rounds, run.sizes.warm_up, run.device)
    rates = {name: work[name] / statistics.median(values) for name, values in seconds.items()}
    rows = [dict(ceiling=name, **spread(values), T_per_s=rounded(rates[name] / 1e12, 4)) for name, values in seconds.items()]
    run.write(rows, environment=about, ceilings=dict(bandwidth=rates.pop("copy"), rates=rates))


def tests_stage(run: Run) -> None:
    """The test suite's tests on a GPU, a row each; files that cannot be imported are rows, too."""
    import pytest

    rows: dict[str, dict] = {}

    class Recorder:
        def pytest_collectreport(self, report) -> None:
            if report.failed:
                self.record(report, "not collected")

        def pytest_runtest_logreport(self, report) -> None:
            if report.when == "call" or not report.passed:
                self.record(report, report.outcome)

        def record(self, report, outcome: str) -> None:
            why = str(report.longrepr[-1] if isinstance(report.longrepr, tuple) else report.longrepr or "").strip().splitlines()
            rows[report.nodeid] = dict(
                test=report.nodeid, outcome=outcome, seconds=rounded(getattr(report, "duration", None), 2), why=why[-1] if why else None
            )
            run.write(list(rows.values()))

    os.chdir(ROOT)
    pytest.main(["-m", "gpu", "--continue-on-collection-errors", "-p", "no:cacheprovider", *run.sizes.tests], plugins=[Recorder()])
    if not rows:
        raise UserError("pytest found no tests of GPUs")
    wrong = {outcome: [name for name, row in rows.items() if row["outcome"] == outcome] for outcome in ("failed", "not collected")}
    if any(wrong.values()):
        raise UserError(f"{len(rows)} tests; " + "; ".join(f"{outcome}: {listed(names)}" for outcome, names in wrong.items() if names))


def random_images(batch: int, sizes: Sizes, device: str) -> Tensor:
    torch.manual_seed(0)
    return torch.randn(batch, 3, sizes.image, sizes.image, device=device)


@torch.no_grad()
def prepared(name: str, dtype: str, images: Tensor, modes: list[str], facts: dict[str, dict]) -> dict[str, Callable[[], object]]:
    """What models.py times: functions by "model, mode"; it says which modes it leaves out, and why."""
    say(f"preparing {name}, {dtype}, batch {len(images)}")
    return prepare(candidate(name), images, SimpleNamespace(dtype=dtype, modes=modes, quick=False), facts)


def candidate(name: str) -> Candidate:
    return next(each for each in CANDIDATES if each.timm == name)


def models_stage(run: Run) -> None:
    """The table: all models prepare at the same time, each in a process of its own, and then run in turns."""
    rows: list[dict] = []
    with contextlib.ExitStack() as stack:
        models = [stack.enter_context(Model(name, run)) for name in run.sizes.models]
        for dtype, batch in run.sizes.groups():
            for model in models:
                model.prepare(dtype, batch, run.modes(dtype))
            ready = [model for model in models if model.is_ready()]
            if not ready:
                raise UserError(f"no model could be prepared in {dtype} at batch {batch}; the log of this stage says why")
            done, rows = rows, []
            for times, waits in timed_in_turns(ready, run, batch == 1):
                rows = [model_row(model, label, dtype, batch, times[label], waits.get(label)) for model, label in times_of(ready)]
                run.write(done + rows)
            rows = done + rows


def times_of(ready: list[Model]) -> list[tuple[Model, str]]:
    """What is timed of each model; the first once more as the last, so that a drift within a round shows in the difference."""
    return [(model, label) for model in ready for label in model.labels] + [(ready[0], f"{ready[0].labels[0]} again")]


Times = dict[str, list[float]]


def timed_in_turns(ready: list[Model], run: Run, with_waits: bool) -> Iterator[tuple[Times, Times]]:
    """Yields the seconds by label on the GPU's clock and, with waits, as a caller sees them, now and then, so that they can be written."""
    times, waits = {label: [] for _, label in times_of(ready)}, {label: [] for _, label in times_of(ready)}
    for seconds, measure in ((times, event_samples), (waits, samples))[: 1 + with_waits]:
        for i in range(run.sizes.warm_up + run.sizes.rounds):
            turns = [model.turn(measure) for model in ready] + [ready[0].turn(measure, ready[0].labels[:1], " again")]
            for label, own in (pair for turn in turns for pair in turn if i >= run.sizes.warm_up):
                seconds[label].append(own)
            if i >= run.sizes.warm_up and i % 10 == 0:
                yield times, waits
    yield times, waits


class Model:
    """A model in a process of its own, which is there while the context is.

    Attributes:
        labels: "model, mode" of all that it can run, once it is ready.
        facts: what ``prepare`` of models.py says of it, and ``bound_ms``, at the ceilings that were measured.
    """

    def __init__(self, name: str, run: Run):
        self.name, self.labels, self.facts = name, list[str](), dict[str, Any]()
        self.connection, self.theirs = get_context("spawn").Pipe()
        self.process = get_context("spawn").Process(target=serve, args=(name, run, self.theirs))

    def __enter__(self) -> Model:
        self.process.start()
        self.theirs.close()  # so that nobody waits for a process that is gone
        return self

    def __exit__(self, *_) -> None:
        self.process.kill()

    def prepare(self, dtype: str, batch: int, modes: list[str]) -> None:
        with contextlib.suppress(OSError):  # of a process that is gone, is_ready() says so
            self.connection.send((dtype, batch, modes))

    def is_ready(self) -> bool:
        """Waits for it. If it cannot be prepared, the reason is said, and the other models go on."""
        try:
            self.labels, self.facts = self._answer()
        except RuntimeError as error:
            self.labels = []
            say(f"without {self.name}: {error}")
        return bool(self.labels)

    def turn(self, measure: Callable, labels: list[str] | None = None, suffix: str = "") -> list[tuple[str, float]]:
        """The seconds of each function, by label."""
        self.connection.send((measure, labels or self.labels))
        return [(label + suffix, *values) for label, values in self._answer().items()]

    def _answer(self) -> Any:
        try:
            answer = self.connection.recv()
        except (EOFError, OSError):
            answer = "its process ended"
        if isinstance(answer, str):
            raise RuntimeError(answer)
        return answer


def serve(name: str, run: Run, connection: Connection) -> None:
    """Answers what ``Model`` asks, an error with a line of text."""
    functions: dict[str, Callable[[], object]] = {}
    while True:
        try:
            order = connection.recv()
        except EOFError:  # the stage was killed
            return
        try:
            if len(order) == 3:
                dtype, batch, modes = order
                functions.clear()
                torch._dynamo.reset()  # so that the next batch is no dynamic size
                gc.collect()
                torch.cuda.empty_cache()
                kernels, facts = trace(name, batch, run.sizes.image, getattr(torch, dtype)), dict[str, dict]()
                functions |= prepared(name, dtype, random_images(batch, run.sizes, run.device), modes, facts)
                bound = rounded(run.ceilings and 1e3 * run.ceilings.seconds(kernels), 4)
                connection.send((list(functions), dict(*facts.values(), bound_ms=bound)))
            else:
                measure, labels = order
                functions[labels[-1]]()  # until it ends, the processor has queued what is timed
                connection.send(measure({label: functions[label] for label in labels}, 1, 0, device=run.device))
        except Exception as error:
            connection.send(f"{type(error).__name__}: {in_a_line(error)}")


def model_row(of: Model, label: str, dtype: str, batch: int, seconds: list[float], waits: list[float] | None) -> dict:
    """A line of the table: ms on the GPU's clock, latency_ms with the wait for the result; share is of the bound."""
    model, mode = label.split(", ")
    own, bound = spread(seconds), of.facts["bound_ms"]
    return dict(
        model=model,
        mode=mode,
        dtype=dtype,
        batch=batch,
        **own,
        latency_ms=spread(waits)["ms"] if waits else None,
        images_per_s=rounded(batch / statistics.median(seconds), 1),
        MiB=rounded(of.facts["memory"], 1) if mode == "eager" else None,
        bound_ms=bound,
        share=rounded(bound and bound / own["ms"], 3),
        predicted_ms=predicted_ms(model, mode, dtype, batch, bound),
    )


def spread(seconds: list[float]) -> dict[str, float]:
    low, median, high = (round(1e3 * value, 4) for value in percentiles(seconds))
    return dict(ms=median, p10=low, p90=high)


def profile_stage(run: Run) -> None:
    """Where the time of LITv2-S's forward pass goes, by kernel; on a CPU by operator."""
    dtype, batch = next(run.sizes.groups())
    name, rows = run.sizes.models[0], []
    functions = prepared(name, dtype, random_images(batch, run.sizes, run.device), run.modes(dtype), {})
    for label, function in functions.items():
        model, mode = label.split(", ")
        rows += [dict(model=model, mode=mode, dtype=dtype, batch=batch, **row) for row in kernels_of(function, run)]
        run.write(rows)


def kernels_of(function: Callable[[], Tensor], run: Run) -> list[dict]:
    on_gpu = run.device != "cpu"
    activity, kind = (ProfilerActivity.CUDA, DeviceType.CUDA) if on_gpu else (ProfilerActivity.CPU, DeviceType.CPU)
    function()
    synchronise(run.device)
    with profile(activities=[activity]) as profiler:
        for _ in range(run.sizes.rounds):
            function()
        synchronise(run.device)
    events = [event for event in profiler.key_averages() if event.device_type == kind]
    times = {event.key: event.self_device_time_total if on_gpu else event.self_cpu_time_total for event in events}
    calls = {event.key: event.count / run.sizes.rounds for event in events}
    whole = sum(times.values())
    if not whole:
        raise RuntimeError("torch's profiler recorded no kernel; with KINETO_LOG_LEVEL=0 in the environment it prints why")
    return [
        dict(kernel=key, calls=round(calls[key], 2), us=round(us / run.sizes.rounds, 2), share=round(us / whole, 4))
        for key, us in sorted(times.items(), key=lambda item: -item[1])
        if us
    ]


STAGES: dict[str, Callable[[Run], None]] = dict(
    environment=environment_stage, tests=tests_stage, models=models_stage, profile=profile_stage
)


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("stage", choices=STAGES)
    flags.add_argument("--out", type=stem, required=True, metavar="STEM")
    flags.add_argument("--results", type=Path, metavar="FILE", help="what gpu.py has written so far")
    flags.add_argument("--device", type=device_name, default="cuda")
    flags.add_argument("--dtypes", nargs="+", metavar="NAME")
    flags.add_argument("--batch-sizes", nargs="+", type=positive, metavar="N")
    flags.add_argument("--tiny", action="store_true")
    args = flags.parse_args()
    results = json.loads(args.results.read_text()) if args.results else dict(ceilings=None)
    sizes = TINY if args.tiny else FULL
    sizes = replace(sizes, dtypes=tuple(args.dtypes or sizes.dtypes), batches=tuple(args.batch_sizes or sizes.batches))
    if args.device == "cpu":
        sizes = replace(sizes, dtypes=("float32",))
    ceilings = Ceilings(**results["ceilings"]) if results["ceilings"] else None
    STAGES[args.stage](Run(args.device, sizes, args.out, ceilings))


if __name__ == "__main__":
    sys.exit(run_program(main))
