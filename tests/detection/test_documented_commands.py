# SPDX-License-Identifier: Apache-2.0
"""The commands of the detectors' document, with a tiny model and six generated images of COCO's classes, appended as --cfg-options."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from command_helpers import free_port, run, run_here
from document_helpers import documented
from litv2.openmmlab.runner import MMENGINE_CLASSES
from litv2.weights.reading import read_checkpoint
from mm_helpers import SMALL_OPTIONS, assert_drawn, metrics_in, published_project

pytestmark = pytest.mark.extra

DOCUMENT = "detection/README.md"
OPTIONS = [*SMALL_OPTIONS["detection"], "model.test_cfg.score_thr=0.0"]
TRAINING = [*(option for option in OPTIONS if "init_cfg" not in option), "train_cfg.max_epochs=1"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return published_project("detection", tmp_path_factory.mktemp("detection"))


@pytest.fixture
def small(files, tmp_path):
    """What is appended to evaluations."""
    return ["--work-dir", tmp_path, "--cfg-options", *OPTIONS, f"data_root={files['DIR']}"]


@pytest.mark.parametrize("command", documented(DOCUMENT, r"pip install onedl-mim && mim install \S+ && pip install -r \S+"), ids=str)
def test_requirements(command):
    """The last of the three, without an index: they are what is installed here. mim would fetch mmcv: its version alone is compared."""
    _, mmcv, last = command.line.split(" && ")
    assert "Would install" not in run(replace(command, line=last), "--dry-run", "--no-index").stdout
    assert f"\n{mmcv.split()[-1]}\n" in (command.folder / command.words[-1]).read_text()


def check_training(folder, printed):
    """The published backbone was taken, and the folder holds what the document promises."""
    assert "backbone weights from litv2_small" in printed and "coco/bbox_mAP" in printed
    assert (folder / "epoch_1.pth").is_file() and (folder / "curves.png").is_file() and list(folder.glob("*/*.log"))


@pytest.mark.parametrize("command", documented(DOCUMENT, r"python tools/train\.py .*"), ids=str)
def test_train(command, files, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TORCH_HOME", str(files["DIR"].parent))
    run_here(monkeypatch, command, "--work-dir", tmp_path, "--cfg-options", *TRAINING, files=files)
    check_training(tmp_path, capsys.readouterr().out)


@pytest.mark.parametrize("command", documented("docs/explain.md", r"python tools/train\.py .*"), ids=str)
def test_train_the_detector_of_the_pointing_game(command, files, tmp_path, monkeypatch):
    small = [option for option in SMALL_OPTIONS["detection"] if option.startswith(("train_", "val_", "test_"))]
    run_here(monkeypatch, command, "--work-dir", tmp_path, "--cfg-options", *small, "train_cfg.max_epochs=1", files=files)
    weights = read_checkpoint(tmp_path / "epoch_1.pth", also=MMENGINE_CLASSES)["state_dict"]
    assert weights["backbone.patch_embed.proj.weight"].shape[0] == 32  # the document's, not the published one


@pytest.mark.parametrize("command", documented(DOCUMENT, r"(bash )?tools/dist_train\.sh .*"), ids=str)
def test_dist_train(command, files, tmp_path):
    """On the CPU, with two processes in the place of eight."""
    more = ["--work-dir", tmp_path, "--auto-scale-lr", "--cfg-options", *TRAINING, f"data_root={files['DIR']}"]
    environment = dict(PORT=free_port(), CUDA_VISIBLE_DEVICES="", TORCH_HOME=str(files["DIR"].parent))
    done = run(command, *more, files=files | {"8": 2}, **environment)
    check_training(tmp_path, done.stdout)
    processes = 2 if "8" in command.words else 1
    assert f"Scaling the original LR by {processes * 2 / 16}" in done.stdout


@pytest.mark.parametrize("command", documented(DOCUMENT, r"python tools/test\.py .* --cfg-options data_root=DIR"), ids=str)
def test_test(command, files, small, tmp_path, monkeypatch):
    run_here(monkeypatch, command, *small, files=files)
    assert "coco/bbox_mAP" in metrics_in(tmp_path)


@pytest.mark.parametrize("command", documented(DOCUMENT, r"(bash )?tools/dist_test\.sh .*"), ids=str)
def test_dist_test(command, files, small):
    """On the CPU, with two processes in the place of eight."""
    done = run(command, *small, files=files | {"8": 2}, PORT=free_port(), CUDA_VISIBLE_DEVICES="")
    assert "coco/bbox_mAP" in done.stdout and "[3/3]" in done.stdout


BACKEND = '''
"""A display for matplotlib that keeps what it shows as files."""
import pathlib
from matplotlib.backends.backend_agg import FigureCanvasAgg, FigureManagerBase

class FigureCanvas(FigureCanvasAgg):
    def start_event_loop(self, timeout=0):
        assert timeout == 2
        folder = pathlib.Path(__file__).parent
        self.figure.savefig(folder / f"shown{len(list(folder.glob('shown*.png')))}.png")

    def stop_event_loop(self):
        pass

class FigureManager(FigureManagerBase):
    def show(self):
        pass
'''


@pytest.mark.parametrize("command", documented(DOCUMENT, r"python tools/test\.py .* --show --wait-time 2 --tta"), ids=str)
def test_show(command, files, small, tmp_path):
    """Of the configuration's views those of one scale."""
    (tmp_path / "display.py").write_text(BACKEND)
    scales = [f"tta_pipeline.1.transforms.0.{i}.scale=(80,64)" for i in range(3)]
    done = run(command, *small, *scales, files=files, MPLBACKEND="module://display", PYTHONPATH=str(tmp_path))
    assert len(list(tmp_path.glob("shown*.png"))) == 6 and "coco/bbox_mAP" in done.stdout


@pytest.mark.parametrize("command", documented(DOCUMENT, r"python demo\.py .*"), ids=str)
def test_demo(command, files, tmp_path, monkeypatch, capsys):
    more = ["--score", 0, "--cfg-options", *OPTIONS]
    run_here(monkeypatch, command, *more, files=files | {"PICTURE.png": tmp_path / "picture.png"})
    assert re.search(r"[1-9]\d* objects", capsys.readouterr().out)
    assert_drawn(files["IMAGE"], tmp_path / "picture.png")


@pytest.mark.parametrize("command", documented(DOCUMENT, r"python tools/(analysis_tools/)?get_flops\.py .*"), ids=str)
def test_get_flops(command, monkeypatch, capsys):
    run_here(monkeypatch, command)
    rows = {line.split()[0]: line.split()[1:3] for line in capsys.readouterr().out.splitlines() if "_litv2_" in line}
    assert set(rows) == {path.rpartition("/")[2].removesuffix(".py") for path in command.words[2:]}
    assert rows["retinanet_litv2_s_fpn_1x_coco"] == ["38.01", "242.39"]


def check_speed(printed):
    fps, milliseconds = re.search(r"Overall fps: ([\d.]+) img / s, times per image: ([\d.]+) ms / img", printed).groups()
    assert float(fps) == pytest.approx(1000 / float(milliseconds), abs=0.06)  # one decimal is printed


@pytest.mark.parametrize("command", documented(DOCUMENT, r"python tools/benchmark\.py .* --synthetic"), ids=str)
def test_benchmark(command, monkeypatch, capsys):
    run_here(monkeypatch, command, "--shape", 64, 80, "--max-iter", 10, "--cfg-options", *OPTIONS)
    check_speed(capsys.readouterr().out)


@pytest.mark.parametrize("command", documented(DOCUMENT, r"python -m torch\.distributed\.launch .* --launcher pytorch"), ids=str)
def test_launched_benchmark(command, files):
    """On a free port."""
    done = run(command, "--cfg-options", *OPTIONS, f"data_root={files['DIR']}", files=files | {"29500": free_port()})
    check_speed(done.stdout)
