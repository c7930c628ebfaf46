# SPDX-License-Identifier: Apache-2.0
"""``benchmarks/gpu.py``: every stage runs here with tiny sizes; what fails or takes too long is recorded, and the rest runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from command_helpers import run
from document_helpers import documented
from gpu_helpers import DEVICES, on_gpu
from helpers import ROOT

sys.path.append(str(ROOT / "benchmarks"))
import gpu  # noqa: E402
import gpu_stages  # noqa: E402
import harness  # noqa: E402
import models  # noqa: E402
import runtime_modes  # noqa: E402
from gpu_predictions import predicted_ms  # noqa: E402

STAGES = [stage.name for stage in gpu.stages("cpu", Path())]
DRY = ("--dry-run", "--device", "cpu")


@pytest.mark.extra
@pytest.mark.parametrize("command", documented("benchmarks/README.md", r"python benchmarks/gpu\.py"), ids=str)
def test_every_stage(command, tmp_path):
    done = run(command, *DRY, "--out", tmp_path / "gpu")
    results = json.loads((tmp_path / "gpu.json").read_text())
    assert list(results) == ["device", "dry_run", "environment", "ceilings", "stages"] and results["environment"]["threads"] >= 1
    assert list(results["stages"]) == STAGES and not [stage["error"] for stage in results["stages"].values() if "error" in stage]
    assert results["ceilings"]["bandwidth"] > 0 and results["ceilings"]["rates"]["float32"] > 0
    rows = {name: stage["rows"] for name, stage in results["stages"].items()}
    assert [name for name in STAGES if not rows[name]] == ["build"] and all(stage["seconds"] > 0 for stage in results["stages"].values())

    assert all(list(row) == gpu.MODEL_COLUMNS for row in rows["models"])
    cases = [(row["model"], row["mode"], row["batch"]) for row in rows["models"]]
    turn = [(model, mode) for model in ("LITv2-S", "ResNet-50") for mode in ("eager", "compiled")] + [("LITv2-S", "eager again")]
    assert cases == [(*case, batch) for batch in (2, 1) for case in turn]
    for row in rows["models"]:
        assert 0 < row["p10"] <= row["ms"] <= row["p90"] and row["images_per_s"] == pytest.approx(1e3 * row["batch"] / row["ms"], rel=0.01)
        assert row["share"] == pytest.approx(row["bound_ms"] / row["ms"], abs=0.001) and (row["latency_ms"] is None) == (row["batch"] > 1)
    assert {row["outcome"] for row in rows["tests"]} == ({"passed"} if torch.cuda.is_available() else {"skipped"})
    assert sum(row["share"] for row in rows["profile"] if row["mode"] == "eager") == pytest.approx(1, abs=0.01)
    assert all(f"| {column} |" in done.stdout for column in ("images_per_s", "latency_ms", "seconds"))


@pytest.mark.extra
@pytest.mark.parametrize("command", documented("docs/gpu.md", r"python benchmarks/gpu\.py .*"), ids=str)
def test_some_stages(command, tmp_path):
    """What an earlier run has written of the others is kept."""
    kept = dict(seconds=1, rows=[], error="of an earlier run")
    (tmp_path / "gpu.json").write_text(json.dumps(gpu.Session(tmp_path, "cpu", True).results | dict(stages=dict(models=kept))))
    run(command, *DRY, "--only", "environment", "--out", tmp_path / "gpu")
    results = json.loads((tmp_path / "gpu.json").read_text())
    assert results["stages"].pop("models") == kept and list(results["stages"]) == ["environment"] and results["ceilings"]


def python(code: str) -> list[str]:
    return [sys.executable, "-c", f"import json, pathlib, sys, time\nout = pathlib.Path(sys.argv[-1] + '.json')\n{code}"]


def write(*rows: object) -> str:
    return f"out.write_text(json.dumps(dict(rows={list(rows)})))\n"


@pytest.fixture
def session(tmp_path):
    return gpu.Session(tmp_path / "gpu.json", "cpu", False)


def recorded(session: gpu.Session) -> dict[str, dict]:
    return json.loads(session.path.read_text())["stages"]


def test_what_fails_or_takes_too_long_is_recorded(session):
    stages = [
        gpu.Stage("slow", 3, python(write(1, 2) + "print('on the way', flush=True)\ntime.sleep(600)")),
        gpu.Stage("broken", 30, python(write(3) + "import no_such_package")),
        gpu.Stage("silent", 30, ["false"]),
        gpu.Stage("good", 30, python(write(4))),
        gpu.Stage("without rows", 30, ["echo", "built"], rows=False),
    ]
    session.run_all(stages, 100)
    slow, broken, silent, good, without_rows = recorded(session).values()
    assert slow["rows"] == [1, 2] and slow["error"] == "stopped at its deadline, after 3 s" and slow["log"] == "on the way\n"
    assert 3 <= slow["seconds"] < 30
    assert broken["rows"] == [3] and broken["error"] == "status 1: ModuleNotFoundError: No module named 'no_such_package'"
    assert silent["rows"] == [] and silent["error"] == "status 1: no message"
    assert good["rows"] == [4] and "error" not in good
    assert without_rows["rows"] == [] and without_rows["log"] == "built\n" and "error" not in without_rows
    assert "| broken | " in gpu.summary(session.results)


def test_the_budget_is_for_all(session):
    sleep = [gpu.Stage(name, 60, ["sleep", "60"], rows=False) for name in ("first", "second")]
    session.run_all(sleep, 2)
    first, second = recorded(session).values()
    assert first["error"] == "stopped at its deadline, after 2 s" and second["error"] == "not started: the budget of 2 s is used up"


def test_a_run_that_is_stopped(session, monkeypatch):
    """Rows are in the file while a stage runs, and none of its processes outlives the run."""
    child = "import subprocess\nchild = subprocess.Popen(['sleep', '600'])\n"
    code = f"{child}part = out.with_suffix('.part')\n"
    code += "part.write_text(json.dumps(dict(rows=[child.pid])))\npart.replace(out)\ntime.sleep(600)"

    def stop(seconds: float) -> None:
        own = recorded(session).get("stage", dict(rows=[]))
        if own["rows"]:
            assert own["error"] == "it did not end"
            raise KeyboardInterrupt

    monkeypatch.setattr(gpu.time, "sleep", stop)
    with pytest.raises(KeyboardInterrupt):
        session.run_all([gpu.Stage("stage", 60, python(code))], 60)
    monkeypatch.undo()
    own = recorded(session)["stage"]
    assert own["error"] == "the run was stopped"
    state, end = Path(f"/proc/{own['rows'][0]}/stat"), time.monotonic() + 30

    def lives() -> bool:
        return state.exists() and state.read_text().rpartition(")")[2].split()[0] != "Z"

    while lives() and time.monotonic() < end:  # a killed process takes its time to go
        time.sleep(0.05)
    assert not lives()


def test_results_of_different_kinds_are_not_mixed(session):
    session.run_all([], 1)
    other = gpu.Session(session.path, "cpu", True)
    with pytest.raises(ValueError, match="is of device cpu, dry run False; choose another --out"):
        other.go_on()


def test_the_extension_is_built_for_this_gpu(session):
    assert "TORCHDYNAMO_DISABLE" not in session.variables() and session.variables().get("TORCH_CUDA_ARCH_LIST") is None
    session.results["environment"] = dict(capability="9.0")
    assert session.variables()["TORCH_CUDA_ARCH_LIST"] == "9.0" and session.variables()["PATH"] == os.environ["PATH"]
    assert gpu.Session(session.path, "cpu", True).variables()["TORCHDYNAMO_DISABLE"] == "1"
    assert "TORCHDYNAMO_DISABLE" not in gpu.Session(session.path, "cuda", True).variables()


def a_run(tmp_path: Path, stage: str = "x", **sizes) -> gpu_stages.Run:
    return gpu_stages.Run("cpu", replace(gpu_stages.TINY, dtypes=("float32",), **sizes), tmp_path / stage, None)


@pytest.mark.extra
def test_tests_that_fail(tmp_path):
    """Each is a row with its reason; a file that cannot be imported does not stop the others."""
    mark = "import pytest\n@pytest.mark.gpu\n"
    (tmp_path / "test_one.py").write_text(f"{mark}def test_good(): pass\n{mark}def test_bad(): 1 / 0\ndef test_other(): pass\n")
    (tmp_path / "test_two.py").write_text("import no_such_package\n")
    code = f"""
import dataclasses, pathlib, sys
sys.path.insert(0, "benchmarks")
from gpu_stages import TINY, Run, run_program, tests_stage
sizes = dataclasses.replace(TINY, tests=("-n", "0", "-c", "pyproject.toml", {str(tmp_path)!r}))
run = Run("cpu", sizes, pathlib.Path({str(tmp_path / "tests")!r}), None)
sys.exit(run_program(lambda: tests_stage(run)))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    rows = {row["test"].rpartition("test_")[2]: row for row in json.loads((tmp_path / "tests.json").read_text())["rows"]}
    assert {name: row["outcome"] for name, row in rows.items()} == {"good": "passed", "bad": "failed", "two.py": "not collected"}
    assert rows["two.py"]["why"] == "E   ModuleNotFoundError: No module named 'no_such_package'" and rows["good"]["why"] is None
    assert done.returncode == 2 and done.stderr.startswith("error: 3 tests; failed: ") and "test_bad; not collected: " in done.stderr


def test_a_model_whose_process_is_killed(tmp_path, capsys):
    """Nobody waits for it."""
    with gpu_stages.Model("resnet50", a_run(tmp_path)) as model:
        model.process.kill()
        for _ in range(2):
            model.prepare("float32", 2, ["eager"])
            assert not model.is_ready()
    assert capsys.readouterr().err == 2 * "without resnet50: its process ended\n"


def test_only_the_first_dtype_is_compiled(tmp_path):
    work = a_run(tmp_path)
    on_gpu = replace(work, device="cuda", sizes=gpu_stages.FULL)
    assert work.modes("float32") == ["eager", "compiled"]
    assert on_gpu.modes("float16") == ["eager", "graph", "compiled"] and on_gpu.modes("bfloat16") == ["eager", "graph"]


@pytest.mark.extra
def test_a_model_that_fails_is_left_out(tmp_path, capsys, monkeypatch):
    """Swin Transformers are built for one size of images."""
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")  # compiling takes a minute
    swin = "swin_tiny_patch4_window7_224"
    gpu_stages.models_stage(a_run(tmp_path, batches=(1,), models=(swin, "resnet50")))
    rows = json.loads((tmp_path / "x.json").read_text())["rows"]
    assert [(row["model"], row["mode"]) for row in rows] == [("ResNet-50", mode) for mode in ("eager", "compiled", "eager again")]
    assert rows[0]["ms"] > 0 and rows[0]["latency_ms"] > 0 and rows[0]["bound_ms"] is rows[0]["share"] is None
    assert f"without {swin}: AssertionError: Input height (64) doesn't match model (224)" in capsys.readouterr().err


def test_every_model_is_a_candidate():
    """And what is compared first and again is LITv2."""
    assert [gpu_stages.candidate(name).timm for name in gpu_stages.FULL.models] == list(gpu_stages.FULL.models)
    assert gpu_stages.FULL.models[0] == gpu_stages.TINY.models[0] == "litv2_small"


@pytest.mark.parametrize(
    "case, expected",
    [
        (("LITv2-S", "eager", "float16", 64, 2.5), 3.6),  # as it was written down
        (("ResNet-50", "eager", "float16", 64, 3.4), 4.0),  # by its bound
        (("ResNet-50", "eager", "float16", 1, 3.4), None),
        (("ResNet-50", "graph", "float16", 64, 3.4), None),
        (("ResNet-50", "eager", "float16", 64, None), None),
    ],
)
def test_predictions(case, expected):
    assert predicted_ms(*case) == expected


def test_a_profile_without_kernels(tmp_path):
    """As where torch's profiler cannot reach the GPU: there are no rows to take for a result."""
    run = a_run(tmp_path)
    assert gpu_stages.kernels_of(lambda: torch.ones(3) + 1, run)
    with pytest.raises(RuntimeError, match="recorded no kernel; with KINETO_LOG_LEVEL=0"):
        gpu_stages.kernels_of(lambda: None, run)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("measure", [harness.samples, harness.event_samples])
def test_functions_run_in_turns(measure, device):
    calls = []
    seconds = measure(dict(a=lambda: calls.append("a"), b=lambda: calls.append("b")), 3, 2, device=device)
    assert calls == ["a", "b"] * 5 and [len(values) for values in seconds.values()] == [3, 3] and list(seconds) == ["a", "b"]


@on_gpu
def test_events_do_not_wait():
    """A function that the GPU is long at work with counts for itself alone."""
    x = torch.randn(4096, 4096, device="cuda")
    functions = dict(long=lambda: [x @ x for _ in range(20)], short=lambda: x.add_(1))
    seconds = harness.event_samples(functions, 3, 2, "cuda")
    assert max(seconds["short"]) < min(seconds["long"])


@on_gpu
def test_a_graph_computes_again():
    x = torch.ones(8, device="cuda")
    replay = runtime_modes.captured(lambda: 2 * x)
    x.fill_(3)
    assert replay().tolist() == [6.0] * 8


@on_gpu
@pytest.mark.parametrize("name", ["litv2_small", "resnet50"])
def test_a_graph_of_a_model(name):
    """It passes the check of its logits, as every mode has to."""
    facts: dict[str, dict] = {}
    functions = gpu_stages.prepared(name, "float16", torch.randn(2, 3, 64, 64, device="cuda"), ["eager", "graph"], facts)
    assert [label.split(", ")[1] for label in functions] == ["eager", "graph"] and len(facts) == 1


@on_gpu
def test_synchronisations_are_counted():
    x = torch.ones(2, device="cuda")
    assert harness.synchronisations(lambda: x.add_(1), x.device) == 0
    assert harness.synchronisations(lambda: (x.sum().item(), x.tolist()), x.device) == 2


def test_there_are_no_synchronisations_on_a_cpu():
    assert harness.synchronisations(lambda: None, "cpu") is None


def test_graphs_need_a_gpu():
    assert runtime_modes.why_not("graph", "float32", "cpu") == "it needs a GPU, got cpu"
    assert runtime_modes.why_not("graph", "float16", "cuda") is None
    with pytest.raises(ValueError, match="--modes graph: it needs a GPU, got cpu"):
        models.available(["graph"], "float32", "cpu")
