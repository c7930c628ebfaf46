# SPDX-License-Identifier: Apache-2.0
"""Whole runs of the trainer in this process: train, resume, evaluate, fine-tune, and every kind of bad start."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
import torch

from helpers import FAST, ROOT, max_difference, shared, write_images
from litv2.errors import run_program
from litv2.weights.reading import read_checkpoint
from litv2.weights.state_dict import find_weights
from main import main
from metrics import read_metrics

DIGITS = str(ROOT / "classification/configs/litv2-digits.yaml")


def trainer(*flags, opts: str = "") -> int:
    """The exit status of the program, run in this process."""
    return run_program(lambda: main(["--cfg", DIGITS, *map(str, flags), "--workers", "0", "--opts", *FAST, *opts.split()]))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    write_images(root / "train", {"cat": 9, "dog": 8, "owl": 7})
    write_images(root / "val", {"cat": 3, "dog": 2, "owl": 4})
    return root


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory):
    """A complete run on the folder; returns its output folder."""
    out = tmp_path_factory.mktemp("run")
    assert (
        trainer("--data-path", folder, "--output", out, "--batch-size", 5, "--ema-decay", 0.9, opts="DATA.DATASET folder SAVE_FREQ 1") == 0
    )
    return out / "litv2_digits" / "default"


def test_what_a_run_leaves(finished):
    names = {path.name for path in finished.iterdir()}
    assert names >= {
        "latest.pth",
        "previous.pth",
        "best.pth",
        "epoch-0001.pth",
        "epoch-0002.pth",
        "log_rank0.txt",
        "metrics.jsonl",
        "config.yaml",
    }
    assert names >= {"curves.png", "predictions.png", "samples.png", "tensorboard"} and not any(name.endswith(".tmp") for name in names)
    rows = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [row["update"] for row in rows if row["kind"] == "train"] == list(range(1, 9))
    assert [row["images"] for row in rows if row["kind"] == "val"] == [9, 9]
    for name in ("curves.png", "predictions.png", "samples.png"):
        from PIL import Image

        assert Image.open(finished / name).size[0] > 500
    assert any((finished / "tensorboard").iterdir())


def test_lines_of_training_have_the_releases_form(finished):
    number = r"\d+(?:\.\d+)?(?:e-\d+)?"
    mean = rf"{number} \({number}\)"
    form = rf"Train: \[(\d+)/2\]\[(\d+)/4\] eta \d:\d\d:\d\d lr {number} time {mean} loss {mean} grad_norm {mean} mem \d+MB"
    start = r"\[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d litv2_digits\] \(training\.py \d+\): INFO "
    found = re.findall(f"^{start}{form}$", (finished / "log_rank0.txt").read_text(), re.M)
    assert found == [(str(epoch), str(step)) for epoch in (0, 1) for step in (1, 2, 3, 4)]


def test_what_a_checkpoint_holds(finished):
    state = torch.load(finished / "latest.pth", weights_only=True)  # no class, no function: plain tensors and builtins
    assert state["class_names"] == ["cat", "dog", "owl"] and state["config"]["MODEL"]["LIT"]["EMBED_DIM"] == 16
    assert state["progress"]["epoch"] == state["epoch"] == 2 and state["progress"]["updates"] == 8
    assert set(state["random_states"][0]) >= {"python", "numpy", "torch"} and state["versions"]["torch"] == str(torch.__version__)
    best = max(json.loads(line).get("top1", 0) for line in (finished / "metrics.jsonl").read_text().splitlines())
    assert torch.load(finished / "best.pth", weights_only=True)["progress"]["best"] == state["progress"]["best"] == best
    assert any(not torch.equal(state["model"][name], state["ema"][name]) for name in state["model"])
    assert find_weights(state) is not None and torch.equal(find_weights(state)["norm.weight"], state["ema"]["norm.weight"])


def test_running_again_reports_that_all_is_done(finished, folder, capsys):
    before = (finished / "latest.pth").read_bytes()
    out = finished.parents[1]
    assert (
        trainer("--data-path", folder, "--output", out, "--batch-size", 5, "--ema-decay", 0.9, opts="DATA.DATASET folder SAVE_FREQ 1") == 0
    )
    assert "all 2 epochs are already done" in capsys.readouterr().out
    assert (finished / "latest.pth").read_bytes() == before


def test_evaluation_of_a_checkpoint(finished, folder, tmp_path, capsys):
    """--eval prints the very numbers of the run, and an explicit --resume beats the output folder's latest."""
    rows = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    for name, epoch in (("epoch-0001.pth", 1), ("epoch-0002.pth", 2)):
        expected = next(row for row in rows if row["kind"] == "val" and row["epoch"] == epoch)
        capsys.readouterr()
        assert (
            trainer(
                "--data-path", folder, "--resume", finished / name, "--eval", "--output", finished.parents[1], opts="DATA.DATASET folder"
            )
            == 0
        )
        ours, *release = capsys.readouterr().out.splitlines()[-3:]
        assert ours.endswith(f"Acc@1 {expected['top1']:.3f}  Acc@5 {expected['top5']:.3f}  loss {expected['loss']:.4f}  images 9")
        assert release[0].endswith(f"INFO  * Acc@1 {expected['top1']:.3f} Acc@5 {expected['top5']:.3f}")
        assert release[1].endswith(f"INFO Accuracy of the network on the 9 test images: {expected['top1']:.1f}%")


def test_fine_tuning_to_other_classes_and_sizes(finished, tmp_path, capsys):
    root = write_images(tmp_path / "data/train", {"a": 4, "b": 4}).parent
    write_images(root / "val", {"a": 2, "b": 2})
    arguments = ("--data-path", root, "--output", tmp_path / "out", "--batch-size", 4)
    assert trainer(*arguments, "--pretrained", finished / "best.pth", opts="DATA.DATASET folder DATA.IMG_SIZE 48 TRAIN.EPOCHS 1") == 0
    printed = capsys.readouterr().out
    assert "0 of 2 classes keep their rows of the head; new: a, b" in printed
    assert "epoch 1/1" in printed, "pretrained weights start a run of all its epochs"


def test_release_checkpoint_as_pretrained(folder, tmp_path, capsys):
    """The release's file format gives weights; resuming from it is refused with the reason."""
    file = shared("golden/classification_format.pth")
    lit = "MODEL.LIT.EMBED_DIM 32 MODEL.LIT.DEPTHS [1,1,2,1] MODEL.LIT.PATCH_SIZE 4 DATA.DATASET folder TRAIN.EPOCHS 1"
    assert trainer("--data-path", folder, "--pretrained", file, "--output", tmp_path, "--batch-size", 8, opts=lit) == 0
    assert "10 outputs" in capsys.readouterr().out
    assert trainer("--data-path", folder, "--resume", file, "--output", tmp_path / "b", opts=lit + " MODEL.NUM_CLASSES 3") == 2
    assert "to resume from; use --pretrained" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags, opts, words",
    [
        (["--pretrained", "nowhere.pth"], "", "no checkpoint at nowhere.pth"),
        (["--resume", "nowhere.pth"], "", "no checkpoint at nowhere.pth"),
        (["--eval"], "", "--eval needs the weights"),
        (["--data-path", "nowhere"], "DATA.DATASET folder", "no folder nowhere/train"),
        ([], "MODEL.NUM_CLASSES 12", "MODEL.NUM_CLASSES=12, but the training data has 10"),
        ([], "MODEL.LIT.NUM_HEADS [1,2,3,8]", "num_heads=3"),
        ([], "MODEL.LIT.PATCH_SIZE 8", "DATA.IMG_SIZE=32 is too small for this model: each side must be at least 64 pixels"),
        ([], "AUG.AUTO_AUGMENT rend-m9", "AUG.AUTO_AUGMENT='rend-m9' is not a timm policy"),
    ],
)
def test_bad_starts(flags, opts, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert trainer(*flags, "--output", tmp_path / "out", opts=opts) == 2
    assert words in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.pth"))


def test_weights_that_do_not_fit(finished, folder, tmp_path, capsys):
    arguments = ("--data-path", folder, "--output", tmp_path)
    assert trainer(*arguments, "--pretrained", finished / "best.pth", opts="DATA.DATASET folder MODEL.LIT.ALPHA 0.5") == 2
    assert "another variant" in capsys.readouterr().err
    for flags in (["--resume", finished / "best.pth"], ["--pretrained", finished / "best.pth", "--eval"]):
        assert trainer("--output", tmp_path, *flags) == 2  # digits have other classes
        assert "the classes of the checkpoint (3: cat, dog, owl ...)" in capsys.readouterr().err
    other = "DATA.DATASET folder TRAIN.OPTIMIZER.NAME sgd"
    assert trainer(*arguments, "--resume", finished / "latest.pth", "--ema-decay", 0.9, opts=other) == 2
    assert "trained with TRAIN.OPTIMIZER.NAME=adamw and cannot be resumed with sgd" in capsys.readouterr().err


def test_sgd_and_a_step_schedule_train(folder, tmp_path):
    opts = "DATA.DATASET folder TRAIN.OPTIMIZER.NAME sgd TRAIN.LR_SCHEDULER.NAME step TRAIN.LR_SCHEDULER.DECAY_EPOCHS 1 TRAIN.BASE_LR 0.1"
    assert trainer("--data-path", folder, "--output", tmp_path, "--batch-size", 5, opts=opts) == 0
    state = read_checkpoint(tmp_path / "litv2_digits/default/latest.pth")
    assert all("momentum_buffer" in entry for entry in state["optimizer"]["state"].values())
    rows = read_metrics(tmp_path / "litv2_digits/default")
    rates = [row["lr"] for row in rows if row["kind"] == "train"]
    assert rates[-1] == pytest.approx(rates[0] / 10), "the second epoch"


def test_a_bug_keeps_its_traceback(folder, tmp_path, monkeypatch):
    """Even a ValueError: only a UserError or an OSError is the user's."""
    import network

    monkeypatch.setattr(network.LITv2, "set_grad_checkpointing", lambda *_: int("a bug"))
    with pytest.raises(ValueError, match="a bug"):
        trainer("--data-path", folder, "--output", tmp_path, opts="DATA.DATASET folder")


def test_a_damaged_latest_is_reported_and_the_previous_one_used(finished, folder, tmp_path, capsys):
    import shutil

    copy = tmp_path / "litv2_digits" / "default"
    shutil.copytree(finished, copy)
    good = (copy / "latest.pth").read_bytes()
    (copy / "latest.pth").write_bytes(good[: len(good) // 3])
    arguments = ("--data-path", folder, "--output", tmp_path, "--batch-size", 5, "--ema-decay", 0.9)
    assert trainer(*arguments, opts="DATA.DATASET folder SAVE_FREQ 1") == 0
    printed = capsys.readouterr().out
    assert "damaged checkpoint, using the one before" in printed and "resuming from" in printed and "previous.pth" in printed
    a, b = (torch.load(path / "latest.pth", weights_only=True) for path in (finished, copy))
    assert all(max_difference(a["model"][name], b["model"][name]) == 0 for name in a["model"])
    for name in ("latest.pth", "previous.pth"):
        (copy / name).write_bytes(b"no checkpoint")
    assert trainer(*arguments, opts="DATA.DATASET folder SAVE_FREQ 1") == 2
    assert "remove them to start over" in capsys.readouterr().err


def test_a_failed_write_leaves_the_old_file(tmp_path):
    import checkpoint

    checkpoint.save_latest(tmp_path, {"value": 1})

    class Unwritable:
        def __reduce__(self):
            raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space"):
        checkpoint.save(tmp_path / "latest.pth", {"value": Unwritable()})
    with pytest.raises(OSError, match="no space"):
        checkpoint.save_latest(tmp_path, {"value": Unwritable()})
    assert read_checkpoint(tmp_path / "latest.pth") == {"value": 1}
    checkpoint.save_latest(tmp_path, {"value": 2})
    assert [read_checkpoint(tmp_path / name)["value"] for name in ("latest.pth", "previous.pth")] == [2, 1]


INTERRUPTED = """
import sys, pathlib
sys.path[:0] = ["classification", "."]
import torch
import checkpoint

path, steps = pathlib.Path(sys.argv[1]), 0

def interrupt(frame, event, _):  # what a handler of a signal raises comes before some bytecode
    global steps
    if not frame.f_code.co_filename.endswith("serialization.py"):
        return None
    frame.f_trace_opcodes = True
    steps -= event == "opcode"
    if steps == 0:
        sys.settrace(None)
        raise InterruptedError
    return interrupt

for first in range(1, 5000):
    steps = first
    sys.settrace(interrupt)
    try:
        checkpoint.save(path, {"value": torch.ones(3)})
        break
    except InterruptedError:
        assert path.read_bytes() == b"old"
    finally:
        sys.settrace(None)
print(first)
"""


def test_an_interrupt_during_a_write_is_only_an_exception(tmp_path):
    """At whatever step of torch.save it comes: not the end of the process, as when torch's writer outlives its file."""
    path = tmp_path / "latest.pth"
    path.write_bytes(b"old")
    done = subprocess.run([sys.executable, "-c", INTERRUPTED, str(path)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 100 and read_checkpoint(path)["value"].tolist() == [1, 1, 1]
    assert [entry.name for entry in tmp_path.iterdir()] == ["latest.pth"]


def test_a_resumed_run_writes_no_row_twice(tmp_path):
    """Killed between the row of an evaluation and its checkpoint: the row will come again, and is forgotten."""
    from metrics import Metrics

    metrics = Metrics(tmp_path)
    for epoch in (1, 2):
        metrics.write("train", 10 * epoch, epoch=epoch - 1, loss=1.0)
        metrics.write("val", 10 * epoch, epoch=epoch, top1=50.0)
    metrics.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"kind": "tr')  # cut off by the kill
    metrics.forget_after(update=20, epoch=1)
    assert [(row["kind"], row["update"]) for row in read_metrics(tmp_path)] == [("train", 10), ("val", 10), ("train", 20)]


def test_nonfinite_loss_saves_and_names_the_files(folder, tmp_path, capsys):
    """An absurd learning rate: the run ends with exit code 1, the files of the batch and a finite checkpoint."""
    code = trainer("--data-path", folder, "--output", tmp_path, "--batch-size", 6,
                   opts="DATA.DATASET folder TRAIN.BASE_LR 1e30 TRAIN.CLIP_GRAD 0 TRAIN.EPOCHS 3 TRAIN.EMA_DECAY 0")  # fmt: skip
    assert code == 1
    message = capsys.readouterr().err
    assert "not finite at epoch" in message and ".png" in message
    state = read_checkpoint(tmp_path / "litv2_digits/default/latest.pth")
    assert all(value.isfinite().all() for value in state["model"].values())


def test_throughput_needs_no_data(tmp_path, capsys):
    assert trainer("--throughput", "--batch-size", 2, "--output", tmp_path, opts="DATA.DATASET folder") == 0
    result = json.loads((tmp_path / "litv2_digits/default/throughput.json").read_text())
    assert result["batch_size"] == 2 and result["images_per_second"] > 0
    assert "latency_ms_p90" in capsys.readouterr().out


def test_accumulation_and_gradient_checkpointing_run(folder, tmp_path):
    flags = ("--data-path", folder, "--output", tmp_path, "--batch-size", 5, "--accumulation-steps", 3, "--use-checkpoint")
    assert trainer(*flags, opts="DATA.DATASET folder AUG.MIXUP 0 AUG.CUTMIX 1 TRAIN.LAYER_DECAY 0.8") == 0
    assert read_checkpoint(tmp_path / "litv2_digits/default/latest.pth")["progress"]["updates"] == 4  # 4 steps an epoch: groups of 3 and 1
