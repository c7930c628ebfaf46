# SPDX-License-Identifier: Apache-2.0
"""The paper's tables: every figure that is counted has the printed digits, or is named; what is measured is of the right model."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch

from command_helpers import run_here
from document_helpers import documented, documents, tables
from helpers import ROOT, tiny_model, write_images
from litv2 import litv2_small
from litv2.errors import MissingPackage, UserError
from litv2.weights.releases import ZOO

sys.path.append(str(ROOT / "benchmarks"))
from paper import __main__ as program  # noqa: E402
from paper import classifiers, dense, layers, measuring  # noqa: E402
from paper.tables import TABLES  # noqa: E402

DOCUMENT = "benchmarks/README.md"
SEGMENTER = "litv2_s_fpn_r50_512x512_80k_ade20k"
COUNTED = ("main", "attention", "lit", "figure2", "figure3", "alpha", "layers")  # without OpenMMLab's packages or images


@pytest.fixture
def setting(tmp_path) -> measuring.Setting:
    """One round of one image."""
    return measuring.Setting(tmp_path / "paper", measure=True, quick=True, batch_size=1, rounds=1, warm_up=0)


def rows_of(folder, name: str) -> list[dict]:
    return json.loads((folder / f"paper-{name}.json").read_text())["rows"]


@pytest.mark.parametrize("command", documented(DOCUMENT, r"python -m benchmarks\.paper"), ids=str)
def test_counts(command, tmp_path, monkeypatch, capsys):
    """The printed digits, but for those that the document names; the notes have their figures from these counts."""
    run_here(monkeypatch, command, *COUNTED, "--out", tmp_path / "paper")
    printed = capsys.readouterr().out
    rows = {name: rows_of(tmp_path, name) for name in COUNTED}
    wrong = {row["model"]: row for name in rows for row in rows[name] if row.get("as_printed") == "no"}
    assert not any("Measured" in (tmp_path / f"paper-{name}.md").read_text() for name in COUNTED)
    assert list(wrong) == ["sra", "LIT-S", "LIT-M", "LIT-B", "litv2_small_alpha10"]
    assert {name: len(rows[name]) for name in ("main", "attention", "lit", "alpha")} == dict(main=4, attention=5, lit=6, alpha=7)
    text = " ".join(documents()[DOCUMENT].split())
    assert f"SRA ({wrong['sra']['flops_G']:.3f} G, printed as 4.0)" in text and f"{wrong['litv2_small_alpha10']['flops_G']} G" in text
    assert "{}, {} and {} M".format(*(wrong[name]["parameters_M"] for name in ("LIT-S", "LIT-M", "LIT-B"))) in text
    assert [f"{wrong[name]['bare_M']:.0f}" == wrong[name]["paper_M"] for name in ("LIT-S", "LIT-M", "LIT-B")] == [True] * 3
    convolution = 49 * 768**2  # 1 x 1, of the last stage's 49 cells, in both blocks of SRA and one of T-MSA
    with torch.device("meta"):
        sra, tmsa = (litv2_small(attention=name).flops() + count * convolution for name, count in (("sra", 2), ("t-msa", 1)))
    assert f"give {sra / 1e9:.3f}, and {tmsa / 1e9:.3f} for T-MSA" in TABLES["attention"].note
    first, last = rows["figure2"][0], rows["figure2"][-1]
    assert first["Lo-Fi_s2_G"] < first["Hi-Fi_s2_G"] and last["Lo-Fi_s2_G"] > last["Hi-Fi_s2_G"]  # as the paper's figure 2 says
    assert last["HiLo_s8_G"] < last["HiLo_s4_G"] < last["HiLo_s2_G"]
    hilo = rows["layers"][-1]
    assert (hilo["layer"], hilo["MFLOPs"], hilo["published_CPU"]) == ("HiLo", 298.3, 1029) and "cpu_ms" not in hilo

    page = (tmp_path / "paper.md").read_text()
    assert all(f"## {TABLES[name].title}\n" in page and TABLES[name].title in printed for name in COUNTED)
    assert "| sra | 32 | 31.636 | 4.0 | 3.92 | no |" in page and "![" in page
    pictures = {path.name for path in tmp_path.glob("*.png")}
    assert pictures == {f"paper-{name}.png" for name in ("alpha", "figure2", "figure3")}
    assert all(f"({name})" in page for name in pictures)
    assert all((tmp_path / f"paper-{name}.csv").read_text().count("\n") == len(rows[name]) + 1 for name in COUNTED)


def test_columns_are_of_their_models(monkeypatch, setting):
    """Models are timed together if they take images of one size, and each has its own figures, beside the published ones."""
    asked = []

    def measured(models, side, setting):
        asked.append((set(models), side))
        return {name: dict(images_per_s=side + len(name)) for name in models}

    monkeypatch.setattr(classifiers, "measured", measured)
    rows, draw = classifiers.main_table(setting)
    assert sorted(asked, key=lambda models: models[1]) == [({"litv2_small", "litv2_medium", "litv2_base"}, 224), ({"litv2_base_384"}, 384)]
    assert [row["images_per_s"] for row in rows] == [224 + 11, 224 + 12, 224 + 10, 384 + 14]
    assert [row["RTX3090_images_per_s"] for row in rows] == [1471, 812, 602, 198] and draw is not None


def test_measured(setting, tmp_path):
    """A training step holds activations that a forward pass frees, and more of them for more blocks."""
    models = {name: partial(tiny_model, num_classes=1000, depths=(1, 1, blocks, 1)) for name, blocks in (("shallow", 1), ("deep", 8))}
    columns = measuring.measured(models, 64, setting)
    assert all(own["images_per_s_p90"] >= own["images_per_s"] >= own["images_per_s_p10"] > 0 for own in columns.values())
    assert all(own["train_MiB"] > own["test_MiB"] >= 0 for own in columns.values())
    assert columns["deep"]["train_MiB"] > columns["shallow"]["train_MiB"]
    measuring.plot_measured([dict(model=name) | own for name, own in columns.items()], tmp_path / "bars.png")
    assert (tmp_path / "bars.png").stat().st_size > 5000


@pytest.mark.extra
@pytest.mark.parametrize("command", documented(DOCUMENT, r"python -m benchmarks\.paper attention --measure"), ids=str)
def test_models_are_measured(command, tmp_path, monkeypatch):
    run_here(monkeypatch, command, *"--batch-size 1 --rounds 1 --warm-up 0 --out".split(), tmp_path / "paper")
    rows = rows_of(tmp_path, "attention")
    assert all(row["images_per_s"] > 0 and row["train_MiB"] > row["test_MiB"] > 0 for row in rows)
    assert (tmp_path / "paper-attention.png").exists()
    assert "float32, batch size 1; MiB" in (tmp_path / "paper.md").read_text()
    published = [row["model"] for row in rows if row["RTX3090_images_per_s"]]
    assert (published, rows[-1]["RTX3090_train_GB"], rows[-1]["paper_top-1"]) == (["hilo"], 5.1, 82.0)


def test_figure3(monkeypatch, setting, tmp_path):
    """Each layer in inference and in training, at each resolution; training holds what the backward pass needs."""
    monkeypatch.setattr(layers, "QUICK_SIDES", ("5", "7"))
    rows, draw = layers.figure3(setting)
    assert [(row["side"], row["layer"]) for row in rows] == [(side, layer) for side in (5, 7) for layer in layers.RIVALS]
    assert all(row["training_MiB"] > row["inference_MiB"] > 0 and row["inference_images_per_s"] > 0 for row in rows)
    draw(rows, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 20_000


def test_layers_on_a_gpu_too(monkeypatch, setting, tmp_path):
    """Each device has its columns; here the second is invented."""
    asked = []

    def measured_rows(args):
        asked.append((args.device, args.modes, args.batch_size))
        costs = dict(layer="HiLo", MFLOPs=298.3, published_CPU=1029, published_RTX3090=5104)
        times = {f"eager_{column}": 10 * len(asked) for column in ("ms", "p10", "p90", "images_per_s", "MiB")}
        return [costs | times, costs | times | dict(layer="MSA", published_CPU=505)]

    monkeypatch.setattr(layers.attention, "measured_rows", measured_rows)
    monkeypatch.setattr(layers.attention, "device_name", str)  # there need not be one
    rows, draw = layers.layers_table(replace(setting, device="cuda", batch_size=3))
    assert asked == [("cpu", ["eager"], 3), ("cuda", ["eager"], 3)]
    assert (rows[1]["layer"], rows[1]["cpu_ms"], rows[1]["gpu_ms"]) == ("MSA", 10, 20)
    draw(rows, tmp_path / "layers.png")
    assert (tmp_path / "layers.png").stat().st_size > 5000


@pytest.mark.parametrize("command", documented(DOCUMENT, r"python -m benchmarks\.paper figure5 .*"), ids=str)
def test_figure5(command, tmp_path, monkeypatch):
    images = write_images(tmp_path / "images", dict(a=3))
    run_here(monkeypatch, command, "--out", tmp_path / "paper", files=dict(DIR=images))
    rows = rows_of(tmp_path, "figure5")
    assert {row["branch"] for row in rows} == {"Hi-Fi", "Lo-Fi"} and {row["images"] for row in rows} == {3}
    assert all(row["from_%"] <= row["share_%"] <= row["to_%"] and 0 < row["share_%"] < 100 for row in rows)
    assert (tmp_path / "paper-figure5.png").stat().st_size > 20_000 and "paper-figure5.png" in (tmp_path / "paper.md").read_text()


@pytest.mark.extra
@pytest.mark.parametrize("name", ["retinanet_litv2_s_fpn_1x_coco", "retinanet_litv2_s_fpn_1x_coco_ws_4", SEGMENTER])
def test_dense_counts(name):
    pytest.importorskip("mmdet")
    row = dense._counted(ZOO[name])
    assert (row["as_printed"], row["note"], row["window"]) == ("yes", None, 4 if name.endswith("4") else 2)


@pytest.mark.extra
def test_dense_speeds(monkeypatch, setting):
    pytest.importorskip("mmseg")
    monkeypatch.setitem(dense.SIZES, "segmentation", (64, 96))
    assert dense._speeds([ZOO[SEGMENTER]], setting)[SEGMENTER]["FPS"] > 0


def test_published_frames_per_second():
    """Those of the documents of detectors and segmenters, which say where they are from."""
    rows = [row for task in dense.SIZES for rows in tables(f"{task}/README.md") for row in rows if "FPS" in row]
    assert {row["configuration in configs/litv2"]: float(row["FPS"]) for row in rows} == dense.FPS
    assert set(dense.FPS) == {entry.name for entry in ZOO.values() if entry.config}


def test_windows(monkeypatch, setting, tmp_path):
    """Each detector's two windows are beside each other, and both tables are of one measurement."""
    counted = []

    def count(entry):
        counted.append(entry.name)
        return dict(model=entry.name, window=entry.window[2], parameters_M=38, paper_G=entry.gflops, flops_G=float(entry.gflops))

    monkeypatch.setattr(dense, "_counted", count)
    monkeypatch.setattr(dense, "_speeds", lambda entries, setting: {entry.name: dict(FPS=i + 1) for i, entry in enumerate(entries)})
    rows, _ = dense.detection_table(setting)
    assert {tuple(row) for row in rows} == {tuple(rows[0])}
    assert (rows[0]["paper_box AP"], rows[0]["paper_mask AP"], rows[6]["paper_mask AP"]) == (44.0, None, 40.8)
    found, draw = dense.windows_table(setting)
    assert len(found) == 6 and len(counted) == 12
    assert (found[3]["paper_mask AP_s2"], found[3]["paper_mask AP_s4"]) == (40.8, 40.7)
    assert (found[0]["model"], found[0]["flops_G_s2"], found[0]["flops_G_s4"]) == ("retinanet_litv2_s_fpn_1x_coco", 242.39, 230)
    assert (found[-1]["paper_G_s2"], found[-1]["paper_G_s4"], found[-1]["FPS_s2"], found[-1]["FPS_s4"]) == ("500", "449", 9, 12)
    draw(found, tmp_path / "windows.png")
    assert (tmp_path / "windows.png").stat().st_size > 5000


def call(monkeypatch, *words: object) -> None:
    monkeypatch.setattr(sys, "argv", ["paper", *map(str, words)])
    program.main()


def test_what_cannot_be_made_is_left_out(monkeypatch, tmp_path):
    """If all were asked for, with the reason; one that was named is an error."""
    missing = MissingPackage("mmdet is missing; pip install mmdet")
    monkeypatch.setattr(dense, "_counted", lambda entry: (_ for _ in ()).throw(missing))
    dense.dense_rows.cache_clear()
    monkeypatch.setattr(program, "TABLES", {name: entry for name, entry in TABLES.items() if name == "figure2" or name not in COUNTED})
    call(monkeypatch, "--out", tmp_path / "paper")
    page = (tmp_path / "paper.md").read_text()
    assert "Left out: windows, detection, segmentation. The reason: mmdet is missing" in page
    assert "Left out: figure5. " in page and TABLES["figure2"].title in page
    for name, words in (("detection", "pip install mmdet"), ("figure5", "--images DIR")):
        with pytest.raises(UserError, match=words):
            call(monkeypatch, name, "--out", tmp_path / "paper")
    assert not (tmp_path / "paper-detection.json").exists()


@pytest.mark.parametrize(
    "flags, words",
    [
        ("table9", "'table9', expected one of main, attention"),
        ("main --batch-size 0", "--batch-size: 0, expected at least 1"),
        ("main --device tpu", "argument --device: tpu: "),
    ],
)
def test_wrong_flags(flags, words, monkeypatch, capsys, tmp_path):
    with pytest.raises(SystemExit) as ended:
        call(monkeypatch, *flags.split(), "--out", tmp_path / "paper")
    assert ended.value.code == 2 and words in capsys.readouterr().err


def test_wrong_images(setting, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.png").write_bytes(b"no image")
    checkpoint = str(ROOT / "examples/litv2_imagenette.safetensors")
    for path, words in (("empty", "no images"), ("absent", "there is no such image"), ("broken.png", "broken.png")):
        with pytest.raises(UserError, match=words):
            TABLES["figure5"].make(replace(setting, images=(tmp_path / path,), checkpoint=checkpoint))
