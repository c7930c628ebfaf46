# SPDX-License-Identifier: Apache-2.0
"""Infers the architecture of a state dict from its shapes and the checkpoint's configuration."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..attentions import ATTENTIONS
from ..errors import UserError, listed

__all__ = ["infer_arguments"]

LARGEST_WINDOW = 64  # maps are padded to whole windows: a file must not choose how much memory that takes
ALPHAS = (0.9, 0.5, 0.0, 1.0, 0.2, 0.4, 0.7)  # the published ones


def infer_arguments(weights: dict[str, Tensor], config: dict | None = None) -> tuple[dict, list[str]]:
    """Infers the arguments of :class:`litv2.LITv2` from a state dict as returned by :func:`find_weights`.

    The shapes determine everything except HiLo's windows and heads, which are taken from the checkpoint's ``config`` if it describes
    the same network. Otherwise they are assumed to be as in the published models: heads of 32 channels; windows of 2 in a stage with
    both kinds of heads, plain attention (1) in a last stage with Lo-Fi heads only. ``alpha`` is a value that gives the same heads.
    Other attention than HiLo is that of the configuration, or what the names of its parameters tell.

    Returns:
        The arguments, and the names of those that are assumed.

    Raises:
        UserError: these are not the weights of a LITv2, or the number of heads or the kind of attention is unknown.
    """
    try:
        embed_dim, in_chans, patch_size, _ = weights["patch_embed.proj.weight"].shape
        places = {tuple(map(int, key.split(".")[1:4:2])) for key in weights if key.startswith("layers.") and ".blocks." in key}
        depths = [sum(stage == i for stage, _ in places) for i in range(1 + max(stage for stage, _ in places))]
        mlp_ratio = len(weights["layers.0.blocks.0.mlp.fc1.bias"]) / embed_dim
    except (KeyError, ValueError) as error:
        raise UserError(f"these are not the weights of a LITv2 ({error}); the first keys are {sorted(weights)[:5]}") from error

    lit = _section(config, embed_dim, depths)
    dims = [embed_dim * 2**i for i in range(len(depths))]
    if lit is None and embed_dim % 32:
        raise UserError(f"the number of heads of a model with {embed_dim} channels is unknown: the checkpoint has no configuration for it")
    num_heads = list(lit["NUM_HEADS"]) if lit else [dim // 32 for dim in dims]
    if not all(0 < heads <= dim for heads, dim in zip(num_heads, dims)):
        raise UserError(f"the checkpoint's configuration has numbers of heads that do not fit {dims} channels")

    def width(stage: int, name: str) -> int:
        """Returns the outputs of a projection in the stage's attention, 0 if there is none."""
        weight = weights.get(f"layers.{stage}.blocks.0.attn.{name}.weight")
        return 0 if weight is None else len(weight)

    lofi = [width(i, "l_proj") * heads // dim for i, (heads, dim) in enumerate(zip(num_heads, dims))]
    hifi = [width(i, "h_proj") * heads // dim for i, (heads, dim) in enumerate(zip(num_heads, dims))]
    last = len(depths) - 1
    attention = _attention(weights, lit)
    if attention != "hilo":  # its windows are not HiLo's: they only tell the stages that have it
        lofi = [width(i, "proj") for i in range(len(depths))]
    windows = [0 if not low + high else 1 if i == last and not high else 2 for i, (low, high) in enumerate(zip(lofi, hifi))]
    if lit:
        windows = list(lit["LOCAL_WS"])
        if max(windows) > LARGEST_WINDOW:
            raise UserError(f"the checkpoint's configuration has a window of more than {LARGEST_WINDOW} tokens")
    shares = [(heads, low) for heads, low, window in zip(num_heads, lofi, windows) if window > 1 and attention == "hilo"]
    exact = [(low + 0.5) / heads if low < heads else 1.0 for heads, low in shares]  # adding one half keeps int() from rounding down
    alpha = next((a for a in (*ALPHAS, *exact) if all(int(heads * a) == low for heads, low in shares)), None)
    if alpha is None:
        raise UserError(f"no alpha gives {[low for _, low in shares]} Lo-Fi heads out of {[heads for heads, _ in shares]} heads per stage")
    arguments = dict(
        in_chans=in_chans,
        num_classes=len(weights["head.weight"]) if "head.weight" in weights else 0,
        patch_size=patch_size,
        embed_dim=embed_dim,
        depths=tuple(depths),
        num_heads=tuple(num_heads),
        mlp_ratio=mlp_ratio,
        qkv_bias=any(key.endswith((".l_q.bias", ".h_qkv.bias", ".attn.q.bias", ".attn.qkv.bias")) for key in weights),
        local_ws=tuple(windows),
        alpha=alpha,
        attention=attention,
        conv_ffn=any(".mlp.dwconv." in key for key in weights),
    )
    return arguments, [] if lit or not any(windows) else ["num_heads", "local_ws"]


def _attention(weights: dict[str, Tensor], lit: dict | None) -> str:
    """Returns the kind of attention; that weights do not fit the one of a configuration is found when they are loaded."""
    if lit and "ATTENTION" in lit:
        if lit["ATTENTION"] not in ATTENTIONS:
            raise UserError(f"the checkpoint's configuration has MODEL.LIT.ATTENTION={lit['ATTENTION']!r}, expected {listed(ATTENTIONS)}")
        return lit["ATTENTION"]
    parts = {key.partition(".attn.")[2].partition(".")[0] for key in weights if ".attn." in key}
    if "relative_position_bias_table" in parts:
        return "relative-msa"
    if "q" in parts:
        return "t-msa" if "qkv" in parts else "sra"
    if "qkv" in parts:
        raise UserError("the attention of this model is msa or w-msa: the checkpoint has no configuration that tells which")
    return "hilo"


def _section(config: dict | None, embed_dim: int, depths: Sequence[int]) -> dict | None:
    """Returns the section MODEL.LIT of a trainer's configuration if it describes a network of this width and these depths."""
    if config is None:
        return None
    try:
        lit = config["MODEL"]["LIT"]
        same = lit["EMBED_DIM"] == embed_dim and list(lit["DEPTHS"]) == list(depths)
        lists = lit["NUM_HEADS"], lit["LOCAL_WS"]
        return lit if same and all(len(each) == len(depths) and {*map(type, each)} == {int} for each in lists) else None
    except (KeyError, TypeError):
        return None
