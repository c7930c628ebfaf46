# SPDX-License-Identifier: Apache-2.0
"""Measures the benefit of channels-last tokens: LITv2 against the same model with channels-first copies.

    python benchmarks/layout.py --batch-size 8 --threads 2
    python benchmarks/layout.py --device cuda --batch-size 64

The second model works like the public release: it copies tokens into a (B, C, H, W) map before each depthwise convolution
and token merging, and back afterwards. Both have the same weights and give the same outputs, which is checked.
Writes JSON and CSV.
"""

from __future__ import annotations

import copy
import statistics
import sys
from functools import partial

import torch

from harness import device_name, milliseconds, parser, positive, publish, samples
from litv2 import litv2_small
from litv2.errors import run_program
from litv2.layers import DeformableTokenMerging, DepthwiseConv


class ChannelsFirstCopies(torch.nn.Module):
    """Copies tokens to a contiguous (B, C, H, W) map for the inner module, and its output back."""

    def __init__(self, inner: DepthwiseConv | DeformableTokenMerging):
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.permute(0, 3, 1, 2).contiguous()
        if isinstance(self.inner, DepthwiseConv):
            x = torch.nn.functional.gelu(self.inner.dwconv(x))
        else:
            x = self.inner.act(self.inner.norm_layer(self.inner.dconv(x).contiguous()))
        return x.permute(0, 2, 3, 1).contiguous()


def with_copies(model: torch.nn.Module) -> torch.nn.Module:
    model = copy.deepcopy(model)
    for stage in model.layers:
        for block in stage.blocks:
            block.mlp.dwconv = ChannelsFirstCopies(block.mlp.dwconv)
        if stage.downsample is not None:
            stage.downsample = ChannelsFirstCopies(stage.downsample)
    return model


def main() -> None:
    flags = parser(__doc__, "layout")
    flags.add_argument("--batch-size", type=positive, default=8)
    flags.add_argument("--img-size", type=positive, default=224)
    flags.add_argument("--device", type=device_name, default="cpu")
    args = flags.parse_args()
    torch.set_num_threads(args.threads)
    ours = litv2_small().eval().to(args.device)
    models = {"channels-last": ours, "channels-first copies": with_copies(ours)}
    images = torch.randn(args.batch_size, 3, args.img_size, args.img_size, device=args.device)
    with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        torch.testing.assert_close(*(model(images) for model in models.values()), rtol=1e-4, atol=1e-5)
    with torch.inference_mode():
        calls = {name: partial(model, images) for name, model in models.items()}
        seconds = samples(calls, args.rounds, args.warm_up, device=args.device)
    slower = statistics.median(seconds["channels-first copies"])
    rows = [
        dict(tokens=name, **milliseconds(values), times_as_fast=round(slower / statistics.median(values), 2))
        for name, values in seconds.items()
    ]
    title = f"LITv2-S, float32, batch {args.batch_size}, {args.img_size} x {args.img_size}, medians of {args.rounds} interleaved rounds"
    publish(rows, args.out, title, device=args.device, batch_size=args.batch_size, img_size=args.img_size)


if __name__ == "__main__":
    sys.exit(run_program(main))
