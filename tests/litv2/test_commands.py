# SPDX-License-Identifier: Apache-2.0
"""python -m litv2, as a user runs it."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from helpers import ROOT, SHARED, TINY, max_difference, normal, run_trainer, shared, tiny_model, write_images
from litv2 import LITv2
from litv2.__main__ import COMMANDS, main
from litv2.errors import UserError
from litv2.factory import load_model
from litv2.preprocess import evaluation_size
from litv2.weights.architecture import infer_arguments
from litv2.weights.reading import read_checkpoint
from litv2.weights.releases import ZOO, release_of
from litv2.weights.state_dict import find_weights, load_weights

NAMES = [f"animal {i}" for i in range(10)]


def run(*arguments, cwd: Path, check: bool = True) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "TORCH_HOME": str(cwd / "home")}
    command = [sys.executable, "-m", "litv2", *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120)
    assert not check or done.returncode == 0, done.stderr
    return done


def fails(capsys, *arguments) -> str:
    """The one line of an error, of a command run in this process."""
    assert main([str(argument) for argument in arguments]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("error: ") and not any("Traceback" in line for line in lines)
    return lines[0]


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))


@pytest.fixture
def ours(tmp_path) -> Path:
    """A checkpoint as the trainer writes it, with a moving average."""
    plain, average = LITv2(**TINY).state_dict(), tiny_model().state_dict()
    lit = dict(EMBED_DIM=32, DEPTHS=[1, 1, 2, 1], NUM_HEADS=[1, 2, 4, 8], LOCAL_WS=[0, 0, 2, 1], IN_CHANS=3)
    config = dict(MODEL=dict(LIT=lit), DATA=dict(IMG_SIZE=64), TEST=dict(CROP=True, IMG_SIZE=0))
    content = dict(model=plain, ema=average, optimizer=dict(state={}), epoch=3, class_names=NAMES, config=config)
    torch.save(content, tmp_path / "ours.pth")
    return tmp_path / "ours.pth"


def test_list(tmp_path):
    lines = run("list", cwd=tmp_path).stdout.splitlines()
    assert [line.split()[0] for line in lines[1:27]] == list(ZOO)
    assert lines[27:29] == ["", lines[28]] and "26 files" in lines[28]
    assert "retinanet_litv2_s_fpn_1x_coco_ws_4  detection       small    0.9    0 0 4 1  800x1333  box AP 43.7" in "\n".join(lines)


def test_list_of_a_task(capsys):
    assert main(["list", "--task", "segmentation", "--urls"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 7 and all("https://" in line for line in lines[1:4])


def test_wrong_command_lines(capsys, tmp_path):
    for line, message in (("", "COMMAND"), ("lst", "invalid choice"), ("list --tas detection", "unrecognized"), ("info", "FILE")):
        with pytest.raises(SystemExit) as stop:
            main(line.split())
        assert stop.value.code == 2 and message in capsys.readouterr().err
    text = run("--help", cwd=tmp_path).stdout
    assert all(f"    {name}" in text for name in COMMANDS)


def test_download(tmp_path, capsys):
    """What is in the folder already needs no network; each failure is one line, and the others are done."""
    folder = tmp_path / "home/hub/checkpoints"
    folder.mkdir(parents=True)
    torch.save({"model": {"a": torch.zeros(1)}}, folder / "litv2_m.pth")
    done = run("download", "litv2_smal", "litv2_medium", "http://127.0.0.1:9/x.pth", cwd=tmp_path, check=False)
    assert done.returncode == 1 and done.stdout.splitlines() == [f"litv2_medium  0.0 MB  {folder / 'litv2_m.pth'}"]
    errors = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert len(errors) == 2 and "similar names: litv2_small" in errors[0]
    assert f"put the file at {folder / 'x.pth'}" in errors[1] and "http://127.0.0.1:9/x.pth" in errors[1]


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_round_trip_of_the_releases_format(suffix, tmp_path):
    """pth -> safetensors -> pth: every bit, and the model's numbers."""
    if suffix == "safetensors":
        pytest.importorskip("safetensors")
    source = shared("golden/classification_format.pth")
    if suffix == "safetensors":
        run("convert", source, f"one.{suffix}", cwd=tmp_path)
    else:
        assert main(["convert", str(source), f"one.{suffix}"]) == 0
    assert main(["convert", f"one.{suffix}", "two.pth"]) == 0
    first, second = find_weights(read_checkpoint(source)), find_weights(read_checkpoint("two.pth"))
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[key]) and value.dtype == second[key].dtype for key, value in first.items())
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([f"one.{suffix}", "two.pth"])
    content = read_checkpoint("two.pth")
    assert content["epoch"] == 299 and content["config"]["MODEL"]["LIT"]["EMBED_DIM"] == 96 and "optimizer" not in content
    model = LITv2(**infer_arguments(second, content["config"])[0])
    assert load_weights(model, second) == []
    images = normal(0, 2, 3, 64, 64)
    assert max_difference(model.eval()(images), tiny_model().eval()(images)) < 1e-5


def test_which_weights(ours, capsys):
    states = read_checkpoint(ours)
    for flags, entry in (([], "ema"), (["--weights", "ema"], "ema"), (["--weights", "model"], "model")):
        assert main(["convert", str(ours), "out.pth", "--force", *flags]) == 0
        weights = read_checkpoint("out.pth")["model"]
        assert all(torch.equal(value, states[entry][key]) for key, value in weights.items())
        assert read_checkpoint("out.pth")["class_names"] == NAMES
    assert "no moving average" in fails(capsys, "convert", "out.pth", "other.pth", "--weights", "ema")
    assert not Path("other.pth").exists()


def test_heads(ours, tmp_path):
    """Of a classifier the Linear, of a detector everything but the backbone."""
    assert main(["convert", str(ours), "headless.pth", "--head", "drop"]) == 0
    model = LITv2(**{**TINY, "num_classes": 0})
    assert load_weights(model, find_weights(read_checkpoint("headless.pth"))) == []
    detector = {f"module.backbone.{key}": value for key, value in model.state_dict().items()} | {"module.neck.weight": torch.ones(2)}
    meta = dict(epoch=12, dataset_meta=dict(classes=("cat", "dog")))
    torch.save(dict(state_dict=detector, meta=meta), "detector.pth")
    assert main(["convert", "detector.pth", "whole.pth"]) == 0
    content = read_checkpoint("whole.pth")
    assert set(content["state_dict"]) == {key.removeprefix("module.") for key in detector} and content["class_names"] == ["cat", "dog"]
    assert main(["convert", "detector.pth", "backbone.pth", "--head", "drop"]) == 0
    assert set(read_checkpoint("backbone.pth")["model"]) == set(model.state_dict())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_convert_to_half_precision(ours, capsys, dtype):
    """Half the size, rounded once; the model that is loaded from it computes in float32."""
    assert main(["convert", str(ours), "half.safetensors", "--dtype", str(dtype).removeprefix("torch.")]) == 0
    expected = {key: value.to(dtype).float() if value.is_floating_point() else value for key, value in tiny_model().state_dict().items()}
    loaded = load_model("half.safetensors")
    assert Path("half.safetensors").stat().st_size < 0.55 * sum(4 * value.numel() for value in expected.values())
    for key, value in loaded.model.state_dict().items():
        torch.testing.assert_close(value, expected[key], rtol=0, atol=0)
    torch.save(dict(model={"a": torch.tensor([1e6])}), "large.pth")
    assert "a has values up to 1e+06, too large for torch.float16" in fails(capsys, "convert", "large.pth", "o.pth", "--dtype", "float16")


def test_convert_leaves_paths_of_the_machine_behind(ours):
    """Everything else of the configuration stays, and so does what a file says that has none or an odd one."""
    content = torch.load(ours, weights_only=True)
    expected = copy.deepcopy(content["config"])
    content["config"]["DATA"]["DATA_PATH"] = content["config"]["MODEL"]["PRETRAINED"] = content["config"]["OUTPUT"] = "/secret/folder"
    torch.save(content, ours)
    for name in ("clean.safetensors", "clean.pth"):
        assert main(["convert", str(ours), name]) == 0
        assert b"/secret" not in Path(name).read_bytes() and read_checkpoint(name)["config"] == expected
    torch.save({**content, "config": {"DATA": "/odd", "MODEL": None}}, ours)
    assert main(["convert", str(ours), "odd.pth"]) == 0 and read_checkpoint("odd.pth")["config"] == {"DATA": "/odd", "MODEL": None}


def test_convert_writes_whole_or_not_at_all(ours, tmp_path, capsys):
    Path("out.pth").write_text("precious")
    assert "use --force to overwrite" in fails(capsys, "convert", ours, "out.pth")
    assert "must end in" in fails(capsys, "convert", ours, "out.onnx")
    assert "the folder nowhere does not exist" in fails(capsys, "convert", ours, "nowhere/out.pth")
    (tmp_path / "bad.pth").write_bytes(ours.read_bytes()[:-1000])
    assert "bad.pth" in fails(capsys, "convert", "bad.pth", "out.pth", "--force")
    with pytest.warns(UserWarning, match="ComplexHalf"):
        torch.save({"model": {"a": torch.zeros(3, dtype=torch.complex32)}}, "odd.pth")
    assert "complex32" in fails(capsys, "convert", "odd.pth", "odd.safetensors")
    assert Path("out.pth").read_text() == "precious"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.pth", "odd.pth", "ours.pth", "out.pth"]


def test_convert_leaves_out_what_explodes(capsys):
    """A configuration whose lists share their parts: small in the file, endless in JSON."""
    laughs: list = []
    for _ in range(60):
        laughs = [laughs, laughs]
    torch.save(dict(model=tiny_model().state_dict(), config=dict(laughs=laughs), epoch=torch.zeros(1)), "laughs.pth")
    assert main(["convert", "laughs.pth", "out.pth"]) == 0
    out = capsys.readouterr().out
    assert "not kept: config (longer than" in out and "not kept: epoch" in out
    assert set(read_checkpoint("out.pth")) == {"model"}


def test_info(ours, capsys):
    assert main(["info", str(ours)]) == 0
    out = capsys.readouterr().out
    rows = dict(line.split("  ", 1) for line in out.splitlines())
    rows = {key: value.strip() for key, value in rows.items()}
    parameters = sum(parameter.numel() for parameter in LITv2(**TINY).parameters())
    assert rows["parameters"] == f"{parameters / 1e6:.3f} M" and rows["epoch"] == "3"
    assert rows["classes"] == "10: animal 0, animal 1, animal 2, animal 3, animal 4 ..."
    assert rows["weights"].startswith("107 tensors, the moving average") and rows["dtype"] == "float32, int64"
    assert rows["windows"] == "0 0 2 1 (from the file's configuration)" and rows["heads"] == "1 2 4 8; alpha 0.9"


def test_info_of_published_shapes(tmp_path, capsys):
    """A published model's file, with weights that take no time to make."""
    state = {key: torch.zeros(value.shape, dtype=value.dtype) for key, value in _meta("litv2_small_alpha05").items()}
    torch.save(dict(model=state), "alpha_0.5.pth")
    assert main(["info", "alpha_0.5.pth"]) == 0
    out = capsys.readouterr().out
    assert "27.844 M" not in out and "LITv2-S (96 channels, blocks 2 2 6 2)" in out and "alpha 0.5" in out
    assert "litv2_small_alpha05: top-1 81.88 at 224x224" in out
    Path("alpha_0.5.pth").rename("unknown.pth")
    assert main(["info", "unknown.pth"]) == 0
    assert "shaped like  litv2_small_alpha05" in capsys.readouterr().out


def _meta(name: str) -> dict:
    from litv2.factory import create_model

    with torch.device("meta"):
        return create_model(name).state_dict()


def test_info_of_other_files(capsys):
    torch.save({"weight": torch.zeros(3)}, "other.pth")
    assert main(["info", "other.pth"]) == 0
    assert "unknown: these are not the weights of a LITv2" in capsys.readouterr().out
    Path("page.pth").write_text("<html></html>")
    assert "web page" in fails(capsys, "info", "page.pth")
    assert "no checkpoint at nowhere.pth" in fails(capsys, "info", "nowhere.pth")


def test_info_of_a_training_run_of_mmengine(capsys):
    """Its history of losses holds numpy arrays."""
    logging = pytest.importorskip("mmengine.logging")
    hub = logging.MessageHub.get_instance("commands")
    hub.update_scalar("train/loss", 1.5)
    weights = {f"backbone.{key}": value for key, value in tiny_model(num_classes=0).state_dict().items()}
    torch.save(dict(meta=dict(epoch=2), state_dict=weights, message_hub=hub.state_dict()), "run.pth")
    assert main(["info", "run.pth"]) == 0
    out = capsys.readouterr().out
    assert "message_hub" in out and "custom LITv2 (32 channels, blocks 1 1 2 1)" in out


def test_predict(ours, tmp_path):
    """Names and confidences are those of the model itself; pictures are written; an image that cannot be read is one line."""
    from litv2.preprocess import evaluation_transform

    images = write_images(tmp_path / "images", {"a": 2, "b": 2}, size=90)
    (images / "a/bad.jpg").write_text("no image")
    Image.fromarray(np.zeros((30, 500), np.uint8)).save(images / "b/wide grey.png")
    paths = [*sorted(images.glob("a/*")), *sorted(images.glob("b/*"))]
    done = run("predict", *paths, "--checkpoint", ours, "--out", "drawn", cwd=tmp_path, check=False)
    assert done.returncode == 1
    errors = done.stderr.splitlines()
    assert errors == [
        f"error: {images}/a/bad.jpg cannot be read as an image: cannot identify image file",
        "1 of 6 images cannot be read and are left out",
    ]
    lines = done.stdout.splitlines()
    assert len(lines) == 5 * 6
    model = tiny_model().eval()  # the moving average
    transform = evaluation_transform(64)
    for i, path in enumerate([images / "a/0.png", images / "a/1.png", images / "b/0.png", images / "b/1.png", images / "b/wide grey.png"]):
        with torch.inference_mode():
            confidence = model(transform(Image.open(path).convert("RGB"))[None])[0].softmax(0)
        order = confidence.argsort(descending=True)[:5].tolist()
        assert lines[6 * i].startswith(f"{path} -> drawn/")
        assert lines[6 * i + 1 : 6 * i + 6] == [f"  {confidence[j]:7.2%}  {NAMES[j]}" for j in order]
    pictures = sorted(path.name for path in (tmp_path / "drawn").iterdir())
    assert pictures == ["0-2.png", "0.png", "1-2.png", "1.png", "wide grey.png"]
    drawn, original = Image.open(tmp_path / "drawn/0.png"), Image.open(images / "a/0.png")
    left = np.asarray(drawn.crop((0, 0, 360, 360)).resize((9, 9)), float) - np.asarray(original.resize((9, 9)), float)
    assert drawn.size == (780, 360) and np.abs(left).mean() < 8
    assert len(np.unique(np.asarray(drawn)[:, 360:].reshape(-1, 3), axis=0)) > 10  # text and bars


def test_predict_without_a_checkpoint(tmp_path, capsys, monkeypatch):
    """The small classifier of the repository is taken, which an installed package does not have."""
    import litv2.commands

    image = str(write_images(tmp_path / "images", {"a": 1}) / "a/0.png")
    assert main(["predict", image]) == 0
    printed = capsys.readouterr()
    assert printed.err.startswith("note: without --checkpoint: the small classifier of ten classes, ") and printed.out.count("%  ") == 5
    monkeypatch.setattr(litv2.commands, "SMALL", tmp_path / "absent")
    assert "pass another with --checkpoint" in fails(capsys, "predict", image)


def test_predict_says_what_is_wrong(ours, tmp_path, capsys):
    image = write_images(tmp_path / "images", {"a": 1}) / "a/0.png"
    assert "another variant" in fails(capsys, "predict", image, "--checkpoint", ours, "--model", "litv2_small")
    assert "similar names: litv2_base" in fails(capsys, "predict", image, "--checkpoint", ours, "--model", "litv2_bas")
    for side in ("16", "0"):
        assert "at least 32" in fails(capsys, "predict", image, "--checkpoint", ours, "--img-size", side)
    assert "--device nowhere: " in fails(capsys, "predict", image, "--checkpoint", ours, "--device", "nowhere")
    torch.save(read_checkpoint(ours) | dict(class_names=["one"]), "names.pth")
    assert "lists 1 class names, but its classifier has 10" in fails(capsys, "predict", image, "--checkpoint", "names.pth")
    torch.save(dict(model=tiny_model(num_classes=0).state_dict()), "headless.pth")
    assert "no classifier" in fails(capsys, "predict", image, "--checkpoint", "headless.pth")


def test_what_a_file_does_not_tell_is_said(ours, tmp_path, capsys):
    """Bare weights have neither windows nor the size of images: what is assumed is said, and what the file has is not."""
    image = write_images(tmp_path / "images", {"a": 1}) / "a/0.png"
    torch.save(dict(model=tiny_model(local_ws=(0, 0, 4, 1)).state_dict()), "bare.pth")
    assert main(["predict", str(image), "--checkpoint", "bare.pth", "--img-size", "64"]) == 0
    windows, size = capsys.readouterr().err.splitlines()
    assert windows == "note: bare.pth does not state its heads and windows; assuming 1 2 4 8 and 0 0 2 1, as published"
    assert size.startswith("note: bare.pth does not state its image size; assuming 224")
    assert main(["predict", str(image), "--checkpoint", str(ours)]) == 0
    assert capsys.readouterr().err == ""
    arguments = ["--format", "torch-export", "--img-size", "64", "--dynamic", "--out", "bare.pt2"]
    assert main(["export", "bare.pth", *arguments]) == 0
    assert capsys.readouterr().err.splitlines() == [windows, size]


@pytest.mark.parametrize(
    "name, config, expected",
    [
        ("a.pth", dict(DATA=dict(IMG_SIZE=64), TEST=dict(CROP=True, IMG_SIZE=0)), (64, True)),
        ("a.pth", dict(DATA=dict(IMG_SIZE=64), TEST=dict(CROP=False, IMG_SIZE=96)), (96, False)),
        ("a.pth", dict(DATA=dict(IMG_SIZE=64)), (64, True)),
        ("a.pth", dict(DATA=dict(IMG_SIZE="large")), None),
        ("a.pth", dict(DATA=dict(IMG_SIZE=float("inf"))), None),
        ("a.pth", ["no configuration"], None),
        ("a.pth", None, None),
        ("litv2_base_384", None, (384, False)),
        ("folder/litv2_b_384.pth", dict(DATA=dict(IMG_SIZE=64)), (384, False)),
        ("https://example.org/litv2_s.pth", None, (224, True)),
    ],
)
def test_size_of_evaluation_images(name, config, expected):
    assert evaluation_size(config, release_of(name)) == expected


def test_a_checkpoint_does_not_choose_the_memory():
    with pytest.raises(UserError, match="images of more than 2048 pixels on a side"):
        evaluation_size(dict(DATA=dict(IMG_SIZE=10**400)))


def test_predict_and_export_agree_on_the_size(ours):
    """The published file's name counts for both, and the checkpoint's configuration where there is none."""
    from litv2.commands.export import _network

    for path, size in ((ours, 64), (ours.with_name("litv2_b_384.pth"), 384)):
        path.write_bytes(ours.read_bytes())
        assert load_model(path).image_size == size
        assert _network(str(path), None, backbone=False)[1] == (size, size)


def test_a_bug_keeps_its_traceback(monkeypatch):
    def broken(args):
        raise ValueError("not the user's")

    monkeypatch.setattr("litv2.commands.list.run", broken)
    with pytest.raises(ValueError, match="not the user's"):
        main(["list"])


def test_predict_with_imagenets_classes(capsys):
    """1000 classes without names are ImageNet's; WordNet's identifiers become words."""
    image = next((SHARED / "data/imagenette_mini/val/n01440764").glob("*")) if shared("data/imagenette_mini") else None
    torch.save(dict(model=tiny_model(num_classes=1000).state_dict()), "thousand.pth")
    assert main(["predict", str(image), "--checkpoint", "thousand.pth", "--img-size", "64"]) == 0
    words = capsys.readouterr().out.splitlines()[1:]
    from timm.data import ImageNetInfo

    imagenet = ImageNetInfo()
    known = {imagenet.index_to_description(i) for i in range(1000)}
    assert len(words) == 5 and all(line.split("%  ")[1] in known for line in words)
    identifiers = "n01440764 n02102040 n02979186 n03000684 n03028079 n03394916 n03417042 n03425413 n03445777 n03888257".split()
    torch.save(dict(model=tiny_model().state_dict(), class_names=identifiers), "nette.pth")
    assert main(["predict", str(image), "--checkpoint", "nette.pth", "--img-size", "64"]) == 0
    out = capsys.readouterr().out
    assert {line.split("%  ")[1] for line in out.splitlines()[1:]} <= known


@pytest.mark.extra
def test_the_trainer_takes_names_of_the_zoo(tmp_path):
    """--pretrained NAME, from the folder of downloads."""
    folder = tmp_path / "home/hub/checkpoints"
    folder.mkdir(parents=True)
    model = LITv2(num_classes=7, patch_size=2, embed_dim=16, depths=(1, 1, 1, 1), num_heads=(1, 2, 4, 8))
    torch.save(dict(model=model.state_dict()), folder / "litv2_s.pth")
    done = run_trainer("--pretrained", "litv2_small", "--output", tmp_path / "out", opts="TRAIN.EPOCHS 1")
    assert "litv2_small: head is newly initialised: it has 7 outputs in the file, but 10 in this model" in done.stdout
