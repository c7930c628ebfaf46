# SPDX-License-Identifier: Apache-2.0
"""Learning from a teacher: the loss, what the teacher is given and kept from, how it is found, and runs that are resumed."""

from __future__ import annotations

import copy
import os
import re
import signal

import huggingface_hub.constants
import pytest
import timm
import torch
from timm.utils import ModelEmaV3
from torch import nn

from config import load_config
from data.dataset import Batch
from data.mixup import AnyBatchMixup
from distillation import Distillation, Teacher, build_distillation, plain_model
from engine import Progress, Step
from helpers import FAST, ROOT, max_difference, normal, run_ranks, same, tiny_model
from litv2 import LITv2
from litv2.errors import UserError, run_program
from litv2.preprocess import normalisation
from litv2.weights.reading import read_checkpoint
from main import main
from metrics import Metrics
from optim import build_optimizer
from precision import Precision

DIGITS = ROOT / "classification/configs/litv2-digits.yaml"
CPU = torch.device("cpu")
CLASSES = [str(i) for i in range(10)]


def another_model(**kwargs) -> LITv2:
    torch.manual_seed(7)
    return LITv2(**{**dict(num_classes=10, embed_dim=32, depths=(1, 1, 1, 1), num_heads=(1, 2, 4, 8)), **kwargs})


def distillation_from(model: nn.Module, projection: nn.Linear | None, weight: float = 0.7, features: float = 0.2) -> Distillation:
    teacher = Teacher(model, Precision(CPU), normalisation(3), features=projection is not None)
    return Distillation(teacher, 3.0, weight, features, projection)


def test_the_loss_is_that_of_the_paper():
    """Written out; with the squared difference of the features, which are those that the last norm's maps have on average."""
    model, images, logits, features = another_model(), normal(1, 3, 3, 32, 64), normal(2, 3, 10), normal(3, 3, 256)
    loss = distillation_from(model, nn.Linear(1, 1))(torch.tensor(2.0), images, logits, features)
    with torch.no_grad():
        p, q = ((values / 3).exp() / (values / 3).exp().sum(dim=1, keepdim=True) for values in (model(images), logits))
        pooled = model.norm(model.forward_pyramid(images)[-1].permute(0, 2, 3, 1)).mean(dim=(1, 2))
    divergence = (p * (p / q).log()).sum() / 3
    assert loss.item() == pytest.approx((0.3 * 2 + 0.7 * 9 * divergence + 0.2 * (features - pooled).square().mean()).item(), rel=1e-4)


def test_of_several_labels_each_is_learnt():
    """As torch's own divergence of yes and no says."""
    model, images, logits = another_model(), normal(1, 3, 3, 32, 32), normal(2, 3, 10)
    teacher = Teacher(model, Precision(CPU), normalisation(3), features=False)
    loss = Distillation(teacher, 2.0, 1.0, multi_label=True)(torch.tensor(5.0), images, logits, None)
    ours, theirs = (torch.distributions.Bernoulli(logits=values / 2) for values in (logits, teacher(images)[0]))
    assert loss.item() == pytest.approx(4 * torch.distributions.kl_divergence(theirs, ours).mean().item(), rel=1e-4)


def recorded(module: nn.Module) -> list[tuple]:
    """Grows by a module's input and output with each call."""
    found: list[tuple] = []
    module.register_forward_hook(lambda module, inputs, output: found.append((inputs[0].clone(), output)))
    return found


def test_a_step_with_a_teacher():
    """The teacher sees the mixed images, in its own precision and without its dropout, and stays as it is; the student and the
    projection learn, and the moving average is that of the student alone."""
    model, network, projection = tiny_model(), another_model(drop_rate=0.5), nn.Linear(256, 256)
    weights, first = copy.deepcopy(network.state_dict()), projection.weight.clone()
    distillation = distillation_from(network, projection)
    optimizer = build_optimizer(load_config(DIGITS), model, 64, projection)
    learning = [*model.parameters(), *projection.parameters()]
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {id(p) for p in learning}

    class Constant:
        def step_update(self, update): ...

    student, ema = distillation.student(model), ModelEmaV3(model, decay=0.5)
    assert plain_model(student) is model
    mixup = AnyBatchMixup(mixup_alpha=0.8, cutmix_alpha=1.0, num_classes=10)
    seen, taught = recorded(model.patch_embed), recorded(network)
    maps = recorded(network.norm)
    images = normal(1, 4, 3, 32, 32)
    loss = nn.CrossEntropyLoss()
    step = Step(student, optimizer, Constant(), loss, Precision(CPU, "bf16"), mixup, ema, distillation=distillation)
    student.train()
    progress = Progress()
    for _ in range(2):  # the first update of the average is a copy
        step([Batch(images.clone(), torch.arange(4), ["a"] * 4, [])], progress)
    assert not taught, "logits and features come from one pass"
    assert not torch.equal(seen[0][0], images) and len(maps) == 2 and maps[0][1].dtype == torch.float32
    with torch.no_grad():
        network.eval().forward_features(seen[0][0])
    assert torch.equal(maps[0][1], maps[2][1]), "the same images"
    assert not network.training and all(p.grad is None for p in network.parameters())
    same(weights, network.state_dict())
    assert not torch.equal(first, projection.weight)
    assert ema.module.state_dict().keys() == model.state_dict().keys()
    assert 0 < max_difference(ema.module.head.weight, model.head.weight) < 1


@pytest.mark.extra
def test_processes_and_accumulation():
    """Two processes that each accumulate two batches take the step of one process and one batch, the projection's included."""
    run_ranks("""
sys.path.insert(0, "tests")
from torch import nn
from data.dataset import Batch
from distillation import Distillation, Teacher
from engine import Progress, Step
from helpers import max_difference, normal, tiny_model
from litv2.preprocess import normalisation
from precision import Precision

class Constant:
    def step_update(self, update): ...

def trained(parts, parallel):
    torch.manual_seed(0)
    projection = nn.Linear(256, 256)
    precision = Precision(torch.device("cpu"))
    distillation = Distillation(Teacher(tiny_model(), precision, normalisation(3), True), 2.0, 0.5, 1.0, projection)
    model = tiny_model(alpha=0.5)
    learner = distillation.student(model).eval()  # batch norm would see each batch by itself
    learner = distributed.parallel(learner, precision.device) if parallel else learner
    optimizer = torch.optim.SGD(learner.parameters(), lr=0.1)
    step = Step(learner, optimizer, Constant(), nn.CrossEntropyLoss(), precision, distillation=distillation)
    images, targets = normal(1, 8, 3, 32, 32), torch.arange(8)
    step([Batch(images[part].clone(), targets[part], ["x"] * len(targets[part]), []) for part in parts], Progress())
    return projection.weight, model.head.weight

rank = distributed.rank()
halves = trained([slice(4 * rank, 4 * rank + 2), slice(4 * rank + 2, 4 * rank + 4)], True)
for ours, expected, first in zip(halves, trained([slice(0, 8)], False), trained([slice(0, 1)], False)):
    assert max_difference(ours, expected) < 1e-5 < max_difference(first, expected)
""")


def settings(*opts):
    return load_config(DIGITS, [str(word) for pair in opts for word in pair])


def build(*opts, classes=CLASSES):
    return build_distillation(settings(*opts), tiny_model(), classes, CPU, print)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Checkpoints of a model of ours and of one of timm, by name."""
    folder = tmp_path_factory.mktemp("teachers")
    ours, of_timm = another_model(), timm.create_model("test_resnet", num_classes=10)
    torch.save(dict(model=ours.state_dict(), class_names=CLASSES), folder / "ours.pth")
    torch.save(dict(model=another_model(num_classes=7).state_dict()), folder / "seven.pth")
    torch.save(dict(model=ours.state_dict(), class_names=CLASSES[::-1]), folder / "reversed.pth")
    torch.save(dict(model=ours.state_dict(), config=dict(MODEL=dict(TASK="multi"))), folder / "multi.pth")
    torch.save(of_timm.state_dict(), folder / "timm.pth")
    return folder


def test_a_checkpoint_teaches(files):
    distillation = build(("DISTILL.TEACHER", files / "ours.pth"), ("DISTILL.FEATURES", 1))
    images = normal(1, 2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(distillation.teacher(images)[0], another_model().eval()(images))
    assert distillation.projection.weight.shape == (256, 256)


def test_the_teacher_has_its_own_precision():
    network = another_model()
    maps = recorded(network.norm)
    logits, _ = Teacher(network, Precision(CPU, "bf16"), normalisation(3), features=False)(normal(1, 2, 3, 32, 32))
    assert maps[0][0].dtype == torch.bfloat16 and logits.dtype == torch.float32


@pytest.mark.parametrize("name, channels, mean, std", [("test_resnet", 3, 0.5, 0.5), ("resnet10t", 1, 0.449, 0.226)])
def test_a_model_of_timm_teaches(name, channels, mean, std, files, tmp_path):
    """With weights from a file, in the normalisation that it was trained with, not ours; of colours' means the mean for grey."""
    model = timm.create_model(name, num_classes=10, in_chans=channels).eval()
    torch.save(model.state_dict(), tmp_path / "file.pth")
    opts = ("DISTILL.TEACHER", name), ("DISTILL.TEACHER_FILE", tmp_path / "file.pth"), ("MODEL.LIT.IN_CHANS", channels)
    distillation = build_distillation(settings(*opts), tiny_model(in_chans=channels), CLASSES, CPU, print)
    pixels = torch.rand(2, channels, 32, 32)
    ours, deviation = (torch.tensor(values)[:, None, None] for values in normalisation(channels))
    with torch.no_grad():
        expected = model((pixels - mean) / std)
        assert max_difference(distillation.teacher((pixels - ours) / deviation)[0], expected) < 1e-4 * expected.abs().max()


@pytest.mark.parametrize(
    "opts, message",
    [
        ("DISTILL.TEACHER seven.pth", "has 7 classes, but the data has 10"),
        ("DISTILL.TEACHER reversed.pth", r"has other classes \(9, 8, .*\) than the data \(0, 1, .*\), or in another order"),
        ("DISTILL.TEACHER litv2_smal", "neither a file nor a model of ours or of timm; similar names: litv2_small"),
        ("DISTILL.TEACHER missing.pth", "neither a file nor a model"),
        ("DISTILL.TEACHER test_vit DISTILL.TEACHER_FILE timm.pth", "DISTILL.TEACHER_FILE=.*: the weights do not fit"),
        ("DISTILL.TEACHER test_resnet DISTILL.TEACHER_FILE missing.pth", "no checkpoint at .*missing.pth"),
        ("DISTILL.TEACHER test_vit", "the pretrained weights of DISTILL.TEACHER=test_vit cannot be had .*; set DISTILL.TEACHER_FILE"),
        ("DISTILL.TEACHER ours.pth MODEL.LIT.IN_CHANS 1", r"cannot take images of 1 x 32 x 32 \(DATA.IMG_SIZE\): LITv2: expected images"),
        ("DISTILL.TEACHER vit.pth DISTILL.WEIGHT 1.5", r"DISTILL.WEIGHT must lie in \[0, 1\], got 1.5"),
        ("DISTILL.TEACHER ours.pth DISTILL.WEIGHT 0", "nothing would be learnt"),
        ("DISTILL.TEACHER multi.pth", "a classifier of MODEL.TASK multi; a teacher needs that of the student, single"),
        ("DISTILL.TEACHER ours.pth MODEL.TASK multi DATA.DATASET csv", "a classifier of MODEL.TASK single; a teacher needs"),
        ("DISTILL.TEACHER_FILE ours.pth", "DISTILL.TEACHER_FILE needs DISTILL.TEACHER"),
        ("DISTILL.TEMPERATURE 0", "DISTILL.TEMPERATURE must be above 0"),
    ],
)
def test_errors(opts, message, files, monkeypatch):
    monkeypatch.chdir(files)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HOME", str(files))
    words = opts.split()
    with pytest.raises((UserError, OSError), match=message):
        build(*zip(words[::2], words[1::2]))


def test_an_image_size_that_the_teacher_cannot_take(files):
    model = timm.create_model("vit_tiny_patch16_224", num_classes=10)  # its position embeddings are for 224 x 224
    torch.save(model.state_dict(), files / "vit.pth")
    with pytest.raises(UserError, match=r"vit_tiny_patch16_224 cannot take images of 3 x 32 x 32 \(DATA.IMG_SIZE\): .*224") as caught:
        build(("DISTILL.TEACHER", "vit_tiny_patch16_224"), ("DISTILL.TEACHER_FILE", files / "vit.pth"))
    assert "\n" not in str(caught.value)


def trainer(*flags, opts: str = "") -> int:
    return run_program(lambda: main(["--cfg", str(DIGITS), *map(str, flags), "--workers", "0", "--opts", *FAST, *opts.split()]))


@pytest.mark.extra
def test_a_resumed_run_is_the_same(files, tmp_path, monkeypatch, capsys):
    """To the bit, with everything at once: features, mixup, accumulation, moving average, drop path."""
    write = Metrics.write

    def stop_at(metrics, kind, update, **values):
        write(metrics, kind, update, **values)
        if update == 5 and "stopped" in str(metrics.folder):
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Metrics, "write", stop_at)
    opts = f"""DISTILL.TEACHER {files / "ours.pth"} DISTILL.FEATURES 1 AUG.MIXUP 0.8 TRAIN.ACCUMULATION_STEPS 3 MODEL.DROP_PATH_RATE 0.2
    TRAIN.EPOCHS 1 DATA.IMG_SIZE 32"""
    statuses = [trainer("--output", tmp_path / name, opts=opts) for name in ("whole", "stopped", "stopped")]
    assert statuses == [0, 128 + signal.SIGTERM, 0]
    assert re.search("resumed at epoch 0, step (15|18), update", capsys.readouterr().out)
    whole, resumed = (read_checkpoint(tmp_path / name / "litv2_digits/default/latest.pth") for name in ("whole", "stopped"))
    for key in whole.keys() - {"config"}:
        same(whole[key], resumed[key], key)
    assert whole["projection"]["weight"].shape == (256, 128) and not any("projection" in name for name in whole["model"])
    # Without the features there is nothing to go on with.
    assert trainer("--output", tmp_path / "stopped", opts=opts.replace("FEATURES 1", "FEATURES 0")) == 2
    assert "error: a run with DISTILL.FEATURES above 0 cannot be resumed without" in capsys.readouterr().err
