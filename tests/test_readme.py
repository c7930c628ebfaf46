"""What the README shows is run: its Python sessions, its trainer commands, its table, its file names."""

from __future__ import annotations

import argparse
import doctest
import os
import re
import shlex
import subprocess
import sys

import pytest
import torch

import litv2
from helpers import ROOT, TINY, run_trainer, write_images
from litv2.commands.export import add_arguments as add_export_arguments
from litv2.weights.releases import ZOO

README = (ROOT / "README.md").read_text()
COMMANDS = [
    re.split(r"\s\s+#", line)[0].strip()
    for block in re.findall(r"```bash\n(.*?)```", README, re.S)
    for line in block.splitlines()
    if line.strip()
]
TRAINER = [command for command in COMMANDS if "main.py" in command]
TOOLS = [command for command in COMMANDS if command.startswith("python -m litv2")]
EXPORTS = [command for command in TOOLS if " export " in command]


def test_python_sessions():
    names: dict = {}
    parser = doctest.DocTestParser()
    sessions = [block for block in re.findall(r"```python\n(.*?)```", README, re.S) if ">>>" in block]
    for number, block in enumerate(sessions):
        test = parser.get_doctest(block, names, f"README block {number}", "README.md", 0)
        runner = doctest.DocTestRunner(verbose=False, optionflags=doctest.ELLIPSIS)
        runner.run(test, clear_globs=False)
        names.update(test.globs)
        assert runner.summarize(verbose=False).failed == 0 and runner.tries > 0


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Images for DIR and a checkpoint for FILE."""
    root = tmp_path_factory.mktemp("readme")
    write_images(root / "images/train", {"a": 140, "b": 140}, size=32)
    write_images(root / "images/val", {"a": 3, "b": 3}, size=32)
    run_trainer(
        "--data-path", root / "images", "--output", root / "first", cfg="configs/litv2-small.yaml", opts="TRAIN.EPOCHS 1 DATA.IMG_SIZE 32"
    )
    return root


def test_all_commands_are_known():
    assert (len(TRAINER), len(TOOLS), len(EXPORTS)) == (5, 10, 5)
    detection = [command for command in COMMANDS if re.match(r"(python )?(tools/|demo\.py)", command)]
    assert len(detection) == 6  # run in detection/test_tools.py
    for command in detection:
        script = command.removeprefix("python ").split()[0]
        assert (ROOT / "detection" / script).is_file() and (ROOT / "segmentation" / script).is_file()
    others = [command for command in COMMANDS if command not in TRAINER + TOOLS + detection]
    assert others == [
        "make demo",
        "make test",
        "make test-core",
        "pip install -r requirements.txt",
        "pip install -e .",
        "cd litv2/ops && python setup.py build_ext --inplace",  # run by make test
        "cd classification",
        "make mm",
        "pip install onedl-mim && mim install onedl-mmcv==2.3.6 && pip install -r requirements-mm.txt",
        "cd detection",
        "cd mm_modules/DCN && python setup.py build_ext --inplace",  # run by make test
        "python -m mm_modules.DCN",  # run in mm_modules/test_compiled.py
    ]
    for target in ("demo", "mm", "test", "test-core"):
        subprocess.run(["make", "-n", target], cwd=ROOT, check=True, capture_output=True)


@pytest.mark.parametrize("command", TRAINER)
def test_trainer_commands(command, trained, tmp_path):
    """Run as written, in classification/, with a smaller model and schedule appended."""
    files = dict(DIR=trained / "images", FILE=trained / "first/litv2_small/default/best.pth")
    program, *words = [str(files.get(word, word)) for word in shlex.split(command)]
    launcher = words[: words.index("main.py")]
    flags = words[words.index("main.py") + 1 :]
    opts = ""
    if "--opts" in flags:
        at = flags.index("--opts")
        flags, opts = flags[:at], " ".join(flags[at + 1 :])
    cfg = flags[flags.index("--cfg") + 1]
    flags = [flag for flag in flags if flag not in ("--cfg", cfg)]
    processes = int(launcher[0].partition("=")[2]) if program == "torchrun" else 1
    assert program in ("python", "torchrun")
    done = run_trainer(*flags, "--output", tmp_path, cfg=cfg, processes=processes, opts=opts + " TRAIN.EPOCHS 3 DATA.IMG_SIZE 32")
    expected = "images_per_second" if "--throughput" in flags else "images 6" if "--eval" in flags else "epoch 3/3"
    assert expected in done.stdout


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A checkpoint for FILE, and the file of litv2_small, of random weights, where a download would put it."""
    root = tmp_path_factory.mktemp("weights")
    (root / "hub/checkpoints").mkdir(parents=True)
    torch.save({"model": litv2.litv2_small().state_dict()}, root / "hub/checkpoints/litv2_s.pth")
    torch.save({"model": litv2.LITv2(**{**TINY, "depths": (1, 1, 1, 1)}).state_dict()}, root / "mine.pth")
    return root


@pytest.mark.parametrize("command", EXPORTS)
def test_exports(command):
    """The words are right; what they do is run in litv2/test_export.py and detection/test_export.py."""
    parser = argparse.ArgumentParser()
    add_export_arguments(parser)
    args = parser.parse_args(shlex.split(command)[4:])
    assert args.model == "FILE" or args.model in ZOO


@pytest.mark.parametrize("command", [command for command in TOOLS if command not in EXPORTS])
def test_tools(command, weights, trained, tmp_path):
    image = trained / "images/val/a/0.png"
    files = dict(FILE=weights / "mine.pth", IMAGE=image)
    words = [sys.executable, *(str(files.get(word, word)) for word in shlex.split(command)[1:])]
    environment = {**os.environ, "TORCH_HOME": str(weights), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    tool = words[3]
    expected = {"list": "litv2_small_alpha00", "download": "litv2_s.pth", "info": "parameters", "convert": "weights.safetensors"}
    assert expected.get(tool, str(image)) in done.stdout


def test_model_table():
    rows = re.findall(r"\| LITv2-. \| `(\w+)` \| ([\d.]+) \| ([\d.]+) \| (\d+) \|", README)
    assert len(rows) == 4
    for constructor, parameters, gflops, size in rows:
        with torch.device("meta"):
            model = getattr(litv2, constructor)()
        assert f"{sum(p.numel() for p in model.parameters()) / 1e6:.3f}" == parameters
        assert f"{model.flops(int(size), int(size)) / 1e9:.3f}" == gflops


def test_files_that_the_readme_names_exist():
    for path in re.findall(r"\]\(([\w./]+)\)", README):
        assert (ROOT / path).exists(), path
    for name in re.findall(r"`(litv2-[\w{},*-]+\.yaml)`", README):
        options = name[name.index("{") + 1 : name.index("}")].split(",") if "{" in name else [""]
        for option in options:
            pattern = re.sub(r"\{.*\}", option, name)
            assert list((ROOT / "classification/configs").glob(pattern)), pattern


def test_dense_tables():
    """The accuracy tables name the configurations, and their counts are the published ones without decimals."""
    rows = re.findall(r"\| `(\w+(?:coco|ade20k))` \| (\d+) \| (\d+) \|", README)
    assert len(rows) == 9
    for name, parameters, gflops in rows:
        task = "detection" if name.endswith("coco") else "segmentation"
        assert (ROOT / task / "configs/litv2" / f"{name}.py").is_file()
        assert [count.split(".")[0] for count in (ZOO[name].parameters, ZOO[name].gflops)] == [parameters, gflops], name
