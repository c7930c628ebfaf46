# SPDX-License-Identifier: Apache-2.0
"""What users of the public release type and keep: its commands, its YAML files, its keys."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
import torch
import yaml
from yacs.config import CfgNode

import convert_onnx
from config import ConfigError, load_config, parse_args, to_dict
from helpers import FAST, ROOT, trainer_environment, write_images
from litv2 import LITv2
from litv2.errors import UserError, run_program
from litv2.preprocess import decode, evaluation_transform
from main import main

SIZES = {
    "small": dict(drop=0.2, EMBED_DIM=96, DEPTHS=[2, 2, 6, 2], NUM_HEADS=[3, 6, 12, 24]),
    "medium": dict(drop=0.3, EMBED_DIM=96, DEPTHS=[2, 2, 18, 2], NUM_HEADS=[3, 6, 12, 24]),
    "base": dict(drop=0.5, EMBED_DIM=128, DEPTHS=[2, 2, 18, 2], NUM_HEADS=[4, 8, 16, 32]),
}


def release_file(size: str, **data) -> dict:
    """The content of litv2-{small,medium,base}.yaml of the release; ``data`` stands in for its folders."""
    lit = {key: value for key, value in SIZES[size].items() if key != "drop"} | dict(ALPHA=0.9, LOCAL_WS=[0, 0, 2, 1])
    return dict(
        MODEL=dict(TYPE="litv2", NAME=f"litv2_{size}", DROP_PATH_RATE=SIZES[size]["drop"], OFFSET_LR_MULTI=0.01, LIT=lit),
        DATA=dict(NUM_WORKERS=10, BATCH_SIZE=128, DATA_PATH="/data/imagenet", DATASET="imagenet") | data,
    )


def release_file_384() -> dict:
    content = release_file("base", IMG_SIZE=384)
    content["MODEL"] |= dict(NAME="litv2_base_384", PRETRAINED="litv2_b.pth")
    content["TRAIN"] = dict(EPOCHS=30, WARMUP_EPOCHS=5, WEIGHT_DECAY=1e-8, BASE_LR=2e-5, WARMUP_LR=2e-8, MIN_LR=2e-7)
    content["TEST"] = dict(CROP=False)
    return content


def release_defaults() -> dict:
    """Every key of the release's configuration at its default, as its own dump would write them."""
    return yaml.safe_load("""
BASE: ['']
DATA: {BATCH_SIZE: 128, DATA_PATH: '', DATASET: imagenet, IMG_SIZE: 224, INTERPOLATION: bicubic, ZIP_MODE: false, CACHE_MODE: part,
       PIN_MEMORY: true, NUM_WORKERS: 8}
MODEL: {TYPE: lit, NAME: lit_s, RESUME: '', PRETRAINED: '', NUM_CLASSES: 1000, DROP_RATE: 0.0, DROP_PATH_RATE: 0.1, LABEL_SMOOTHING: 0.1,
        OFFSET_LR_MULTI: 1.0,
        LIT: {PATCH_SIZE: 4, IN_CHANS: 3, EMBED_DIM: 96, DEPTHS: [2, 2, 6, 2], NUM_HEADS: [3, 6, 12, 24], WINDOW_SIZE: 7, MLP_RATIO: 4,
              QKV_BIAS: true, QK_SCALE: null, APE: false, PATCH_NORM: true, HAS_MSA: [0, 0, 1, 1], ALPHA: 0.5, LOCAL_WS: [0, 0, 2, 1]}}
TRAIN: {START_EPOCH: 0, EPOCHS: 300, WARMUP_EPOCHS: 20, WEIGHT_DECAY: 0.05, BASE_LR: 5e-4, WARMUP_LR: 5e-7, MIN_LR: 5e-6, CLIP_GRAD: 5,
        AUTO_RESUME: true, ACCUMULATION_STEPS: 0, USE_CHECKPOINT: false, LR_SCHEDULER: {NAME: cosine, DECAY_EPOCHS: 30, DECAY_RATE: 0.1},
        OPTIMIZER: {NAME: adamw, EPS: 1e-8, BETAS: [0.9, 0.999], MOMENTUM: 0.9}}
AUG: {COLOR_JITTER: 0.4, AUTO_AUGMENT: rand-m9-mstd0.5-inc1, REPROB: 0.25, REMODE: pixel, RECOUNT: 1, MIXUP: 0.8, CUTMIX: 1,
      CUTMIX_MINMAX: null, MIXUP_PROB: 1, MIXUP_SWITCH_PROB: 0.5, MIXUP_MODE: batch}
TEST: {CROP: true}
AMP_OPT_LEVEL: ''
OUTPUT: ''
TAG: default
SAVE_FREQ: 1
PRINT_FREQ: 10
SEED: 0
EVAL_MODE: false
THROUGHPUT_MODE: false
LOCAL_RANK: 0
""")


def written(path, content: dict) -> str:
    path.write_text(yaml.safe_dump(content))
    return str(path)


@pytest.mark.parametrize("size", [*SIZES, "base-finetune-384"])
def test_the_four_files_describe_the_recipes_here(size, tmp_path):
    """The release's file and ours of the same name train the same model in the same way."""
    notes: list[str] = []
    content = release_file_384() if size.endswith("384") else release_file(size)
    theirs = to_dict(load_config(written(tmp_path / "release.yaml", content), note=notes.append))
    ours = to_dict(load_config(ROOT / f"classification/configs/litv2-{size}.yaml"))
    assert theirs["MODEL"].pop("PRETRAINED") == ("litv2_b.pth" if size.endswith("384") else "") and ours["MODEL"].pop("PRETRAINED") == ""
    for section in ("MODEL", "TRAIN", "AUG", "TEST", "AMP"):
        assert theirs[section] == ours[section]
    assert theirs["DATA"] | dict(DATASET="folder", DATA_PATH="", NUM_WORKERS=-1) == ours["DATA"]
    assert notes == ["MODEL.TYPE=litv2 from the release has no effect: this trainer has only one model type"]


def test_every_default_of_the_release(tmp_path):
    notes: list[str] = []
    config = load_config(written(tmp_path / "all.yaml", release_defaults()), note=notes.append)
    obsolete = "MODEL.TYPE MODEL.LIT.WINDOW_SIZE MODEL.LIT.QK_SCALE MODEL.LIT.APE MODEL.LIT.PATCH_NORM MODEL.LIT.HAS_MSA TRAIN.START_EPOCH"
    assert sorted(note.partition("=")[0] for note in notes) == sorted([*obsolete.split(), "LOCAL_RANK"])
    assert (config.TRAIN.ACCUMULATION_STEPS, config.AUG.CUTMIX_MINMAX, config.AMP) == (1, [], "auto")
    assert (config.MODEL.LIT.ALPHA, config.MODEL.OFFSET_LR_MULTI, config.SAVE_FREQ, config.PRINT_FREQ) == (0.5, 1.0, 1, 10)
    # On the command line everything is text, written as Python or as YAML would.
    opts = "MODEL.LIT.QK_SCALE None MODEL.LIT.APE False MODEL.LIT.HAS_MSA [0,0,1,1] TRAIN.ACCUMULATION_STEPS 0 AUG.CUTMIX_MINMAX None"
    assert load_config(tmp_path / "all.yaml", opts.split()) == config


@pytest.mark.parametrize(
    "opts, words",
    [
        ("MODEL.TYPE swin", "MODEL.TYPE=swin from the release is not supported, only lit or litv2"),
        ("MODEL.LIT.WINDOW_SIZE 12", "WINDOW_SIZE=12 .* only 7: HiLo's windows are set by MODEL.LIT.LOCAL_WS"),
        ("MODEL.LIT.QK_SCALE 0.1", "QK_SCALE=0.1 .* only None"),
        ("MODEL.LIT.APE true", "APE=true .* only False: LITv2 has no absolute position embedding"),
        ("MODEL.LIT.PATCH_NORM False", "PATCH_NORM=False"),
        ("MODEL.LIT.HAS_MSA [1,1,1,1]", r"HAS_MSA=\[1,1,1,1\] .* only \[0, 0, 1, 1\]: the stages with attention are those"),
        ("MODEL.LIT.HAS_MSA [0,0,1,1] MODEL.LIT.LOCAL_WS [0,2,2,1]", r"only \[0, 1, 1, 1\]"),
        ("TRAIN.START_EPOCH 5", "START_EPOCH=5 .* from the checkpoint"),
        ("LOCAL_RANK 1", "LOCAL_RANK=1"),
        ("AMP_OPT_LEVEL O3", "AMP_OPT_LEVEL must be O0, O1 or O2, got 'O3'"),
        ("TRAIN.ACCUMULATION_STEPS -1", "ACCUMULATION_STEPS must be at least 1"),
        ("AUG.CUTMIX_MINMAX [0.8,0.2]", "CUTMIX_MINMAX must be two increasing numbers"),
        ("MODEL.LIT.ROPE False", "there is no key MODEL.LIT.ROPE"),
    ],
)
def test_refused_by_name(opts, words):
    with pytest.raises(UserError, match=words):
        load_config(ROOT / "classification/configs/litv2-small.yaml", opts.split())


@pytest.mark.parametrize("level, amp", [("O0", "off"), ("O1", "on"), ("O2", "on"), ("", "auto")])
def test_amp_opt_level_in_a_file(level, amp, tmp_path):
    config = load_config(written(tmp_path / "a.yaml", dict(AMP_OPT_LEVEL=level, TRAIN=dict(OPTIMIZER=dict(NAME="AdamW")))))
    assert amp == config.AMP and config.TRAIN.OPTIMIZER.NAME == "adamw"


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    """A folder with the release's file, of a tiny model, a checkpoint of the release's format as litv2_s.pth, and images."""
    root = tmp_path_factory.mktemp("release")
    write_images(root / "images/train", {"cat": 9, "dog": 8})
    write_images(root / "images/val", {"cat": 5, "dog": 6})
    content = release_file("small", DATA_PATH=str(root / "images"), BATCH_SIZE=4, NUM_WORKERS=0)
    content["MODEL"]["LIT"] |= dict(EMBED_DIM=32, DEPTHS=[1, 1, 1, 1], NUM_HEADS=[1, 2, 4, 8])
    (root / "configs").mkdir()
    written(root / "configs/litv2-small.yaml", content)
    torch.manual_seed(0)
    model = LITv2(num_classes=2, embed_dim=32, depths=(1, 1, 1, 1), num_heads=(1, 2, 4, 8))
    state = dict(model=model.state_dict(), optimizer={}, lr_scheduler={}, max_accuracy=82.044, epoch=299, config=CfgNode(content))
    torch.save(state, root / "litv2_s.pth")
    return root


@pytest.mark.extra
def test_train(release, tmp_path):
    """torchrun --standalone --nnodes=1 --nproc-per-node=8 main.py --cfg configs/litv2-small.yaml"""
    from torch.distributed.run import get_args_parser

    words = "--standalone --nnodes=1 --nproc-per-node={} main.py --cfg configs/litv2-small.yaml"
    parsed = get_args_parser().parse_args(words.format(8).split())
    assert (parsed.training_script, parsed.training_script_args) == ("main.py", ["--cfg", "configs/litv2-small.yaml"])

    words = words.format(1).replace("configs", str(release / "configs")).split()
    smaller = ["--output", str(tmp_path), "--opts", *FAST, "DATA.IMG_SIZE", "32", "TRAIN.EPOCHS", "1", "MODEL.LIT.PATCH_SIZE", "1"]
    command = [sys.executable, "-m", "torch.distributed.run", *words, *smaller]
    done = subprocess.run(command, cwd=ROOT / "classification", env=trainer_environment(), capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    line = r"\[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d litv2_small\] \(training.py \d+\): INFO Train: \[0/1\]\[1/4\] eta \d:\d\d:\d\d lr "
    assert re.search(line, done.stdout) and "\x1b[" not in done.stdout
    assert "mixed precision: off, float32 throughout (AMP is auto" in done.stdout or torch.cuda.is_available()


def test_evaluate(release, tmp_path, monkeypatch, capsys):
    """torchrun ... main.py --cfg configs/litv2-small.yaml --resume ./litv2_s.pth --eval"""
    monkeypatch.chdir(release)
    command = "--cfg configs/litv2-small.yaml --resume ./litv2_s.pth --eval".split()
    assert run_program(lambda: main([*command, "--output", str(tmp_path)])) == 0
    printed = capsys.readouterr().out

    model = LITv2(num_classes=2, embed_dim=32, depths=(1, 1, 1, 1), num_heads=(1, 2, 4, 8)).eval()
    model.load_state_dict(torch.load("litv2_s.pth", weights_only=False)["model"])
    prepare, right = evaluation_transform(224), []
    for target, name in enumerate(("cat", "dog")):
        for path in sorted((release / "images/val" / name).iterdir()):
            with open(path, "rb") as file, torch.inference_mode():
                right.append(model(prepare(decode(file, "RGB"))[None]).argmax().item() == target)
    accuracy = 100 * sum(right) / len(right)
    assert f"INFO  * Acc@1 {accuracy:.3f} Acc@5 100.000\n" in printed
    assert f"INFO Accuracy of the network on the 11 test images: {accuracy:.1f}%\n" in printed


def test_evaluate_at_384(release, tmp_path, monkeypatch, capsys):
    """The release's file for 384 names PRETRAINED weights, which an evaluation of other weights does not need."""
    monkeypatch.chdir(release)
    opts = "MODEL.PRETRAINED nowhere.pth DATA.IMG_SIZE 64 TEST.CROP False".split()
    command = ["--cfg", "configs/litv2-small.yaml", "--resume", "./litv2_s.pth", "--eval", "--output", str(tmp_path), "--opts", *opts]
    assert run_program(lambda: main(command)) == 0
    assert "the weights come from the checkpoint, not from MODEL.PRETRAINED=nowhere.pth" in capsys.readouterr().out


def test_throughput(release, tmp_path, monkeypatch, capsys):
    """torchrun ... main.py --cfg configs/litv2-small.yaml --throughput"""
    monkeypatch.chdir(release)
    command = "--cfg configs/litv2-small.yaml --throughput --opts DATA.DATA_PATH nowhere DATA.IMG_SIZE 32 OUTPUT".split()
    assert run_program(lambda: main([*command, str(tmp_path)])) == 0
    assert "images_per_second" in capsys.readouterr().out


@pytest.mark.extra
def test_convert(release, tmp_path, monkeypatch):
    """python convert_onnx.py --cfg configs/litv2-small.yaml --resume FILE"""
    onnx, runtime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    monkeypatch.chdir(tmp_path)
    arguments = ["--cfg", str(release / "configs/litv2-small.yaml"), "--resume", str(release / "litv2_s.pth")]
    assert run_program(lambda: convert_onnx.main(arguments)) == 0
    graph = onnx.load("litv2_small.onnx")
    assert [d.dim_value for d in graph.graph.input[0].type.tensor_type.shape.dim] == [64, 3, 224, 224]
    assert {node.domain for node in graph.graph.node} <= {"", "ai.onnx"} and "DeformConv" not in {node.op_type for node in graph.graph.node}
    images = torch.randn(64, 3, 224, 224)
    model = LITv2(num_classes=2, embed_dim=32, depths=(1, 1, 1, 1), num_heads=(1, 2, 4, 8)).eval()
    model.load_state_dict(torch.load(release / "litv2_s.pth", weights_only=False)["model"])
    (logits,) = runtime.InferenceSession("litv2_small.onnx").run(None, {"images": images.numpy()})
    with torch.inference_mode():
        torch.testing.assert_close(torch.from_numpy(logits), model(images), rtol=1e-3, atol=1e-4)


def test_convert_refuses_other_weights(release, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments = ["--cfg", str(ROOT / "classification/configs/litv2-small.yaml"), "--resume", str(release / "litv2_s.pth")]
    assert run_program(lambda: convert_onnx.main(arguments)) == 2
    assert "is it another variant" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_names_of_the_data_sets(release, tmp_path):
    from data.sources import open_sources

    for name in ("imagenet", "imagenet100"):
        config = parse_args(["--cfg", str(release / "configs/litv2-small.yaml"), "--opts", "DATA.DATASET", name])
        assert [len(source) for source in open_sources(config)] == [17, 11]
    with pytest.raises(ConfigError, match="no configuration file"):
        parse_args(["--cfg", str(tmp_path / "nowhere.yaml")])
