# SPDX-License-Identifier: Apache-2.0
"""The command line: what the release's users type, what overrides what, and what is refused."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from config import ConfigError, default_config, load_config, parse_args, to_dict
from helpers import ROOT

CONFIGS = sorted((ROOT / "classification/configs").glob("*.yaml"))
SMALL = str(ROOT / "classification/configs/litv2-small.yaml")


def parse(*flags: str):
    return parse_args(["--cfg", SMALL, *flags])


def test_every_flag_of_the_release(monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    config = parse(
        *"--batch-size 7 --data-path D --zip --cache-mode full --resume R --accumulation-steps 3 --use-checkpoint "
        "--amp-opt-level O0 --output O --tag T --eval --throughput --local_rank 2 --opts TRAIN.EPOCHS 40 AUG.MIXUP 0".split()
    )
    assert (config.DATA.BATCH_SIZE, config.DATA.DATA_PATH, config.DATA.ZIP_MODE, config.DATA.CACHE_MODE) == (7, "D", True, "full")
    assert (config.MODEL.RESUME, config.TRAIN.ACCUMULATION_STEPS, config.TRAIN.USE_CHECKPOINT) == ("R", 3, True)
    assert (config.AMP, config.OUTPUT, config.TAG, config.EVAL_MODE, config.THROUGHPUT_MODE) == ("off", "O", "T", True, True)
    assert (config.TRAIN.EPOCHS, config.AUG.MIXUP) == (40, 0.0)
    assert os.environ["LOCAL_RANK"] == "2"
    monkeypatch.delenv("LOCAL_RANK")
    parse("--local-rank", "1")
    assert os.environ.pop("LOCAL_RANK") == "1"


def test_new_flags():
    config = parse(*"--pretrained P --amp bf16 --device cpu --compile --ema-decay 0.999 --workers 3 --seed 5".split())
    assert (config.MODEL.PRETRAINED, config.AMP, config.DEVICE, config.COMPILE) == ("P", "bf16", "cpu", True)
    assert (config.TRAIN.EMA_DECAY, config.DATA.NUM_WORKERS, config.SEED) == (0.999, 3, 5)


@pytest.mark.parametrize("level, amp", [("O0", "off"), ("O1", "on"), ("O2", "on")])
def test_amp_opt_level(level, amp):
    assert amp == parse("--amp-opt-level", level).AMP and parse().AMP == "auto"
    assert parse("--amp", "bf16", "--amp-opt-level", level).AMP == "bf16", "--amp is the stronger of the two"


def test_a_flag_that_is_not_given_overrides_nothing(tmp_path):
    file = tmp_path / "a.yaml"
    lines = (
        "DATA: {ZIP_MODE: true, BATCH_SIZE: 5, CACHE_MODE: full}",
        "TRAIN: {USE_CHECKPOINT: true, ACCUMULATION_STEPS: 4}",
        "EVAL_MODE: true",
        "AMP: bf16",
    )
    file.write_text("\n".join(lines))
    expected = default_config()
    expected.merge_from_file(str(file))
    assert to_dict(parse_args(["--cfg", str(file)])) == to_dict(expected)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_configuration_builds_its_model(path):
    import torch

    from network import build_model

    config = load_config(path)
    assert config.MODEL.NAME.replace("_", "-").replace("litv2-", "", 1) in path.stem.replace("finetune-", "")
    with torch.device("meta"):
        model = build_model(config, 1000)
    published = {"litv2-small": 27844000, "litv2-medium": 48830368, "litv2-base": 86520704, "litv2-base-finetune-384": 86520704}
    if path.stem in published:
        assert sum(p.numel() for p in model.parameters()) == published[path.stem]


def test_the_recipe():
    """SPEC section 4, as values in force."""
    config = load_config(SMALL)
    train, aug = config.TRAIN, config.AUG
    assert (train.EPOCHS, train.WARMUP_EPOCHS, train.WEIGHT_DECAY, train.BASE_LR) == (300, 20, 0.05, 5e-4)
    assert (train.WARMUP_LR, train.MIN_LR, train.CLIP_GRAD, config.MODEL.LABEL_SMOOTHING) == (5e-7, 5e-6, 5.0, 0.1)
    assert (train.OPTIMIZER.BETAS, train.OPTIMIZER.EPS, config.MODEL.OFFSET_LR_MULTI) == ([0.9, 0.999], 1e-8, 0.01)
    assert (aug.MIXUP, aug.CUTMIX, aug.MIXUP_SWITCH_PROB, aug.MIXUP_PROB, aug.MIXUP_MODE) == (0.8, 1.0, 0.5, 1.0, "batch")
    assert (aug.AUTO_AUGMENT, aug.REPROB, aug.REMODE, aug.RECOUNT, aug.COLOR_JITTER) == ("rand-m9-mstd0.5-inc1", 0.25, "pixel", 1, 0.4)
    assert (config.DATA.INTERPOLATION, config.TEST.CROP, config.MODEL.DROP_PATH_RATE) == ("bicubic", True, 0.2)
    rates = [load_config(Path(SMALL).with_name(f"litv2-{name}.yaml")).MODEL.DROP_PATH_RATE for name in ("medium", "base")]
    assert rates == [0.3, 0.5]
    tuned = load_config(Path(SMALL).with_name("litv2-base-finetune-384.yaml"))
    assert (tuned.TRAIN.EPOCHS, tuned.TRAIN.WARMUP_EPOCHS, tuned.TRAIN.WEIGHT_DECAY, tuned.TRAIN.BASE_LR) == (30, 5, 1e-8, 2e-5)
    assert (tuned.TRAIN.WARMUP_LR, tuned.TRAIN.MIN_LR, tuned.TEST.CROP, tuned.MODEL.DROP_PATH_RATE) == (2e-8, 2e-7, False, 0.5)
    assert tuned.DATA.IMG_SIZE == 384


def test_text_and_whole_numbers_are_read_as_the_keys_type():
    config = parse(
        "--opts", "TRAIN.BASE_LR", "1e-3", "TRAIN.CLIP_GRAD", "1", "MODEL.LIT.DEPTHS", "[1, 1, 1, 1]", "TEST.CROP", "false", "TAG", "7"
    )
    assert (config.TRAIN.BASE_LR, config.TRAIN.CLIP_GRAD, config.TEST.CROP, config.TAG) == (1e-3, 1.0, False, "7")
    assert type(config.TRAIN.CLIP_GRAD) is float and config.MODEL.LIT.DEPTHS == [1, 1, 1, 1]


def test_a_number_as_text(tmp_path):
    (tmp_path / "a.yaml").write_text("TAG: 7\nTRAIN: {FREEZE: 2}\nMODEL: {PRETRAINED: P}")
    config = load_config(tmp_path / "a.yaml")
    assert (config.TAG, config.TRAIN.FREEZE) == ("7", "2")


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--bach-size", "4"], "--bach-size"),
        (["--batch", "4"], "--batch"),  # no abbreviations
        (["--batch-size", "many"], "many"),
        (["--opts", "TRAIN.EPOCH", "3"], "no key TRAIN.EPOCH"),
        (["--opts", "TRAIN.EPOCHS"], "pairs"),
        (["--opts", "TRAIN.EPOCHS", "many"], "TRAIN.EPOCHS must be a int"),
        (["--opts", "TRAIN.EPOCHS", "2.5"], "TRAIN.EPOCHS must be a int"),
        (["--opts", "TRAIN", "3"], "TRAIN is a section"),
        (["--opts", "MODEL.LIT.DEPTHS", "[1, two]"], r"MODEL.LIT.DEPTHS\[1\]"),
        (["--opts", "AUG.MIXUP_MODE", "triple"], "AUG.MIXUP_MODE must be one of batch, pair, elem, got 'triple'"),
        (["--opts", "AUG.REPROB", "1.5"], "AUG.REPROB must lie in"),
        (["--opts", "TRAIN.WARMUP_EPOCHS", "300"], "WARMUP_EPOCHS=300 must be below"),
        (["--batch-size", "0"], "DATA.BATCH_SIZE must be at least 1"),
        (["--resume", "a", "--pretrained", "b"], "--pretrained: not allowed with argument --resume"),
        (["--freeze", "5", "--pretrained", "P"], "TRAIN.FREEZE must be a number of stages, 0, 1, 2, 3, 4, or head, got '5'"),
        (["--freeze", "head"], "TRAIN.FREEZE=head would keep random weights; give the weights by --pretrained"),
        (["--opts", "TRAIN.UNFREEZE_EVERY", "2"], "TRAIN.UNFREEZE_EVERY=2 needs something to unfreeze"),
        (["--opts", "TRAIN.MULTI_LABEL_LOSS", "asymmetric"], "is of MODEL.TASK multi, got single"),
        (["--opts", "DATA.SAMPLING", "balanced", "TRAIN.CLASS_WEIGHTS", "auto"], "both favour rare classes"),
        (["--zip", "--opts", "DATA.SAMPLING", "balanced"], "DATA.SAMPLING=balanced .* use --cache-mode full or no"),
        (["--cfg", "nowhere.yaml"], "no configuration file nowhere.yaml"),
    ],
)
def test_refused(flags, words, capsys):
    """By argparse, or as a ConfigError, which the program prints; both end it with the status 2."""
    with pytest.raises((SystemExit, ConfigError)) as end:
        parse(*flags)
    assert isinstance(end.value, ConfigError) or end.value.code == 2
    assert re.search(words, capsys.readouterr().err + str(end.value))


@pytest.mark.parametrize(
    "text, words", [("TRAIN: {EPOHS: 3}", "no key TRAIN.EPOHS"), ("- 1", "keys and values"), ("a: [", "not valid YAML")]
)
def test_refused_files(text, words, tmp_path):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ConfigError, match=words):
        load_config(tmp_path / "a.yaml")


def test_an_error_comes_before_anything_is_written(tmp_path):
    command = [sys.executable, "main.py", "--cfg", SMALL, "--output", str(tmp_path / "out"), "--opts", "NO.KEY", "1"]
    done = subprocess.run(command, cwd=ROOT / "classification", capture_output=True, text=True)
    assert done.returncode == 2 and "no key NO" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
