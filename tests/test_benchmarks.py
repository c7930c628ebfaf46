# SPDX-License-Identifier: Apache-2.0
"""The benchmark commands run and compare what they say they compare."""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from command_helpers import run, run_here
from document_helpers import Command, commands, documented
from gpu_helpers import DEVICES
from helpers import FAST, ROOT, normal, tiny_model, write_images
from litv2 import LITv2

sys.path.append(str(ROOT / "benchmarks"))
import harness  # noqa: E402
import models  # noqa: E402
import peak  # noqa: E402

DOCUMENT = "benchmarks/README.md"
TEACHER = dict(patch_size=2, embed_dim=32, depths=(1, 1, 1, 1), num_heads=(1, 2, 4, 8))


def measured(command: Command, folder: Path, flags: str = "", plot: bool = True) -> dict:
    """The results of a documented command with smaller settings appended, which lie in three files and are printed."""
    stem = folder / "results"
    files = {} if torch.cuda.is_available() else dict(cuda="cpu")
    done = run(command, *flags.split(), "--out", stem, files=files)
    results = json.loads(stem.with_suffix(".json").read_text())
    with open(stem.with_suffix(".csv")) as file:
        assert len(list(csv.DictReader(file))) == len(results["rows"]) > 0
    assert stem.with_suffix(".png").exists() == plot
    assert results["title"] in done.stdout and all(f"| {name} |" in done.stdout for name in list(results["rows"][0])[1:-1])
    assert results["environment"]["threads"] >= 1
    return results


@pytest.mark.parametrize("command", documented(DOCUMENT, r"python benchmarks/attention\.py --threads 2"), ids=str)
def test_attention(command, tmp_path):
    hilo, msa = measured(command, tmp_path, "--layers HiLo MSA --modes eager --batch-size 1 --rounds 1")["rows"]
    assert (hilo["layer"], hilo["parameters_M"], hilo["MFLOPs"]) == ("HiLo", 2.2, 298.3) and msa["eager_ms"] > 0


@pytest.mark.extra
@pytest.mark.parametrize("command", documented(DOCUMENT, r"python benchmarks/attention\.py --over resolution"), ids=str)
def test_attention_over_resolution(command, tmp_path):
    rows = measured(command, tmp_path, "--layers HiLo SRA --sides 14 28 --modes eager --rounds 1")["rows"]
    assert [(row["layer"], row["tokens"]) for row in rows] == [(layer, tokens) for tokens in (196, 784) for layer in ("HiLo", "SRA")]


@pytest.mark.parametrize("command", documented(DOCUMENT, r"python benchmarks/layout\.py .*"), ids=str)
def test_layout(command, tmp_path):
    results = measured(command, tmp_path, "--batch-size 1 --img-size 64 --rounds 1", plot=False)
    assert len(results["rows"]) == 2 and "times_as_fast" in results["rows"][0]


@pytest.mark.extra
@pytest.mark.parametrize("command", documented(DOCUMENT, r"python benchmarks/models\.py --models .* eager"), ids=str)
def test_models(command, tmp_path):
    results = measured(command, tmp_path, "--batch-size 2 --img-size 64 --rounds 1")
    lit, resnet = (next(row for row in results["rows"] if row["model"] == name) for name in ("LITv2-S", "ResNet-50"))
    assert lit["parameters_M"] == 27.8 and resnet["parameters_M"] == 25.6
    assert resnet["GFLOPs"] == pytest.approx(4.09 * (64 / 224) ** 2, rel=0.02)
    assert results["batch_size"] == 2 and lit["eager_ms"] > 0 and {lit["best"], resnet["best"]} == {"eager"}
    assert lit["times_LITv2-S"] == 1 and resnet["times_LITv2-S"] == pytest.approx(lit["eager_ms"] / resnet["eager_ms"], abs=0.02)
    assert (tmp_path / "results.csv").read_text().startswith("model,group,top1")
    assert (tmp_path / "results.png").stat().st_size > 10_000


@pytest.mark.extra
@pytest.mark.parametrize("command", documented(DOCUMENT, r"python benchmarks/models\.py --device cuda .*"), ids=str)
def test_models_on_a_gpu(command, tmp_path):
    """On the CPU where there is none, and in float32, for a CPU may be minutes at work with float16."""
    flags = "--models litv2_small --modes eager --batch-size 1 --img-size 64 --warm-up 0 --rounds 1"
    results = measured(command, tmp_path, flags if torch.cuda.is_available() else f"{flags} --dtype float32")
    assert (results["device"], results["dtype"]) == (("cuda", "float16") if torch.cuda.is_available() else ("cpu", "float32"))
    assert [row["images_per_s"] is not None for row in results["rows"] if row["model"] == "LITv2-S"] == [True]


@pytest.mark.extra
@pytest.mark.parametrize("command", documented(DOCUMENT, r"python benchmarks/training\.py .*"), ids=str)
def test_training(command, tmp_path):
    rows = measured(command, tmp_path, "--processes 2 --batch-size 2 --img-size 64 --rounds 1 --threads 2")["rows"]
    assert [row["checkpointing"] for row in rows] == ["off", "on"] and {row["processes"] for row in rows} == {2}
    assert all(0 < row["memory_MiB"] < 106 for row in rows)  # the gradients of 27.8 M parameters are in DDP's buffers


@pytest.mark.extra
@pytest.mark.extra
@pytest.mark.parametrize("command", documented(DOCUMENT, r"python benchmarks/predict\.py .*"), ids=str)
def test_predict(command, tmp_path):
    images = write_images(tmp_path / "images", {"a": 2, "b": 1})
    torch.save(dict(model=tiny_model().state_dict(), config=dict(DATA=dict(IMG_SIZE=32))), tmp_path / "tiny.pth")
    flags = ["--images", "3", "40", "--batch-size", "8", "--out", tmp_path / "results"]
    done = run(command, *flags, files={"FILE": tmp_path / "tiny.pth", "DIR": images})
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert [row["images"] for row in rows] == [3, 40] and all(row["peak_MiB"] > 100 for row in rows)
    assert re.search(r"images/s: predict [\d.-]+, reading [\d.]+, model [\d.]+\n", done.stdout)


@pytest.mark.extra
@pytest.mark.parametrize("command", documented(DOCUMENT, r"python benchmarks/loader\.py .*"), ids=str)
def test_loader(command, tmp_path):
    rows = measured(command, tmp_path, "--images 8 --batch-size 4 --img-size 64 --rounds 1 --threads 1")["rows"]
    assert [(row["source"], row["workers"]) for row in rows] == [(s, n) for s in ("folder", "zip", "tar") for n in (0, 1, 2)]


@pytest.mark.extra
@pytest.mark.parametrize("command", documented(DOCUMENT, r"python benchmarks/runtimes\.py .*"), ids=str)
def test_runtimes(command, tmp_path):
    rows = measured(command, tmp_path, "--batch-sizes 1 --img-size 64 --rounds 1 --only DeformConv")["rows"]
    assert [row["runtime"] for row in rows] == ["eager", "onnxruntime, DeformConv node"] and rows[1]["largest_error"] < 1e-4


@pytest.mark.extra
@pytest.mark.parametrize("command", documented(DOCUMENT, r"python benchmarks/deform_conv\.py .*"), ids=str)
def test_deform_conv(command, tmp_path):
    results = measured(command, tmp_path, "--batch-size 1 --rounds 1")
    rows = results["rows"]
    assert len({row["input"] for row in rows}) == 3 and {row["backend"] for row in rows} >= {"torch", "nn.Conv2d"}
    assert all(row["times_as_fast"] == 1 for row in rows if (row["backend"], row["dtype"]) == ("torch", "float32"))
    assert 0 < results["token_mergings_percent"] < 100


@pytest.mark.extra
@pytest.mark.parametrize("command", documented(DOCUMENT, r"python benchmarks/kernels\.py .*"), ids=str)
def test_kernels(command, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")  # to compile takes a minute
    rows = measured(command, tmp_path, "--batch-size 1 --rounds 1 --warm-up 0", plot=False)["rows"]
    cases = {(row["operator"], row["input"], row["pass"]) for row in rows}
    assert len(cases) == 29 and {row["form"] for row in rows} >= {"torch.compile", "torch"}
    assert all(row["times_as_fast"] == 1 for row in rows if row["form"] == "torch.compile")


@pytest.mark.extra
@pytest.mark.parametrize("command", documented(DOCUMENT, r"python benchmarks/flops\.py .*"), ids=str)
def test_flops(command, tmp_path):
    rows = measured(command, tmp_path)["rows"]
    assert len(rows) == 11 and all(row["unexplained_%"] == 0 for row in rows)
    wrong = rows.pop()  # the one published figure that the release's formula does not give
    assert wrong["published"] == "3.70" and wrong["note"].startswith("3.702 without")
    assert all(f"{row['ours']:.3f}" == row["published"] and row["note"] is None for row in rows)
    assert all(row["published_M"] in (None, f"{row['parameters_M']:.3f}") for row in rows)


@pytest.mark.extra
def test_flops_of_detectors_and_segmenters(tmp_path):
    command = [sys.executable, ROOT / "benchmarks/flops.py", "--only", "detection", "segmentation", "--out", tmp_path / "dense"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = {row["model"]: row for row in json.loads((tmp_path / "dense.json").read_text())["rows"]}
    assert len(rows) == 15 and all(row["unexplained_%"] == 0 for row in rows.values())
    assert rows["retinanet_litv2_s_fpn_1x_coco"]["ours"] == pytest.approx(242.39, abs=0.01)
    notes = {name: row["note"] for name, row in rows.items() if row["note"]}
    assert notes == {"mask_rcnn_litv2_m_fpn_1x_coco_ws_4": "315.465 without attention's products (15.685)"}


def check_dense(results: dict) -> None:
    parts = [(part, model) for part in ("image to result", "backbone") for model in ("LITv2", "Swin-T")]
    assert [(row["part"], row["model"]) for row in results["rows"]] == parts
    assert all(row["ms"] > 0 and row["memory_MiB"] > 0 for row in results["rows"])


@pytest.mark.extra
@pytest.mark.parametrize("command", documented(DOCUMENT, r"python benchmarks/kills\.py .*"), ids=str)
def test_kills_of_the_trainers_of_others(command, tmp_path):
    """timm resumes at epochs, so that its end differs; each kill is counted."""
    (row,) = measured(command, tmp_path, "--trainers timm --kills 1", plot=False)["rows"]
    assert row["trainer"] == "timm" and row["kills"] >= row["runs"] == 1 and row["equal"] + row["stuck"] <= 1


@pytest.mark.extra
@pytest.mark.parametrize("command", documented(DOCUMENT, r"python benchmarks/dense\.py .*"), ids=str)
def test_detectors(command, tmp_path):
    check_dense(measured(command, tmp_path, "--shape 64 96 --rounds 1 --warm-up 0", plot=False))


RECALLS = {  # of a frequent and a rare class, in percent
    "plain-0": (50, 0), "plain-1": (60, 10), "weights-0": (50, 20), "weights-1": (60, 10), "sampling-0": (50, 40), "sampling-1": (60, 51),
}  # fmt: skip


@pytest.mark.parametrize("command", documented(DOCUMENT, r"python benchmarks/imbalance\.py .*"), ids=str)
def test_imbalance(command, tmp_path, monkeypatch):
    """One run is really trained; then known recalls take the place of what was found."""
    import main

    start = main.main

    def train(words: list[str], build) -> int:
        run = words[words.index("--tag") + 1]
        report = Path(words[words.index("--output") + 1], f"runs/{run}/report")
        if run == "sampling-0":
            assert start(words, build) == 0 and (report / "classes.csv").is_file()
        report.mkdir(parents=True, exist_ok=True)
        lines = ["class,recall", *(f"{name},{recall / 100}" for name, recall in zip("ab", RECALLS[run], strict=True))]
        (report / "classes.csv").write_text("\n".join(lines))
        (report.parent / "metrics.jsonl").write_text(json.dumps(dict(kind="val", epoch=2, top1=50)) + "\n")
        return 0

    write_images(tmp_path / "images/train", {"a": 20, "b": 20}, size=32)
    write_images(tmp_path / "images/val", {"a": 2, "b": 2}, size=32)
    monkeypatch.setattr(main, "main", train)
    opts = [*FAST, *"DATA.IMG_SIZE 32 TEST.IMG_SIZE 32 DATA.NUM_WORKERS 0".split()]
    flags = ["--seeds", 0, 1, "--out", tmp_path / "results", "--opts", *opts]
    run_here(monkeypatch, command, *flags, files=dict(DIR=tmp_path / "images"))
    rows = {row["way"]: row for row in json.loads((tmp_path / "results.json").read_text())["rows"]}
    assert [row["balanced_accuracy"] for row in rows.values()] == [30, 35, 50.25] and rows["sampling"]["rare"] == 45.5
    # Differences 10 and 0, 20 and 20.5; Student's t with one degree of freedom: 12.706.
    assert (rows["weights"]["over_plain_interval"], rows["weights"]["verdict"]) == ("-58.53 to 68.53", "undecided")
    assert (rows["sampling"]["over_plain_interval"], rows["sampling"]["verdict"]) == ("17.07 to 23.43", "better")
    (data,) = tmp_path.glob("results-runs/*/data")
    thinned = sorted(path.relative_to(data).as_posix() for path in data.glob("*/b/*"))
    assert thinned == ["train/b/0.png", "train/b/1.png", "val/b/0.png", "val/b/1.png"]


@pytest.mark.extra
def test_segmenters(tmp_path):
    config = "segmentation/configs/litv2/litv2_s_fpn_r50_512x512_80k_ade20k.py"
    flags = f"{config} --synthetic --shape 64 96 --rounds 1 --warm-up 0 --out {tmp_path / 'dense'}".split()
    done = subprocess.run([sys.executable, "benchmarks/dense.py", *flags], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    check_dense(json.loads((tmp_path / "dense.json").read_text()))


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--rounds 0", "--rounds: 0, expected at least 1"),
        ("--threads two", "invalid positive value: 'two'"),
        ("--warm-up -1", "argument --warm-up: -1, expected at least 0"),
        ("--out {file}/models", "--out: cannot be written: .*Not a directory|--out: cannot be written: .*File exists"),
    ],
)
def test_wrong_flags(flags, words, tmp_path, capsys):
    """Before anything is measured, the folder of the results included."""
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit):
        harness.parser("", "models").parse_args(flags.format(file=tmp_path / "file").split())
    assert re.search(words, capsys.readouterr().err)


@pytest.mark.extra
def test_compiling_is_not_timed():
    done = subprocess.run([sys.executable, ROOT / "benchmarks/training.py", "--warm-up", "0"], capture_output=True, text=True)
    assert done.returncode == 2 and "--warm-up 0 would time the first round" in done.stderr


@pytest.mark.extra
@pytest.mark.parametrize(
    "script, flags, words",
    [
        ("attention.py", "--over window --heads 7", "num_heads=7"),
        ("attention.py", "--modes graph", "--modes graph: it needs a GPU"),
        ("gpu.py", "--device cpu", "add --dry-run"),
        ("models.py", "--models litv2_small --img-size 16", "--img-size 16: LITv2-S does not support it"),
    ],
)
def test_what_a_model_refuses_is_one_line(script, flags, words, tmp_path):
    command = [sys.executable, ROOT / "benchmarks" / script, *flags.split()]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 2 and last.startswith("error: ") and words in last and "Traceback" not in done.stderr


TINY_RUN = "--img-size 64 --batch-size 2 --rounds 1 --warm-up 0"


def check_figures(row: dict, modes: list[str]) -> None:
    """Every mode has its time, and the figure is the best one's. Times are rounded, so two modes may share the best."""
    times = {mode: row[f"{mode}_ms"] for mode in modes}
    assert times[row["best"]] == min(times.values())
    assert row["images_per_s"] == pytest.approx(2e3 / times[row["best"]], rel=0.05)


@pytest.mark.extra
@pytest.mark.parametrize("command", documented(DOCUMENT, r"python benchmarks/models\.py .* --dtype int8"), ids=str)
def test_models_in_int8(command, tmp_path):
    """In both runtimes; LITv2's native form is there where the processor has the instructions."""
    rows = [row for row in measured(command, tmp_path, TINY_RUN)["rows"] if row["images_per_s"]]
    assert [row["model"] for row in rows] == ["LITv2-S", "ResNet-50"]
    for row in rows:
        check_figures(row, [mode for mode in ("native", "openvino", "onnxruntime") if row.get(f"{mode}_ms")])
        assert row["openvino_ms"] and row["onnxruntime_ms"]


@pytest.mark.extra
@pytest.mark.parametrize("command", documented(DOCUMENT, r"python benchmarks/models\.py --quick"), ids=str)
def test_models_quick(command, tmp_path):
    """With fewer models: a rival that is re-parameterised has the published parameters then."""
    flags = f"--models litv2_small repvit_m1_5 --modes openvino onnxruntime {TINY_RUN}"
    lit, repvit = measured(command, tmp_path, flags)["rows"]
    for row in (lit, repvit):
        check_figures(row, ["openvino", "onnxruntime"])
    assert (lit["model"], repvit["model"], repvit["parameters_M"]) == ("LITv2-S", "RepViT-M1.5", 14.0)


def test_a_mode_that_fails_is_said(tmp_path, monkeypatch, capsys):
    """The others go on; a result that is not the model's is not timed."""

    def broken(case):
        raise RuntimeError("Exception from a file\nno such operator")

    def wrong(case):
        return lambda: torch.full((1, 1000), float("nan"))

    modes = dict(eager=models.MODES["eager"], native=broken, openvino=broken, onnxruntime=wrong)  # native is not for rivals
    monkeypatch.setattr(models, "MODES", modes)
    candidate = next(candidate for candidate in models.CANDIDATES if candidate.timm == "resnet50")
    args = SimpleNamespace(dtype="float32", modes=list(modes), quick=True)
    with torch.no_grad():
        functions = models.prepare(candidate, normal(0, 1, 3, 64, 64), args, {})
    assert list(functions) == ["ResNet-50, eager"]
    said = capsys.readouterr().err.splitlines()
    assert said[-2] == "ResNet-50 without openvino: RuntimeError: no such operator"
    assert said[-1].startswith("ResNet-50 without onnxruntime: ValueError: its logits are off by nan")


@pytest.mark.parametrize("package, mode", [("openvino", "openvino"), ("onnxruntime", "onnxruntime")])
def test_a_runtime_that_is_not_installed(package, mode, monkeypatch, capsys):
    for name in [name for name in sys.modules if name.startswith(("litv2.export.openvino_ir", "litv2.export.onnx_graph"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    assert mode not in models.available(None, "float32", "cpu")
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith(f"without {mode}: ")]
    assert "pip install" in line
    with pytest.raises(ValueError, match=f"--modes {mode}: .*pip install"):
        models.available([mode], "float32", "cpu")


@pytest.mark.parametrize("modes, dtype", [(["eager"], "int8"), (["eager", "compiled"], "int8")])
def test_modes_that_do_not_exist(modes, dtype):
    with pytest.raises(ValueError, match="--modes eager: torch has no int8"):
        models.available(modes, dtype, "cpu")


@pytest.fixture
def compiled_peak():
    try:
        return peak.peak("float32", 1)
    except peak.NoPeak as reason:
        pytest.skip(str(reason))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_peak(dtype, compiled_peak):
    """Of an instruction that the processor has; two threads do the work of two."""
    try:
        one, two = (peak.peak(dtype, threads) for threads in (1, 2))
    except peak.NoPeak:
        assert dtype == "int8" and not {"VNNI", "AMX"} & set(harness.features())
        return
    assert one.multiply_adds > 0 and one.run() == one.multiply_adds and two.run() == two.multiply_adds
    family, kind = one.instruction.split()[0], one.instruction.split()[-1]
    assert {family, "VNNI" if "VNNI" in family else family} & set(harness.features())
    assert kind in dict(float32=["FMA"], bfloat16=["BF16", "FMA"], int8=["VNNI", "AVX-VNNI", "INT8"])[dtype]
    assert kind != "BF16" or "BF16" in harness.features() or family == "AMX"


def test_without_a_compiler_there_is_no_peak(monkeypatch, capsys):
    monkeypatch.setenv("CXX", "no-such-compiler")
    peak._library.cache_clear()
    try:
        assert models.reference_rate(SimpleNamespace(device="cpu", dtype="float32", threads=1)) is None
    finally:
        peak._library.cache_clear()
    assert capsys.readouterr().err == "without peak_share: there is no C++ compiler no-such-compiler for peak.cpp\n"


def test_peak_of_a_dtype_without_a_loop(compiled_peak):
    with pytest.raises(peak.NoPeak, match="no loop of float16 instructions"):
        peak.peak("float16", 1)


def test_features_are_in_the_record():
    assert harness.environment()["instructions"].split() == harness.features() != []


@pytest.mark.parametrize("count", [1, 2, 3, 11, 50])
def test_percentiles(count):
    values = normal(count, count).tolist()
    assert harness.percentiles(values) == pytest.approx(np.percentile(values, [10, 50, 90]).tolist())


@pytest.mark.parametrize("device", DEVICES)
def test_peak_memory(device, capfd):
    """Beyond what was held before; what is freed in the call counts no longer. torch's profiler prints nothing of its own."""
    held = torch.zeros(1 << 20, device=device)

    def function() -> None:
        a = held + 1
        del a
        b = held + 1
        c = b[: 1 << 19] + 1  # half as large
        del b, c

    assert harness.peak_memory(function, device) == pytest.approx(1.5 * held.nbytes, rel=0.01)
    assert capfd.readouterr() == ("", "")


def test_every_benchmark_is_run():
    imported = {"harness.py", "attention_layers.py", "attention_plots.py", "training_step.py", "runtime_modes.py", "peak.py"}
    imported |= {"gpu_stages.py", "gpu_predictions.py", "trainings.py", "__init__.py"}
    shown = {command.words[1].removeprefix("benchmarks/") for command in commands() if command.line.startswith("python benchmarks/")}
    assert {path.name for path in (ROOT / "benchmarks").glob("*.py")} == shown | imported


@pytest.mark.extra
@pytest.mark.parametrize("command", documented(DOCUMENT, r"python benchmarks/teacher\.py DIR --teacher .*"), ids=str)
def test_teacher(command, tmp_path):
    """A run that is finished counts, one that is not is trained, with its teacher; the interval is that of four differences."""
    names = [f"n{i:08d}" for i in range(10)]
    torch.save(dict(model=LITv2(num_classes=10, **TEACHER).state_dict(), class_names=names), tmp_path / "teacher.pth")
    for part in ("train", "val"):
        write_images(tmp_path / "data" / part, dict.fromkeys(names, 4), size=32)
    runs = tmp_path / "results_runs/student"
    for seed, pair in enumerate([(50.0, 51.0), (50.0, 53.0), (52.0, 54.0), (49.0, None)]):
        for name, top1, more in zip(("alone", "taught"), pair, ([], ["DISTILL.TEACHER", str(tmp_path / "teacher.pth")])):
            settings = ["TRAIN.EPOCHS", "1", "TRAIN.WARMUP_EPOCHS", "0", "EVAL_FREQ", "1", *more]
            folder = runs / f"{name}-seed{seed}-{harness.fingerprint(tmp_path / 'data', settings)}"
            folder.mkdir(parents=True)
            if top1 is not None:
                (folder / "metrics.jsonl").write_text(json.dumps(dict(kind="val", update=1, epoch=1, top1=top1)) + "\n")
    files = dict(DIR=tmp_path / "data")
    done = run(command, "--teacher", tmp_path / "teacher.pth", "--seeds", 4, "--epochs", 1, "--out", tmp_path / "results", files=files)
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert [row["difference"] for row in rows][:3] == [1, 3, 2] and rows[3]["alone_top1"] == 49
    log = (folder / "log_rank0.txt").read_text()
    assert "teacher.pth: 1." in log and f"final figures  Acc@1 {rows[3]['taught_top1']:.3f}" in log
    values = np.array([row["difference"] for row in rows])
    half = 3.182446 * values.std(ddof=1) / 2  # Student's 97.5 % quantile at three degrees of freedom
    low, high = values.mean() - half, values.mean() + half
    word = "the teacher helps" if low > 0 else "the teacher harms" if high < 0 else "undecided"
    assert f"difference {values.mean():+.1f} ({low:+.1f} to {high:+.1f}): {word}\n" in done.stdout


@pytest.mark.extra
@pytest.mark.parametrize("command", documented(DOCUMENT, r"python benchmarks/check_data\.py DIR --checkpoint FILE"), ids=str)
def test_check_data(command, tmp_path):
    pytest.importorskip("imagehash")
    checkpoint = ROOT / "examples/litv2_imagenette.safetensors"
    write_images(tmp_path / "images", {"a": 25, "b": 25})
    line = Command(DOCUMENT, command.folder, command.line.replace("DIR", str(tmp_path / "images")).replace("FILE", str(checkpoint)))
    values = {row["measure"]: row["value"] for row in measured(line, tmp_path, "--copies 4", plot=False)["rows"]}
    assert values["false near duplicates"] == 0 and values["grey: found in %"] == 100
