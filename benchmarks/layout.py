"""What channels-last tokens are worth: LITv2 as it is against the same model with channels-first copies.

    python benchmarks/layout.py --batch-size 8 --threads 2

The second model does what the public release does: it copies tokens into a (B, C, H, W) map before each depthwise
convolution and each token merging, and back after it. Both have the same weights and give the same numbers (checked).
"""

from __future__ import annotations

import argparse
import copy

import torch

from harness import interleaved, positive, table
from litv2 import litv2_small
from litv2.layers import DeformableTokenMerging, DepthwiseConv


class ChannelsFirstCopies(torch.nn.Module):
    """Copies tokens to a contiguous (B, C, H, W) map for the module inside, and its result back."""

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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=positive, default=8)
    parser.add_argument("--img-size", type=positive, default=224)
    parser.add_argument("--threads", type=positive, default=2)
    parser.add_argument("--rounds", type=positive, default=15)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    ours = litv2_small().eval()
    copies = with_copies(ours)
    images = torch.randn(args.batch_size, 3, args.img_size, args.img_size)
    with torch.inference_mode():
        torch.testing.assert_close(ours(images), copies(images), rtol=1e-4, atol=1e-5)
        seconds = interleaved({"channels-last": lambda: ours(images), "channels-first copies": lambda: copies(images)}, args.rounds)
    base = seconds["channels-first copies"]
    print(f"LITv2-S, float32, {tuple(images.shape)}, {args.threads} threads, torch {torch.__version__}")
    print(table(["model", "ms", "times as fast"], [[name, f"{1e3 * s:.0f}", f"{base / s:.2f}"] for name, s in seconds.items()]))


if __name__ == "__main__":
    main()
