# SPDX-License-Identifier: Apache-2.0
"""Trains small proxies of the paper's ablations, and rivals of the same multiply-adds, with one recipe and several seeds.

    python benchmarks/proxies.py DIR                                  # DIR/train/CLASS/IMAGE, DIR/val/CLASS/IMAGE
    python benchmarks/proxies.py DIR --tables attention --seeds 0 1 --epochs 30 --width 32 --img-size 64

* attention: other attention in the place of HiLo (table 4);
* lit: from the predecessor LIT to LITv2 (table 5); its row without relative positions is MSA;
* alpha: other shares of Lo-Fi heads (figure 4). Of four heads, the 0.9 of the paper makes three Lo-Fi;
* rivals: models of timm, as many pixels to a token as LITv2, with the width at which their multiply-adds are nearest.

All are trained from scratch on the same images, for the same epochs, by the recipe of the small classifier (litv2-imagenette.yaml) without
moving average; it was chosen for LITv2. The images are first reduced. What depends on the side of the map shrinks with it: a map of stage 3
has 2 x 2 windows of W-MSA, as at 224 pixels, and LIT's tables fit the map.

Top-1 is that of the last epoch. Intervals are Student's, 95 %, over the seeds; the difference to LITv2 is that of runs with the same seed.
An order of two rows that is published is "seen" if the interval of their difference lies above 0, "not seen" if it lies below, and
otherwise "undecided". The time is that of inference in eager mode, all models in turns. A run that was stopped is resumed by the same
command, and a finished one is not repeated, with other seeds neither: two commands with different seeds use two cores.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

import timm
import torch
from timm.models.pvt_v2 import OverlapPatchEmbed
from torch import Tensor, nn
from yacs.config import CfgNode

from harness import COLOURS, figure, fingerprint, milliseconds, multiply_adds, parser, positive, publish, samples, say
from litv2 import LITv2
from litv2.attentions import RelativeSelfAttention, WindowAttention
from litv2.errors import UserError, run_program
from litv2.files import atomic_write
from litv2.image_list import image_list
from litv2.preprocess import read_image
from trainings import interval, judge, train

DEPTHS, HEADS, DROP_PATH = (1, 1, 2, 1), (1, 2, 4, 8), 0.1
PATCH = 2  # a quarter of the pixels to a token that the paper has: the images are small


@dataclass(frozen=True)
class Size:
    """Of images in pixels, and the channels of stage 1."""

    image: int
    width: int


def litv2(size: Size, classes: int, **options) -> LITv2:
    model = LITv2(
        num_classes=classes, patch_size=PATCH, embed_dim=size.width, depths=DEPTHS, num_heads=HEADS, drop_path_rate=DROP_PATH, **options
    )
    for module in model.modules():
        if isinstance(module, WindowAttention):
            module.window = size.image // 16
        if isinstance(module, RelativeSelfAttention):
            module.fit(module.side * size.image // 224)
    return model


class Rival(nn.Module):
    """A model of timm with what the trainer asks of a LITv2."""

    layers = ()  # for learning rates by layer, which are not used

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network, self.num_classes = network, network.num_classes

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images)

    def no_weight_decay(self) -> set[str]:
        return {f"network.{name}" for name in getattr(self.network, "no_weight_decay", set)()}

    def flops(self, H: int, W: int) -> int:
        return multiply_adds(self, torch.zeros(1, 3, H, W, device=next(self.parameters()).device))


def resnet(size: Size, classes: int) -> nn.Module:
    width = size.width
    model = timm.create_model(
        "resnet50d", num_classes=classes, layers=DEPTHS, channels=tuple(width * 2**i for i in range(4)), stem_width=width // 2,
        drop_path_rate=DROP_PATH,
    )  # fmt: skip
    model.maxpool = nn.Identity()
    return model


def convnext(size: Size, classes: int) -> nn.Module:
    dims = tuple(size.width * 2**i for i in range(4))
    model = timm.create_model("convnext_tiny", num_classes=classes, depths=DEPTHS, dims=dims, patch_size=PATCH, drop_path_rate=DROP_PATH)
    model.stages[0].downsample = nn.Identity()  # timm halves the map once more after patches of 2 x 2
    return model


def swin(size: Size, classes: int) -> nn.Module:
    return timm.create_model(
        "swin_tiny_patch4_window7_224", num_classes=classes, img_size=size.image, patch_size=PATCH, window_size=size.image // 16,
        embed_dim=size.width, depths=DEPTHS, num_heads=HEADS, drop_path_rate=DROP_PATH,
    )  # fmt: skip


def pvt(size: Size, classes: int) -> nn.Module:
    heads = (1, 2, 5, 8)  # timm's, and so are the channels: as many to each head
    model = timm.create_model(
        "pvt_v2_b2", num_classes=classes, embed_dims=tuple(size.width * count for count in heads), depths=DEPTHS, num_heads=heads,
        drop_path_rate=DROP_PATH,
    )  # fmt: skip
    patches = OverlapPatchEmbed(patch_size=2 * PATCH - 1, stride=PATCH, embed_dim=size.width)  # timm's of 4 pixels reach over 7
    model.patch_embed = patches.apply(model._init_weights)
    return model


def xcit(size: Size, classes: int) -> nn.Module:
    return timm.create_model(
        "xcit_small_12_p8_224", num_classes=classes, img_size=size.image, embed_dim=4 * size.width, depth=sum(DEPTHS), num_heads=HEADS[2],
        cls_attn_layers=1, drop_path_rate=DROP_PATH,
    )  # fmt: skip


def matched(make: Callable[[Size, int], nn.Module], size: Size, classes: int) -> Rival:
    return Rival(make(replace(size, width=matched_width(make, size)), classes))


@cache
def matched_width(make: Callable[[Size, int], nn.Module], size: Size) -> int:
    """The even width at which a model's multiply-adds are nearest to those of LITv2; they rise with the width."""

    def flops(width: int) -> int:
        return Rival(make(replace(size, width=width), 10)).flops(size.image, size.image)

    with torch.device("meta"):
        wanted, widths = litv2(size, 10).flops(size.image, size.image), range(4, 4 * size.width, 2)
        first = bisect_left(widths, wanted, key=flops)
        return min(widths[max(0, first - 1) : first + 1], key=lambda width: abs(flops(width) - wanted))


OURS = "LITv2"
ATTENTION = {"MSA": "msa", "SRA": "sra", "W-MSA": "w-msa", "T-MSA": "t-msa"}
ALPHA = (0.0, 0.25, 0.5, 1.0)
RIVALS = {"ResNet-50-D": resnet, "Swin-T": swin, "PVTv2-B2": pvt, "XCiT-S12/8": xcit, "ConvNeXt-T": convnext}
ROWS: dict[str, Callable[[Size, int], nn.Module]] = {
    OURS: litv2,
    **{name: partial(litv2, attention=attention) for name, attention in ATTENTION.items()},
    "LIT": partial(litv2, attention="relative-msa", conv_ffn=False),
    "LIT + ConvFFN": partial(litv2, attention="relative-msa"),
    **{f"alpha {alpha:g}": partial(litv2, alpha=alpha) for alpha in ALPHA},
    **{name: partial(matched, make) for name, make in RIVALS.items()},
}
TABLES = {
    "attention": (OURS, *ATTENTION),
    "lit": ("LIT", "LIT + ConvFFN", "MSA", OURS),
    "alpha": (OURS, *(f"alpha {alpha:g}" for alpha in ALPHA)),
    "rivals": (OURS, *RIVALS),
}
CLAIMS = {  # (the better row, the worse one), by where the order is published; of table 4 and 5 the paper's figures are not at hand
    "in words": ((OURS, "SRA"), (OURS, "W-MSA"), (OURS, "T-MSA"), ("LIT + ConvFFN", "LIT"), ("LIT + ConvFFN", "MSA")),
    "released weights": tuple((OURS, f"alpha {alpha:g}") for alpha in ALPHA),  # 0.25 stands for their 0.2
    "top-1 at full size": ((OURS, "ResNet-50-D"), (OURS, "Swin-T"), ("ConvNeXt-T", OURS)),  # of ResNet-50 without -D
}
Curves = dict[str, list[dict[int, float]]]  # by row: of each seed the top-1 by epoch


def main() -> None:
    flags = parser(__doc__, "proxies")
    flags.add_argument("data_path", type=Path, metavar="DIR")
    flags.add_argument("--tables", nargs="+", choices=TABLES, default=list(TABLES), metavar="NAME", help=f"of {', '.join(TABLES)}")
    flags.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N", help="at least two (default: 0 1 2)")
    flags.add_argument("--epochs", type=positive, default=10, metavar="N", help="default: 10")
    flags.add_argument("--img-size", type=positive, default=48, metavar="N", help="side in pixels, a multiple of 16 (default: 48)")
    flags.add_argument("--width", type=positive, default=16, metavar="N", help="channels of stage 1, a multiple of 8 (default: 16)")
    flags.add_argument("--batch-size", type=positive, default=8, help="of the timed inference (default: 8)")
    args = flags.parse_args()
    check(args)
    torch.set_num_threads(args.threads)
    size, names = Size(args.img_size, args.width), [name for name in ROWS if any(name in TABLES[table] for table in args.tables)]
    settings = recipe(args.epochs, args.img_size)
    runs = args.out.with_name(f"{args.out.name}_runs") / fingerprint(args.data_path.resolve(), args.width, settings)
    images = reduced(args.data_path, runs / "images", args.img_size * 4 // 3)
    classes = sum(path.is_dir() for path in (images / "train").iterdir())
    models = {name: ROWS[name](size, classes).eval() for name in names}
    curves: Curves = {name: [] for name in names}
    for seed in args.seeds:
        for name in names:
            folder = runs / "runs" / f"{name.replace(' ', '-').replace('/', '-')}-{seed}"
            curves[name].append(train(folder, seed, images, settings, build=partial(build, ROWS[name], size)))
            say(f"{name}, seed {seed}: {curves[name][-1][args.epochs]:.1f} %")
    say("timing")
    pixels = torch.randn(args.batch_size, 3, args.img_size, args.img_size)
    with torch.inference_mode():
        seconds = samples({name: partial(model, pixels) for name, model in models.items()}, args.rounds, args.warm_up)
    rows = [row(name, models[name], curves, seconds[name], args) for name in names]
    title = f"{args.img_size} x {args.img_size} pixels, {args.epochs} epochs, {len(args.seeds)} seeds; ms of {args.batch_size} images"
    about = dict(settings=settings, width=args.width, seeds=args.seeds, data=args.data_path.name)
    publish(rows, args.out, title, partial(draw, curves=curves), "\n".join(f"* {line}" for line in claimed(curves)), **about)


def build(make: Callable[[Size, int], nn.Module], size: Size, config: CfgNode, classes: int) -> nn.Module:
    """The trainer's ``build``, of which the configuration says nothing here."""
    return make(size, classes)


def check(args: argparse.Namespace) -> None:
    """Raises UserError unless the flags fit the models."""
    if len(set(args.seeds)) < max(2, len(args.seeds)):
        raise UserError(f"--seeds {' '.join(map(str, args.seeds))}: an interval needs at least two, and all different")
    for flag, value, unit in (("--img-size", args.img_size, 16), ("--width", args.width, 8)):
        if value % unit:
            raise UserError(f"{flag} {value}: expected a multiple of {unit}")


def recipe(epochs: int, side: int) -> list[str]:
    """The settings of all runs, as the trainer's --opts."""
    settings = {
        "DATA.IMG_SIZE": side, "TEST.IMG_SIZE": side, "TRAIN.EPOCHS": epochs, "TRAIN.WARMUP_EPOCHS": epochs // 10, "TRAIN.EMA_DECAY": 0,
        "TRAIN.ACCUMULATION_STEPS": 1, "EVAL_FREQ": -(-epochs // 6),
    }  # fmt: skip
    return [str(word) for pair in settings.items() for word in pair]


def reduced(source: Path, target: Path, side: int) -> Path:
    """Copies the images with a short side of ``side`` pixels, unless that has been done: reading them takes longer than a small network."""
    for split in ("train", "val"):
        if not [path for path in (source / split).glob("*") if path.is_dir()]:
            raise UserError(f"{source}: expected {source}/{split}/CLASS/IMAGE, and there is no folder of a class")
        for path in image_list([source / split]):
            copy = target / path.relative_to(source).parent / f"{path.name}.png"
            if not copy.exists():
                image = read_image(path)
                scale = side / min(image.size)
                copy.parent.mkdir(parents=True, exist_ok=True)
                with atomic_write(copy) as draft:
                    image.resize((round(image.width * scale), round(image.height * scale)), reducing_gap=3).save(draft, format="PNG")
    return target


def row(name: str, model: nn.Module, curves: Curves, seconds: Sequence[float], args: argparse.Namespace) -> dict:
    top1, (low, high) = last(curves[name]), interval(last(curves[name]))
    differences = [a - b for a, b in zip(top1, last(curves[OURS]))]
    return dict(
        model=name,
        tables=" ".join(table for table in args.tables if name in TABLES[table]),
        parameters_M=round(sum(parameter.numel() for parameter in model.parameters()) / 1e6, 3),
        MFLOPs=round(model.flops(args.img_size, args.img_size) / 1e6, 2),
        top1=round(statistics.fmean(top1), 1),
        interval=f"{low:.1f} to {high:.1f}",
        over_LITv2=None if name == OURS else round(statistics.fmean(differences), 1),
        over_LITv2_interval=None if name == OURS else "{:.1f} to {:.1f}".format(*interval(differences)),
        **milliseconds(list(seconds), 2),
    )


def last(curves: Sequence[dict[int, float]]) -> list[float]:
    """The top-1 of the last epoch of each seed."""
    return [curve[max(curve)] for curve in curves]


def claimed(curves: Curves) -> list[str]:
    """A line for each order of two trained rows that is published."""
    lines = []
    for source, orders in CLAIMS.items():
        for better, worse in orders:
            if better in curves and worse in curves:
                differences = [a - b for a, b in zip(last(curves[better]), last(curves[worse]))]
                low, high = interval(differences)
                word = judge(differences, "seen", "not seen")
                figures = f"{statistics.fmean(differences):+.1f}, {low:+.1f} to {high:+.1f}"
                lines.append(f"{better} above {worse} ({source}): {word} ({figures})")
    return lines


def draw(rows: list[dict], path: Path, curves: Curves) -> None:
    """Plots the mean top-1 over the seeds by epoch, a panel for each table."""
    tables = [table for table in TABLES if any(table in row["tables"].split() for row in rows)]
    with figure(path, len(tables), (3.6 * len(tables), 3.4)) as panels:
        for axes, table in zip(panels if len(tables) > 1 else [panels], tables):
            styles = ((colour, line) for line in (".-", "x--") for name, colour in COLOURS.items() if name != "ours")
            for name in TABLES[table]:
                epochs = list(curves[name][0])
                means = [statistics.fmean(curve[epoch] for curve in curves[name]) for epoch in epochs]
                colour, line = (COLOURS["ours"], ".-") if name == OURS else next(styles)
                axes.plot(epochs, means, line, label=name, linewidth=2 if name == OURS else 1, color=colour)
            axes.set(title=table, xlabel="epoch", ylabel="top-1 (%), mean of the seeds")
            axes.legend(fontsize=7, frameon=False)


if __name__ == "__main__":
    sys.exit(run_program(main))
