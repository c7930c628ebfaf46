# SPDX-License-Identifier: Apache-2.0
"""Everything that is worth knowing about LITv2 on a GPU, in one command of under ten minutes on an H100 with 16 cores.

    python benchmarks/gpu.py
    python benchmarks/gpu.py --only environment models            # with what an earlier run has written of the others
    python benchmarks/gpu.py --dry-run --device cpu               # every stage with tiny sizes, to find mistakes without a GPU

Stages, in this order: the machine and its ceilings; the deformable convolution's extension is built; the tests on a GPU; models are
compiled, all at a time, and timed in turns (LITv2 and rivals; eager, CUDA graph, compiled; float16 and bfloat16; batch 64 and 1) on the
GPU's clock, batch 1 also as a caller waits for it; a profile; attention layers; HiLo's alpha; the kernels beside compiled code; backends of
the deformable convolution; training steps with their memory and synchronisations. Each is a process of its own with a deadline: one that
fails or is stopped is recorded with the reason, and the others run. STEM.json is rewritten whenever there are new rows. ``share`` is of the
bound (roofline.py) at the ceilings that this GPU was measured to have, ``predicted_ms`` an estimate (gpu_predictions.py).
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from harness import ROOT, device_name, parser, positive, say, table, write_json
from litv2.errors import UserError, run_program

LOG = 4000  # last characters of a stage's output that are kept
CARD = "clocks.sm,clocks.mem,temperature.gpu,power.draw,memory.used"  # as nvidia-smi calls them
MODEL_COLUMNS = "model mode dtype batch ms p10 p90 latency_ms images_per_s MiB bound_ms share predicted_ms".split()


@dataclass(frozen=True)
class Stage:
    """A command with a deadline in seconds, which may write the rows of its table to STEM.json, as publish() does.

    ``--out STEM`` is appended if ``rows`` is true, and ``tiny`` in a dry run.
    """

    name: str
    limit: int
    command: list[str]
    tiny: list[str] = field(default_factory=list)
    rows: bool = True


def stages(device: str, results: Path, groups: list[str] | None = None) -> list[Stage]:
    """``groups``: flags of gpu_stages.py that say which dtypes and batch sizes models are timed in."""
    benchmarks, on_gpu = ROOT / "benchmarks", device != "cpu"
    dtypes = dict(half="float16", training="bfloat16") if on_gpu else dict.fromkeys(("half", "training"), "float32")

    def own(name: str, limit: int) -> Stage:
        command = [sys.executable, str(benchmarks / "gpu_stages.py"), name, "--device", device, "--results", str(results)]
        return Stage(name, limit, command + (groups or []), ["--tiny"])

    def other(name: str, limit: int, flags: str, tiny: str) -> Stage:
        script, *words = flags.split()
        command = [sys.executable, str(benchmarks / script), "--device", device, *words, "--rounds", "30", "--warm-up", "10"]
        return Stage(name, limit, command, [*tiny.split(), "--rounds", "1", "--warm-up", "0"])

    attention = f"attention.py --dtype {dtypes['half']} --modes eager" + (" graph" if on_gpu else "")
    training = f"training.py --dtypes {dtypes['training']} --modes eager --batch-size 128 --grad-checkpointing off"
    setup = [sys.executable, str(ROOT / "mm_modules/DCN/setup.py"), "build_ext"]
    return [
        own("environment", 40),
        Stage("build", 120, [*setup, "--inplace"], ["--help"], rows=False),
        own("tests", 100),
        own("models", 350),
        own("profile", 40),
        other("attention", 60, attention, "--layers HiLo MSA --batch-size 1"),
        other("alpha", 30, f"{attention} --over alpha", "--alphas 0.9 --batch-size 1"),
        other("kernels", 60, f"kernels.py --batch-size 64 --dtype {dtypes['half']}", "--batch-size 1"),
        other("deform_conv", 40, "deform_conv.py --batch-size 64", "--batch-size 1"),
        other("training", 80, training, "--models litv2_small --batch-size 2 --img-size 64"),
    ]


def main() -> int:
    flags = parser(__doc__, "gpu", threads=False)
    names = [stage.name for stage in stages("cpu", Path())]
    flags.add_argument("--only", nargs="+", choices=names, metavar="STAGE", help=f"of {', '.join(names)}")
    flags.add_argument("--budget", type=positive, default=560, help="seconds in all (default: 560)")
    flags.add_argument("--device", type=device_name, default="cuda")
    flags.add_argument("--dry-run", action="store_true", help="tiny sizes; the extension is not built, and on a CPU nothing is compiled")
    flags.add_argument("--dtypes", nargs="+", choices=["float16", "bfloat16"], help="of the models; compiled is the first (default: both)")
    flags.add_argument("--batch-sizes", nargs="+", type=positive, metavar="N", help="of the models (default: 64 1)")
    args = flags.parse_args()
    if args.device == "cpu" and not args.dry_run:
        raise UserError("--device cpu: a CPU would take days for these sizes; add --dry-run")
    results = args.out.with_suffix(".json")
    groups = ["--dtypes", *args.dtypes] if args.dtypes else []
    groups += ["--batch-sizes", *map(str, args.batch_sizes)] if args.batch_sizes else []
    chosen = stages(args.device, results, groups)
    chosen = [stage for stage in chosen if not args.only or stage.name in args.only]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # so that what a stage has done is recorded, and its process ends
    session = Session(results, args.device, args.dry_run)
    if args.only:
        session.go_on()
    session.run_all(chosen, args.budget)
    print(summary(session.results))
    print(f"written to {results}")
    return int(any("error" in session.results["stages"][stage.name] for stage in chosen))


class Session:
    """Runs stages and keeps the file of their results."""

    def __init__(self, path: Path, device: str, dry_run: bool):
        self.path = path
        self.results: dict = dict(device=device, dry_run=dry_run, environment=None, ceilings=None, stages={})

    def go_on(self) -> None:
        """Keeps what an earlier run has written."""
        before = json.loads(self.path.read_text()) if self.path.exists() else self.results
        if any(before[key] != self.results[key] for key in ("device", "dry_run")):
            raise UserError(f"{self.path} is of device {before['device']}, dry run {before['dry_run']}; choose another --out, or remove it")
        self.results = before

    def run_all(self, chosen: list[Stage], budget: float) -> None:
        write_json(self.path, self.results)
        end = time.monotonic() + budget
        for stage in chosen:
            left = end - time.monotonic()
            if left < 1:
                self.record(stage, 0, error=f"not started: the budget of {budget:.0f} s is used up")
                continue
            limit = left if self.results["dry_run"] else min(stage.limit, left)  # limits are of GPUs
            say(f"{stage.name}, at most {limit:.0f} s")
            self.run(stage, limit)
            own = self.results["stages"][stage.name]
            say(f"{stage.name}: {own['seconds']:.0f} s" + (f", {own['error']}" if "error" in own else ""))

    def run(self, stage: Stage, limit: float) -> None:
        """Runs a stage in a process group of its own, which is gone afterwards, and records its rows as they come."""
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            out, log = Path(folder) / stage.name, Path(folder) / "log"
            command = stage.command + (["--out", str(out)] if stage.rows else []) + (stage.tiny if self.results["dry_run"] else [])
            start, seen = time.monotonic(), None
            with open(log, "wb") as file:
                output = dict(stdout=file, stderr=subprocess.STDOUT)
                process = subprocess.Popen(command, cwd=ROOT, env=self.variables(), start_new_session=True, **output)
            error: str | None = "the run was stopped"
            try:
                while process.poll() is None and time.monotonic() - start < limit:
                    time.sleep(0.1)
                    written = modified(out)
                    if written != seen:
                        seen = written
                        self.record(stage, time.monotonic() - start, out, error="it did not end")
                error = why(process.returncode, limit, log)
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                self.record(stage, time.monotonic() - start, out, error, log)

    def variables(self) -> dict[str, str]:
        """The environment of a stage: the extension is built for this GPU alone; a dry run compiles nothing on a CPU."""
        capability = (self.results["environment"] or {}).get("capability")
        architecture = dict(TORCH_CUDA_ARCH_LIST=capability) if capability else {}
        no_compiler = dict(TORCHDYNAMO_DISABLE="1") if self.results["dry_run"] and self.results["device"] == "cpu" else {}
        return {**os.environ, **architecture, **no_compiler}

    def record(self, stage: Stage, seconds: float, out: Path | None = None, error: str | None = None, log: Path | None = None) -> None:
        """Writes what is known of a stage: {seconds, rows, error, log, card}; no error if it ended well."""
        content = json.loads(out.with_suffix(".json").read_text()) if out and modified(out) else {}
        if stage.name == "environment":
            self.results |= {key: content.get(key) for key in ("environment", "ceilings")}
        own = dict(seconds=round(seconds, 1), rows=content.get("rows", []))
        own |= dict(error=error) if error else {}
        own |= dict(log=tail(log), card=card()) if log else {}
        self.results["stages"][stage.name] = own
        write_json(self.path, self.results)


def modified(out: Path) -> int | None:
    """When the rows of a stage were written last."""
    path = out.with_suffix(".json")
    return path.stat().st_mtime_ns if path.exists() else None


def why(status: int | None, limit: float, log: Path) -> str | None:
    """Why a stage has not ended well."""
    if status is None:
        return f"stopped at its deadline, after {limit:.0f} s"
    lines = [line.strip() for line in tail(log).splitlines() if line.strip()]
    return f"status {status}: {lines[-1] if lines else 'no message'}" if status else None


def tail(log: Path) -> str:
    return log.read_bytes()[-LOG:].decode(errors="replace")


def card() -> dict[str, str] | None:
    """Clocks, temperature and power of the GPU now: one that throttles shows here."""
    if shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", f"--query-gpu=driver_version,{CARD}", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True)
    values = done.stdout.splitlines()[0].split(", ") if done.returncode == 0 and done.stdout else []
    return dict(zip(["driver_version", *CARD.split(",")], values)) or None


def summary(results: dict) -> str:
    """The stages, and the table of the models."""
    lines = [[name, str(stage["seconds"]), str(len(stage["rows"])), stage.get("error", "")] for name, stage in results["stages"].items()]
    parts = [table(["stage", "seconds", "rows", "error"], lines)]
    models = results["stages"].get("models", {}).get("rows", [])
    if models:
        rows = [["" if row[column] is None else str(row[column]) for column in MODEL_COLUMNS] for row in models]
        parts.append(table(MODEL_COLUMNS, rows))
    return "\n\n".join(parts)


if __name__ == "__main__":
    sys.exit(run_program(main))
