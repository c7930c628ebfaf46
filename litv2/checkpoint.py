"""Weights from files nobody vouches for: read without running their code, loaded strictly, with a readable report."""

from __future__ import annotations

import json
from collections import Counter, OrderedDict
from collections.abc import Collection, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from .download import fetch
from .safe_file import check_format, check_pickles
from .safe_pickle import CONFIG_NODE

__all__ = ["described", "fetch", "find_weights", "infer_arguments", "load_weights", "read_checkpoint"]

_EMA = ("ema", "state_dict_ema", "model_ema")  # ours, timm's today and before
_PLAIN = ("model", "state_dict")
_PREFIXES = ("module.", "_orig_mod.", "backbone.")  # of DDP and averages, of torch.compile, of a backbone in a detector
_DEEPEST_WRAPPING = 10
LISTED = 8  # keys of each kind in an error; another variant differs in hundreds
ALPHAS = (0.9, 0.5, 0.0, 1.0, 0.2, 0.4, 0.7)  # the published ones


def read_checkpoint(path: str | Path, also: Sequence = ()) -> dict:
    """The content of a checkpoint file, on the CPU: tensors and builtins only, no code of the file is run.

    Files of torch.save, old and new, and of safetensors are told apart by their content. The release's pickled configuration is
    a plain dictionary. What the file claims is checked before torch reads it (:mod:`litv2.safe_file`).

    Args:
        also: other classes that the file may hold, as for ``torch.serialization.safe_globals``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, is no checkpoint or holds other objects.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    try:
        kind = check_format(path)
        if kind == "safetensors":
            return _read_safetensors(path)
        check_pickles(path, kind, {_global_name(entry) for entry in also})
        # A Counter stands in for the configuration's class: it takes entries and attributes, and one of its own has none of these.
        with torch.serialization.safe_globals([(Counter, CONFIG_NODE), *also]):
            content = torch.load(path, map_location="cpu", weights_only=True)
        content = _made_plain(content)
    except ImportError:
        raise
    except Exception as error:  # a damaged file fails in any of torch's layers: zip, pickle, storage
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} cannot be read as a checkpoint (damaged, or not plain tensors): {reason}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, expected a dictionary")
    return content


def _global_name(entry) -> str:
    return entry[1] if isinstance(entry, tuple) else f"{entry.__module__}.{entry.__qualname__}"


def _read_safetensors(path: Path) -> dict:
    """{"model": weights, ...}: the metadata that ``python -m litv2 convert`` writes, and that of others, are further entries."""
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise ImportError(f"{path}: reading it needs the package safetensors: pip install safetensors") from error
    try:
        with safe_open(path, framework="pt") as file:
            names = file.keys()
            content = {key: _decoded(value) for key, value in (file.metadata() or {}).items()}
            return {**content, "model": {name: file.get_tensor(name) for name in names}}
    except SafetensorError as error:
        raise ValueError(str(error)) from error


def _decoded(text: str):
    try:
        return json.loads(text)
    except ValueError:
        return text  # of other programs: metadata is text, whatever it says


def _made_plain(content):
    """Exchanges the stand-ins of configurations for dictionaries, in place, and checks every tensor.

    Nothing is copied twice and nothing recurses, however the file's objects share and contain each other.
    """
    root, twins = [content], {}
    pending, seen = [root], set()

    def plain(value):
        if type(value) is not Counter or not vars(value):
            return value
        if id(value) not in twins:
            twins[id(value)] = (dict(value), value)  # the original is kept, so that its id stays its own
        return twins[id(value)][0]

    while pending:
        value = pending.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            if value.numel() * value.element_size() > value.untyped_storage().nbytes():
                raise ValueError(f"a tensor of the shape {tuple(value.shape)} is expanded from fewer values in the file")
        elif isinstance(value, OrderedDict):
            for name in set(vars(value)) - {"_metadata"}:  # any other would hide a method
                del vars(value)[name]
        if isinstance(value, dict):
            for key, item in value.items():
                value[key] = plain(item)
            pending += value.values()
        elif isinstance(value, list):
            value[:] = map(plain, value)
            pending += value
        elif isinstance(value, tuple):
            pending += value
    return root[0]


def find_weights(checkpoint: dict, which: str | None = None, backbone_only: bool = True) -> dict[str, Tensor]:
    """The model's state dict in any known format: ours, the release's, timm's, mmengine's, or a bare one.

    Prefixes that wrappers leave (DDP, compile, a detector's ``backbone.``) are removed, in any order; of a detector's file only the
    backbone is kept.

    Args:
        which: "ema" for the moving average, "model" for the weights it was taken of, None for the average where there is one.
        backbone_only: False keeps a detector's neck and heads, and the prefix ``backbone.`` of its backbone.

    Raises:
        ValueError: there are no weights, or not those that are asked for.
    """
    if which not in (None, "ema", "model"):
        raise ValueError(f"{which=} must be 'ema', 'model' or None")
    entries = {key for key in (*_EMA, *_PLAIN, "ema_state_dict") if isinstance(checkpoint.get(key), dict)}
    average = [key for key in _EMA if key in entries]
    plain = [key for key in _PLAIN if key in entries]
    if {"state_dict", "ema_state_dict"} <= entries:
        # mmengine's EMAHook exchanges the two when it saves, so that state_dict is the average.
        average, plain = ["state_dict"], ["ema_state_dict"]
    if which == "ema" and not average:
        raise ValueError(f"the checkpoint has no moving average; its entries are {_names(checkpoint)}")
    chosen = plain if which == "model" else average or plain
    if chosen:
        checkpoint = checkpoint[chosen[0]]
    elif which == "model" and average:
        raise ValueError(f"the checkpoint has the moving average alone; its entries are {_names(checkpoint)}")
    weights = {key: value for key, value in checkpoint.items() if isinstance(key, str) and isinstance(value, Tensor)}
    if not weights:
        raise ValueError(f"no weights found; the checkpoint's entries are {_names(checkpoint)}")
    prefixes = _PREFIXES if backbone_only else _PREFIXES[:-1]
    for _ in range(_DEEPEST_WRAPPING):
        prefix = next((prefix for prefix in prefixes if any(key.startswith(prefix) for key in weights)), None)
        if prefix is None:
            return weights
        weights = {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
    raise ValueError(f"the names of the weights are wrapped more than {_DEEPEST_WRAPPING} times")


def _names(checkpoint: dict) -> list[str]:
    return sorted(str(key)[:50] for key in checkpoint)[:20]


def load_weights(
    model: nn.Module,
    weights: dict[str, Tensor],
    new_heads: Collection[str] = (),
    may_miss: Collection[str] = (),
    may_have: Collection[str] = (),
) -> list[str]:
    """Loads strictly, or raises and leaves the model as it was.

    Args:
        new_heads: for fine-tuning: modules that keep their initialisation where the file's are of another shape, that is,
            for other classes.
        may_miss: keys of the model that the file need not have; they keep their initialisation.
        may_have: keys of the file that the model need not have; they are left out.

    Returns:
        Lines that say what was not taken from the file; empty when everything was.

    Raises:
        ValueError: keys missing, unexpected or of another shape; the message lists the first of them.
    """
    notes = []
    own = model.state_dict()
    weights = dict(weights)
    for head in new_heads:
        keys = [f"{head}.weight", f"{head}.bias"]
        if any(key in own and key in weights and own[key].shape != weights[key].shape for key in keys):
            theirs, ours = (len(state[keys[0]]) for state in (weights, own))
            weights.update({key: own[key] for key in keys})
            notes.append(f"{head} is newly initialised, for other classes: it has {theirs} outputs in the file, {ours} in this model")
    new = sorted((own.keys() - weights.keys()) & set(may_miss))
    unused = sorted((weights.keys() - own.keys()) & set(may_have))
    if new:
        notes.append(f"newly initialised, not in the file: {', '.join(new)}")
    if unused:
        notes.append(f"in the file, not used: {', '.join(unused)}")
    weights = {key: value for key, value in weights.items() if key not in unused} | {key: own[key] for key in new}
    missing = sorted(own.keys() - weights.keys())
    unexpected = sorted(weights.keys() - own.keys())
    shapes = [
        f"{key} {tuple(weights[key].shape)} instead of {tuple(own[key].shape)}"
        for key in own.keys() & weights.keys()
        if weights[key].shape != own[key].shape
    ]
    if missing or unexpected or shapes:
        parts = (("missing", missing), ("unexpected", unexpected), ("of another shape", sorted(shapes)))
        report = "".join(f"\n  {what} ({len(keys)}): {_some(keys)}" for what, keys in parts if keys)
        raise ValueError(f"the weights do not fit this {type(model).__name__}; is it another variant?{report}")
    model.load_state_dict(weights, strict=True)
    return notes


def _some(keys: list[str]) -> str:
    return ", ".join(keys[:LISTED]) + (f" ... and {len(keys) - LISTED} more" if len(keys) > LISTED else "")


def infer_arguments(weights: dict[str, Tensor], config: dict | None = None) -> dict:
    """The arguments of :class:`litv2.LITv2` that a state dict, as :func:`find_weights` gives it, was made with.

    Shapes tell everything but HiLo's windows and, where they are not 32 channels wide, the heads: these come from the
    checkpoint's ``config`` where it describes the same network, else they are the published ones: 2 in a stage with both kinds of
    heads, plain attention (1) in a last stage with Lo-Fi heads alone. ``alpha`` is one that gives the same heads.

    Raises:
        ValueError: these are not the weights of a LITv2, or the number of heads is not known.
    """
    try:
        embed_dim, in_chans, patch_size, _ = weights["patch_embed.proj.weight"].shape
        places = {tuple(map(int, key.split(".")[1:4:2])) for key in weights if key.startswith("layers.") and ".blocks." in key}
        depths = [sum(stage == i for stage, _ in places) for i in range(1 + max(stage for stage, _ in places))]
        mlp_ratio = len(weights["layers.0.blocks.0.mlp.fc1.bias"]) / embed_dim
    except (KeyError, ValueError) as error:
        raise ValueError(f"these are not the weights of a LITv2 ({error}); their names begin {sorted(weights)[:5]}") from error

    lit = described(config, embed_dim, depths)
    dims = [embed_dim * 2**i for i in range(len(depths))]
    if lit is None and embed_dim % 32:
        raise ValueError(f"the heads of a model of {embed_dim} channels are not known: the checkpoint has no configuration that says")
    num_heads = list(lit["NUM_HEADS"]) if lit else [dim // 32 for dim in dims]

    def width(stage: int, name: str) -> int:
        """Outputs of a projection of the stage's attention, 0 where there is none."""
        weight = weights.get(f"layers.{stage}.blocks.0.attn.{name}.weight")
        return 0 if weight is None else len(weight)

    lofi = [width(i, "l_proj") * heads // dim for i, (heads, dim) in enumerate(zip(num_heads, dims))]
    hifi = [width(i, "h_proj") * heads // dim for i, (heads, dim) in enumerate(zip(num_heads, dims))]
    last = len(depths) - 1
    windows = [0 if not low + high else 1 if i == last and not high else 2 for i, (low, high) in enumerate(zip(lofi, hifi))]
    if lit:
        windows = list(lit["LOCAL_WS"])
    shares = [(heads, low) for heads, low, window in zip(num_heads, lofi, windows) if window > 1]
    exact = [(low + 0.5) / heads if low < heads else 1.0 for heads, low in shares]  # the half keeps int() from rounding down
    alpha = next((a for a in (*ALPHAS, *exact) if all(int(heads * a) == low for heads, low in shares)), None)
    if alpha is None:
        raise ValueError(f"no alpha gives the Lo-Fi heads {[low for _, low in shares]} of {[heads for heads, _ in shares]} heads")
    return dict(
        in_chans=in_chans,
        num_classes=len(weights["head.weight"]) if "head.weight" in weights else 0,
        patch_size=patch_size,
        embed_dim=embed_dim,
        depths=tuple(depths),
        num_heads=tuple(num_heads),
        mlp_ratio=mlp_ratio,
        qkv_bias=any(key.endswith((".l_q.bias", ".h_qkv.bias")) for key in weights),
        local_ws=tuple(windows),
        alpha=alpha,
    )


def described(config: dict | None, embed_dim: int, depths: Sequence[int]) -> dict | None:
    """The section MODEL.LIT of a trainer's configuration, if it is of a network of these widths and depths."""
    try:
        lit = config["MODEL"]["LIT"]
        same = lit["EMBED_DIM"] == embed_dim and list(lit["DEPTHS"]) == list(depths)
        return lit if same and len(lit["NUM_HEADS"]) == len(lit["LOCAL_WS"]) == len(depths) else None
    except (KeyError, TypeError):
        return None
