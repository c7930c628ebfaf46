# SPDX-License-Identifier: Apache-2.0
"""The commands of the trainer's document, run with a smaller model, a shorter schedule and small images, which --opts append."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import pytest
import torch
import yaml

from coco_to_csv import main as coco_to_csv
from command_helpers import free_port, put_download, run, run_here
from document_helpers import Command, documented
from helpers import FAST, write_images
from litv2 import LITv2
from litv2.errors import UserError

DOCUMENT = "classification/README.md"
TINY = dict(patch_size=2, embed_dim=16, depths=(1, 1, 1, 1), num_heads=(1, 2, 4, 8))  # of FAST


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("images")
    write_images(root / "train", {"a": 9, "b": 9}, size=32)
    write_images(root / "val", {"a": 3, "b": 1}, size=32)
    return root


def weights_for(class_index: int) -> dict:
    """Of a model that finds this class in every image."""
    model = LITv2(num_classes=2, **TINY)
    weights = model.state_dict()
    weights["head.weight"].zero_()
    weights["head.bias"].copy_(torch.eye(2)[class_index])
    return dict(model=weights)


def smaller(command: Command, output: Path, *more: str) -> list[str]:
    pairs = [*FAST, "OUTPUT", str(output), *"DATA.IMG_SIZE 32 DATA.BATCH_SIZE 4 DATA.NUM_WORKERS 0 DEVICE cpu".split(), *more]
    return pairs if "--opts" in command.words else ["--opts", *pairs]


def finished(output: Path) -> tuple[dict, str]:
    """The last checkpoint and the log of a training that has left what the document promises."""
    folder = output / "litv2_small/default"
    names = {path.name for path in folder.iterdir()}
    assert names >= {"latest.pth", "best.pth", "log_rank0.txt", "metrics.jsonl", "config.yaml", "curves.png", "predictions.png"}
    state = torch.load(folder / "latest.pth", weights_only=True)
    assert state["progress"]["epoch"] == 2 and state["class_names"] == ["a", "b"]
    return state, (folder / "log_rank0.txt").read_text()


@pytest.mark.parametrize("command", documented(DOCUMENT, r"python main\.py .* --data-path DIR --batch-size 64"), ids=str)
def test_from_scratch(command, images, tmp_path, monkeypatch):
    run_here(monkeypatch, command, *smaller(command, tmp_path), files=dict(DIR=images))
    _, log = finished(tmp_path)
    assert len(re.findall(r"Train: \[[01]/2\]", log)) == 2 * 4


@pytest.mark.extra
@pytest.mark.parametrize("command", documented(DOCUMENT, r"torchrun --standalone .* --nproc-per-node=8 main\.py .*"), ids=str)
def test_eight_processes(command, images, tmp_path):
    """With two in the place of eight."""
    done = run(command, *smaller(command, tmp_path), files={"DIR": images, "8": 2})
    _, log = finished(tmp_path)
    assert "2 x cpu" in log and (tmp_path / "litv2_small/default/log_rank1.txt").is_file(), done.stdout


@pytest.mark.parametrize("command", documented(DOCUMENT, r"python main\.py .* --pretrained FILE --opts .*"), ids=str)
def test_fine_tuning(command, images, tmp_path, monkeypatch):
    """From weights for other classes."""
    torch.save(dict(model=LITv2(num_classes=7, **TINY).state_dict()), tmp_path / "mine.pth")
    run_here(monkeypatch, command, *smaller(command, tmp_path), files=dict(DIR=images, FILE=tmp_path / "mine.pth"))
    _, log = finished(tmp_path)
    assert "head is newly initialised: it has 7 outputs in the file, but 2 in this model" in log


@pytest.mark.parametrize("command", documented(DOCUMENT, r"python main\.py .* --freeze head +--opts .*"), ids=str)
def test_own_data(command, images, tmp_path, monkeypatch):
    model = LITv2(num_classes=2, **TINY)
    torch.save(dict(model=model.state_dict(), class_names=["b", "c"]), tmp_path / "mine.pth")
    run_here(monkeypatch, command, *smaller(command, tmp_path), files=dict(DIR=images, FILE=tmp_path / "mine.pth"))
    state, log = finished(tmp_path)
    assert "1 of 2 classes keep their rows of the head; new: a" in log and "frozen: all but the head" in log
    assert torch.equal(state["model"]["norm.weight"], model.norm.weight) and state["config"]["TRAIN"]["UNFREEZE_EVERY"] == 5
    assert not torch.equal(state["model"]["head.weight"], model.head.weight)


@pytest.mark.parametrize("command", documented(DOCUMENT, r"python main\.py .* --opts DISTILL\.TEACHER FILE .*"), ids=str)
def test_teacher(command, images, tmp_path, monkeypatch):
    """Of twice the width."""
    torch.save(dict(model=LITv2(num_classes=2, **{**TINY, "embed_dim": 32}).state_dict()), tmp_path / "teacher.pth")
    run_here(monkeypatch, command, *smaller(command, tmp_path), files=dict(DIR=images, FILE=tmp_path / "teacher.pth"))
    _, log = finished(tmp_path)
    assert f"teacher {tmp_path / 'teacher.pth'}: 1." in log


@pytest.mark.extra
@pytest.mark.parametrize("command", documented(DOCUMENT, r"torchrun --nproc-per-node=2 main\.py .* --amp bf16 --ema-decay .*"), ids=str)
def test_two_processes_in_mixed_precision(command, images, tmp_path):
    run(command, *smaller(command, tmp_path), files=dict(DIR=images), PET_MASTER_PORT=free_port())
    state, log = finished(tmp_path)
    assert "2 x cpu" in log and "mixed precision: bfloat16" in log
    assert any(not torch.equal(value, state["ema"][name]) for name, value in state["model"].items())


@pytest.mark.parametrize("command", documented(DOCUMENT, r"python main\.py .* --opts TRAIN\.OPTIMIZER\.NAME .*"), ids=str)
def test_another_optimizer_and_schedule(command, images, tmp_path, monkeypatch):
    run_here(monkeypatch, command, *smaller(command, tmp_path), files=dict(DIR=images))
    state, _ = finished(tmp_path)
    assert all("momentum_buffer" in entry for entry in state["optimizer"]["state"].values())
    train = yaml.safe_load((tmp_path / "litv2_small/default/config.yaml").read_text())["TRAIN"]
    assert (train["OPTIMIZER"]["NAME"], train["LR_SCHEDULER"]["NAME"]) == ("sgd", "step")


@pytest.mark.parametrize("command", documented(DOCUMENT, r"python main\.py .* --eval"), ids=str)
def test_evaluation(command, images, tmp_path, monkeypatch, capsys):
    """Three of the four images are of class 0, which FILE finds in all; the published weights, where a download would put them, class 1."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    put_download(tmp_path, "litv2_s.pth", weights_for(1))
    torch.save(weights_for(0), tmp_path / "mine.pth")
    run_here(monkeypatch, command, *smaller(command, tmp_path), files=dict(DIR=images, FILE=tmp_path / "mine.pth"))
    right = "75.0" if "FILE" in command.words else "25.0"
    printed = capsys.readouterr().out
    assert f" * Acc@1 {right}00 Acc@5 100.000\n" in printed and f"network on the 4 test images: {right}%\n" in printed


@pytest.fixture(scope="module")
def coco(tmp_path_factory) -> Path:
    """Two splits of three images: an owl and two cats, a cat, and none; the category dog has no object."""
    root = tmp_path_factory.mktemp("coco")
    (root / "annotations").mkdir()
    categories = [dict(id=i, name=name, supercategory="animal") for i, name in ((3, "owl"), (1, "cat"), (7, "dog"))]
    boxes = [dict(image_id=10, category_id=category) for category in (3, 1, 1)] + [dict(image_id=11, category_id=1)]
    files = [dict(id=10 + i, file_name=f"a/{i}.png") for i in range(3)]
    for split in ("train", "val"):
        write_images(root / f"{split}2017", {"a": 3}, size=32)
        content = dict(images=files, annotations=boxes, categories=categories)
        (root / f"annotations/instances_{split}2017.json").write_text(json.dumps(content))
    return root


@pytest.mark.parametrize("command", documented(DOCUMENT, r"python coco_to_csv\.py .*"), ids=str)
def test_tables_of_coco(command, coco, monkeypatch, capsys):
    files = {word: str(coco) + word.removeprefix("DIR") for word in command.words if word.startswith("DIR/")}
    run_here(monkeypatch, command, files=files)
    split = "train" if "DIR/train.csv" in command.words else "val"
    table = (coco / f"{split}.csv").read_text().splitlines()
    rows = [f"{split}2017/a/{i}.png,{cells}" for i, cells in enumerate(("1,0,1", "1,0,0", "0,0,0"))]
    assert table == ["image,cat,dog,owl", *rows] and "3 images, 3 classes, 1.00 per image" in capsys.readouterr().out
    run_here(monkeypatch, command, "--supercategories", "--out", coco / "groups.csv", files=files)
    assert (coco / "groups.csv").read_text().splitlines()[::2] == ["image,animal", f"{split}2017/a/1.png,1"]


@pytest.mark.parametrize(
    "content, words",
    [
        ("[]", "is not a COCO annotation file"),
        ('{"images": [{"id": 1}], "annotations": [], "categories": []}', "is not a COCO file of instances: KeyError 'file_name'"),
        ('{"images": [{"id": 1, "file_name": 5}], "annotations": [], "categories": []}', "is not a COCO file of instances: TypeError"),
        ('{"images": [], "annotations": [], "categories": [{"id": 1, "name": "labels"}]}', "category labels, which is the name"),
    ],
)
def test_wrong_annotations(content, words, tmp_path):
    (tmp_path / "wrong.json").write_text(content)
    with pytest.raises(UserError, match=words):
        coco_to_csv([str(tmp_path / "wrong.json"), "--images", str(tmp_path / "train"), "--out", str(tmp_path / "train.csv")])
    with pytest.raises(UserError, match="must lie below"):
        coco_to_csv([str(tmp_path / "wrong.json"), "--images", str(tmp_path), "--out", str(tmp_path / "train/train.csv")])


@pytest.mark.parametrize("command", documented(DOCUMENT, r"python main\.py .* --pretrained \S+ --opts .* MODEL\.TASK multi"), ids=str)
def test_several_classes_per_image(command, coco, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    put_download(tmp_path, "litv2_s.pth", weights_for(1))
    for split in ("train", "val"):
        (coco / f"{split}.csv").write_text(f"image,labels\n{split}2017/a/0.png,cat|dog\n{split}2017/a/1.png,\n")
    run_here(monkeypatch, command, *smaller(command, tmp_path), files=dict(DIR=coco))
    assert re.search(r"best mAP  \d+\.\d+ %", capsys.readouterr().out)
    summary = json.loads((tmp_path / "litv2_small/default/report/summary.json").read_text())
    assert (summary["images"], summary["classes"], summary["classes_per_image"]) == (2, 2, 1)


@pytest.mark.extra
@pytest.mark.parametrize("command", documented(DOCUMENT, r"python main\.py .* MODEL\.TASK multi AUG\.SCALE .*"), ids=str)
def test_canvases(command, tmp_path, monkeypatch, capsys):
    """After the command that makes them, and on the first images of each table."""
    (preparation,) = documented(DOCUMENT, r"python digits_to_csv\.py DIR")
    run_here(monkeypatch, preparation, files=dict(DIR=tmp_path))
    for split, count in (("train", 1200), ("val", 400)):
        lines = (tmp_path / f"{split}.csv").read_text().splitlines()
        shown = [set(filter(None, row["labels"].split("|"))) for row in csv.DictReader(lines)]
        assert len(shown) == count and {len(digits) for digits in shown} == {0, 1, 2, 3, 4} and set().union(*shown) == set("0123456789")
        (tmp_path / f"{split}.csv").write_text("\n".join(lines[:101]) + "\n")
    run_here(monkeypatch, command, *smaller(command, tmp_path, "DATA.BATCH_SIZE", "20"), files=dict(DIR=tmp_path))
    assert "100 of validation, 10 classes" in capsys.readouterr().out


@pytest.mark.parametrize("command", documented(DOCUMENT, r"python main\.py .* --eval (--crops|--corruptions).*"), ids=str)
def test_views_and_corruptions(command, images, tmp_path, monkeypatch, capsys):
    """Whatever the view and, here, the corruption: FILE finds class 0 in every image. One kind and one severity of 15 and 5."""
    torch.save(weights_for(0), tmp_path / "mine.pth")
    few = ["TEST.SEVERITIES", "[3]", "TEST.CORRUPTIONS", "contrast"] if "--corruptions" in command.words else []
    run_here(monkeypatch, command, *smaller(command, tmp_path, *few), files=dict(DIR=images, FILE=tmp_path / "mine.pth"))
    printed = capsys.readouterr().out
    assert " * Acc@1 75.000 Acc@5 100.000\n" in printed
    if few:
        assert "mean top-1 error under corruption 25.00 % (without 25.00 %)" in printed
    else:
        assert "mean probabilities over 20 views of each image" in printed


@pytest.mark.parametrize("command", documented(DOCUMENT, r"python main\.py .* --class-map imagenet .*"), ids=str)
def test_some_of_imagenets_classes(command, tmp_path, monkeypatch, capsys):
    """FILE finds a goldfish in every image; the second of the folders has one."""
    write_images(tmp_path / "imagenet-a", {"n01440764": 3, "n01443537": 1, "n15075141": 1}, size=32)
    model = LITv2(num_classes=1000, **TINY)
    torch.nn.init.zeros_(model.head.weight)
    model.head.bias.data.copy_(torch.eye(1000)[1])
    torch.save(model.state_dict(), tmp_path / "mine.pth")
    more = smaller(command, tmp_path / "out", "DATA.VAL_SPLIT", "imagenet-a")
    run_here(monkeypatch, command, *more, files=dict(DIR=tmp_path, FILE=tmp_path / "mine.pth"))
    assert " * Acc@1 20.000 Acc@5 100.000\n" in capsys.readouterr().out


@pytest.mark.parametrize("command", documented(DOCUMENT, r"python main\.py .* --throughput .*"), ids=str)
def test_throughput(command, tmp_path, monkeypatch, capsys):
    run_here(monkeypatch, command, *smaller(command, tmp_path))
    result = json.loads((tmp_path / "litv2_small/default/throughput.json").read_text())
    assert result["batch_size"] == 4 and result["images_per_second"] > 0 and "images_per_second" in capsys.readouterr().out


@pytest.mark.extra
@pytest.mark.parametrize("command", documented(DOCUMENT, r"python convert_onnx\.py .*"), ids=str)
def test_conversion(command, tmp_path, monkeypatch):
    """A graph for 64 images of standard operators alone; test_release.py runs it."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    torch.save(weights_for(0), tmp_path / "mine.pth")
    more = ["--out", tmp_path / "litv2_small.onnx", "--opts", *FAST, "DATA.IMG_SIZE", 32]
    run_here(monkeypatch, command, *more, files=dict(FILE=tmp_path / "mine.pth"))
    graph = onnx.load(tmp_path / "litv2_small.onnx").graph
    assert [size.dim_value for size in graph.input[0].type.tensor_type.shape.dim] == [64, 3, 32, 32]
    assert json.loads((tmp_path / "litv2_small.onnx.parity.json").read_text())["passed"]
    assert "DeformConv" not in {node.op_type for node in graph.node}
