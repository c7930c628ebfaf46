# SPDX-License-Identifier: Apache-2.0
"""Training of detectors and segmenters: a run that is killed and resumed ends bit for bit like one that is not."""

from __future__ import annotations

import logging
import os
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytestmark = pytest.mark.extra
pytest.importorskip("mmdet", exc_type=ImportError)
pytest.importorskip("mmseg", exc_type=ImportError)

from mmengine.fileio import LocalBackend  # noqa: E402
from mmengine.hooks import Hook  # noqa: E402
from PIL import Image  # noqa: E402

from litv2.errors import UserError  # noqa: E402
from litv2.openmmlab import commands  # noqa: E402
from litv2.openmmlab.config import adapt_to_device, load_config  # noqa: E402
from litv2.openmmlab.exact_loops import Drawn, NamingDataset, SeededDataset  # noqa: E402
from litv2.openmmlab.runner import MMENGINE_CLASSES, CarefulCheckpointHook, StrictRunner  # noqa: E402
from litv2.runs.signals import StopRequested  # noqa: E402
from litv2.weights.reading import read_checkpoint  # noqa: E402
from mm_helpers import SMALL_OPTIONS, own_project  # noqa: E402

TIMES = {  # six iterations, a checkpoint after each two
    "detection": ["train_cfg.max_epochs=2", "train_cfg.val_interval=9"],
    "segmentation": ["train_cfg.max_iters=6", "train_cfg.val_interval=99"],
}
EVERY_TWO = ["default_hooks.checkpoint.by_epoch=False", "default_hooks.checkpoint.interval=2", "default_hooks.checkpoint.save_best=None"]


@pytest.fixture(scope="module", params=["detection", "segmentation"])
def project(request, tmp_path_factory) -> tuple[str, Path]:
    return request.param, own_project(request.param, tmp_path_factory.mktemp(request.param))


class Killed(BaseException):
    """As kill -9: nothing that the run would do at its end is done."""


class At(Hook):
    """Does something after an iteration, when its checkpoint is written."""

    priority = "LOWEST"

    def __init__(self, iteration: int, act):
        self.iteration, self.act = iteration, act

    def after_train_iter(self, runner, **_) -> None:
        if runner.iter + 1 == self.iteration:
            self.act(runner)


def kill(runner) -> None:
    raise Killed


def train(project: tuple[str, Path], work_dir: Path, *options: str, resume: bool = False, hook: Hook | None = None) -> StrictRunner:
    """In this process, as the tool does it."""
    task, folder = project
    flags = [*SMALL_OPTIONS[task], *TIMES[task], *EVERY_TWO, f"data_root={folder / 'data'}", "load_from=None", *options]
    config = load_config(folder / "mine.py", commands.arguments("").parse_args(["--cfg-options", *flags]).cfg_options)
    config.update(work_dir=str(work_dir), resume=resume, experiment_name=f"{work_dir.name}-{resume}-{len(list(work_dir.glob('*')))}")
    adapt_to_device(config, "none")
    runner = StrictRunner.from_cfg(config)
    if hook is not None:
        runner.register_hook(hook, priority="LOWEST")
    runner.train()
    return runner


def state(path: Path) -> dict[str, torch.Tensor]:
    """Weights, statistics and moments of the optimizer."""
    content = read_checkpoint(path, also=MMENGINE_CLASSES)
    moments = {f"{i}.{key}": value for i, parts in content["optimizer"]["state"].items() for key, value in parts.items()}
    return {**content["state_dict"], **moments, "iter": torch.tensor(content["meta"]["iter"])}


def assert_same(first: Path, second: Path) -> None:
    one, other = state(first), state(second)
    assert one.keys() == other.keys() and [key for key in one if not torch.equal(one[key], other[key])] == []


@pytest.fixture(scope="module")
def whole(project, tmp_path_factory) -> Path:
    """The last checkpoint of a run that nothing disturbs."""
    folder = tmp_path_factory.mktemp("whole")
    train(project, folder, "randomness.seed=5")
    return folder / "iter_6.pth"


@pytest.mark.parametrize("iteration", [2, 3, 5])
def test_killed_and_resumed(project, whole, tmp_path, iteration):
    """In the middle of an epoch of three iterations, and at its end, with an iteration that is computed again, and without."""
    with pytest.raises(Killed):
        train(project, tmp_path, "randomness.seed=5", hook=At(iteration, kill))
    runner = train(project, tmp_path, "randomness.seed=5", resume=True)
    assert runner.iter == 6
    assert f"iter: {iteration // 2 * 2}\n" in "".join(path.read_text() for path in tmp_path.rglob("*.log")), "from the newest"
    assert_same(whole, tmp_path / "iter_6.pth")


def test_workers_and_an_unknown_seed(project, tmp_path):
    """Images are augmented alike in other processes; a seed that was drawn is that of the checkpoint."""
    folders = [tmp_path / name for name in ("whole", "killed")]
    with pytest.raises(Killed):
        train(project, folders[1], hook=At(3, kill))
    seed = read_checkpoint(folders[1] / "iter_2.pth", also=MMENGINE_CLASSES)["meta"]["seed"]
    workers = ["train_dataloader.num_workers=2", "train_dataloader.persistent_workers=True"]
    train(project, folders[1], *workers, resume=True)
    train(project, folders[0], f"randomness.seed={seed}")
    assert_same(*(folder / "iter_6.pth" for folder in folders))


def test_stopped_by_a_signal(project, whole, tmp_path):
    """At the end of its iteration; the checkpoint of that is the one that the run goes on from."""
    with pytest.raises(StopRequested, match="SIGTERM"):
        train(project, tmp_path, "randomness.seed=5", hook=At(3, lambda runner: os.kill(os.getpid(), signal.SIGTERM)))
    assert (tmp_path / "iter_3.pth").is_file()
    train(project, tmp_path, "randomness.seed=5", resume=True)
    assert_same(whole, tmp_path / "iter_6.pth")


def test_a_damaged_checkpoint_is_left_out(project, whole, tmp_path, caplog):
    with pytest.raises(Killed):
        train(project, tmp_path, "randomness.seed=5", hook=At(4, kill))
    newest = tmp_path / "iter_4.pth"
    newest.write_bytes(newest.read_bytes()[:-5000])
    (tmp_path / "iter_5.pth.123.tmp").write_text("a draft")
    train(project, tmp_path, "randomness.seed=5", resume=True)
    log = "".join(path.read_text() for path in tmp_path.rglob("*.log"))
    assert "iter_4.pth" in log and "trying the checkpoint before it" in log and "iter: 2" in log
    assert_same(whole, tmp_path / "iter_6.pth")


def test_the_newest_checkpoint_has_the_most_iterations(whole, tmp_path):
    """Whatever the clock said, and whatever comes last in the alphabet; an epoch is three iterations."""
    run = SimpleNamespace(work_dir=tmp_path, train_loop=SimpleNamespace(dataloader=range(3)), logger=logging.getLogger())
    names = "iter_2.pth", "epoch_2.pth", "iter_9.pth", "iter_10.pth", "epoch_4.pth"
    for age, name in enumerate(names):
        shutil.copy(whole, tmp_path / name)
        os.utime(tmp_path / name, (10**9 - age, 10**9 - age))
        assert StrictRunner._newest_checkpoint(run) == str(tmp_path / name)


def test_a_checkpoint_is_written_whole_or_not_at_all(project, tmp_path, monkeypatch):
    """A run is killed when it has written half of the second."""
    put, files = LocalBackend.put, []

    def put_half(backend, content: bytes, path) -> None:
        files.append(path)
        put(backend, content[: len(content) // 2] if len(files) == 2 else content, path)
        if len(files) == 2:
            raise Killed

    monkeypatch.setattr(LocalBackend, "put", put_half)
    with pytest.raises(Killed):
        train(project, tmp_path)
    assert [path.name for path in tmp_path.glob("*.pth")] == ["iter_2.pth"]


def test_a_loss_that_is_not_finite_is_not_applied(project, tmp_path):
    def spoil(runner) -> None:
        head = next(module for name, module in runner.model.named_modules() if name in ("bbox_head.retina_cls", "decode_head.conv_seg"))
        head.register_forward_hook(lambda module, args, out: out * float("nan"))
        before.update({key: value.clone() for key, value in runner.model.named_parameters()})
        models.append(runner.model)

    before: dict[str, torch.Tensor] = {}
    models: list[torch.nn.Module] = []
    with pytest.raises(UserError, match=r"the loss is nan at iteration 4, of the images .*\.jpg.*the last checkpoint is .*iter_2.pth"):
        train(project, tmp_path, hook=At(3, spoil))
    assert all(torch.equal(value, before[key]) for key, value in models[0].named_parameters())
    assert {path.name for path in tmp_path.glob("*.pth")} == {"iter_2.pth"}


def test_an_unreadable_image_is_replaced_by_the_next(project, tmp_path):
    """It is reported, and the run is exactly resumable without it; with none allowed the run stops before it is used."""
    task, folder = project
    data = shutil.copytree(folder / "data", tmp_path / "data")
    images = data / ("train" if task == "detection" else "images/training")
    (images / "3.jpg").write_bytes(b"no image")
    (images / "4.jpg").write_bytes(b"")
    options = [f"data_root={data}", "randomness.seed=5"]
    train(project, tmp_path / "whole", *options)
    with pytest.raises(Killed):
        train(project, tmp_path / "killed", *options, hook=At(3, kill))
    train(project, tmp_path / "killed", *options, resume=True)
    assert_same(*(tmp_path / run / "iter_6.pth" for run in ("whole", "killed")))
    (log,) = (tmp_path / "whole").rglob("*.log")
    assert log.read_text().count("unreadable image, skipped: ") == 2
    assert f"{images / '3.jpg'}: " in log.read_text() and f"{images / '4.jpg'}: " in log.read_text()
    with pytest.raises(UserError, match=r"unreadable images, more than train_cfg.max_bad_files=0: .*[34].jpg"):
        train(project, tmp_path / "none", *options, "train_cfg.max_bad_files=0")


def test_a_label_map_that_is_gone(project, tmp_path):
    if project[0] == "detection":
        pytest.skip("its labels are in one file")
    data = shutil.copytree(project[1] / "data", tmp_path / "data")
    (data / "annotations/training/2.png").unlink()
    with pytest.raises(UserError, match=r"more than train_cfg.max_bad_files=0: .*annotations/training/2.png"):
        train(project, tmp_path / "run", f"data_root={data}", "train_cfg.max_bad_files=0")


def test_an_unreadable_image_of_an_evaluation_is_named(project, tmp_path):
    """It is not left out: the figures would be of other images than they say."""
    task, folder = project
    data = shutil.copytree(folder / "data", tmp_path / "data")
    image = sorted((data / ("val" if task == "detection" else "images/validation")).glob("*.jpg"))[-1]
    image.write_bytes(b"no image")
    with pytest.raises(UserError, match=f"an evaluation needs each of its images: {image}: .*mend it, or remove it from the data set"):
        train(project, tmp_path / "run", f"data_root={data}", "train_cfg.val_interval=1", "train_cfg.val_begin=1")


@pytest.mark.parametrize("kind", [NamingDataset, SeededDataset])
def test_a_bug_in_the_pipeline_is_no_unreadable_image(kind, tmp_path):
    class Broken(list):
        def get_data_info(self, index: int) -> dict:
            return dict(img_path=str(tmp_path / "0.png"))

        def __getitem__(self, index: int):
            raise ZeroDivisionError

    Image.new("RGB", (8, 8)).save(tmp_path / "0.png")
    index = Drawn(0)
    index.seeds = (0,)
    with pytest.raises(ZeroDivisionError):
        kind(Broken([1]))[index]
    (tmp_path / "0.png").unlink()
    with pytest.raises(UserError, match="images.*: .*0.png"):
        kind(Broken([1]))[index]


def test_the_only_checkpoint_is_kept_until_the_next_is_whole(project, whole, tmp_path, monkeypatch):
    save, saved = StrictRunner.save_checkpoint, []

    def save_but_the_second(runner, *args, **kwargs) -> None:
        saved.append(args)
        if len(saved) == 2:
            raise Killed
        save(runner, *args, **kwargs)

    monkeypatch.setattr(StrictRunner, "save_checkpoint", save_but_the_second)
    one = "default_hooks.checkpoint.max_keep_ckpts=1"
    with pytest.raises(Killed):
        train(project, tmp_path, "randomness.seed=5", one)
    assert [path.name for path in tmp_path.glob("*.pth")] == ["iter_2.pth"]
    train(project, tmp_path, "randomness.seed=5", one, resume=True)
    assert [path.name for path in tmp_path.glob("*.pth")] == ["iter_6.pth"]
    assert_same(whole, tmp_path / "iter_6.pth")


def test_the_best_checkpoint_is_kept_until_a_better_is_whole(tmp_path):
    def save(folder: str, filename: str, **_) -> None:
        if full:
            raise OSError("No space left on device")
        Path(folder, filename).write_text("")

    messages = SimpleNamespace(runtime_info={})
    messages.get_info, messages.update_info = messages.runtime_info.get, messages.runtime_info.__setitem__
    log = logging.getLogger("test")
    runner = SimpleNamespace(work_dir=str(tmp_path), message_hub=messages, logger=log, save_checkpoint=save, epoch=1, iter=1)
    hook = CarefulCheckpointHook(interval=1, save_best="accuracy", rule="greater")
    hook.before_train(runner)
    full = False
    for runner.epoch, accuracy, left in [(1, 0.3, 1), (2, 0.5, 2), (3, 0.4, 2)]:
        hook._save_best_checkpoint(runner, {"accuracy": accuracy})
        assert [path.name for path in tmp_path.glob("best*")] == [f"best_accuracy_epoch_{left}.pth"]
    full = True
    with pytest.raises(OSError, match="No space left"):
        hook._save_best_checkpoint(runner, {"accuracy": 0.6})
    assert [path.name for path in tmp_path.glob("best*")] == ["best_accuracy_epoch_2.pth"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no device that is full")
def test_metrics_on_a_full_disk_do_not_stop_a_run(project, whole, tmp_path):
    def fill(runner) -> None:
        (scalars,) = tmp_path.rglob("scalars.json")
        scalars.unlink()
        scalars.symlink_to("/dev/full")

    train(project, tmp_path, "randomness.seed=5", f"visualizer.name={tmp_path.name}", hook=At(2, fill))
    (log,) = tmp_path.rglob("*.log")
    assert log.read_text().count("cannot be written (No space left on device); the run goes on without") == 1
    assert_same(whole, tmp_path / "iter_6.pth")
