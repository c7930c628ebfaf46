# SPDX-License-Identifier: Apache-2.0
"""Trainings that benchmarks compare: their intervals, what is trained, resumed and refused."""

from __future__ import annotations

import json
import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import stats

from command_helpers import run_here
from document_helpers import documented, table
from helpers import ROOT, write_images
from litv2.attentions import RelativeSelfAttention, WindowAttention
from litv2.errors import UserError

sys.path.append(str(ROOT / "benchmarks"))
import harness  # noqa: E402
import proxies  # noqa: E402
import trainings  # noqa: E402

SIZE = proxies.Size(48, 16)


def test_intervals_and_verdicts():
    for values in ([1.0, 3.0], [48.2, 51.0, 49.4], [-2.0, 0.5, 1.0, 4.0]):
        expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
        assert trainings.interval(values) == pytest.approx((expected.low, expected.high))
    words = [trainings.judge(values, "seen", "not seen") for values in ([3.0, 3.1, 2.9], [-3.0, -3.1, -2.9], [3.0, -1.0, 2.0])]
    assert words == ["seen", "not seen", "undecided"]


def test_claims():
    """Of the rows that were trained, the last epochs of the same seed are compared."""
    curves = {"LITv2": [{1: 10.0, 2: 50.0}, {1: 90.0, 2: 60.0}], "SRA": [{1: 80.0, 2: 45.0}, {1: 0.0, 2: 55.5}]}
    curves["ConvNeXt-T"] = [{2: 49.0}, {2: 59.0}]
    sra, above = proxies.claimed(curves)
    assert above == "ConvNeXt-T above LITv2 (top-1 at full size): not seen (-1.0, -1.0 to -1.0)"
    assert sra.startswith("LITv2 above SRA (in words): seen (+4.8, +1.6 to +7.9)")  # differences 5.0 and 4.5; Student's t is 12.7


def test_the_plot(tmp_path):
    """A panel for each table, with all of its rows."""
    rows = [dict(tables=" ".join(table for table, names in proxies.TABLES.items() if name in names)) for name in proxies.ROWS]
    proxies.draw(rows, tmp_path / "curves.png", {name: [{1: 10.0 + i, 2: 20.0 + i}] for i, name in enumerate(proxies.ROWS)})
    assert (tmp_path / "curves.png").stat().st_size > 50_000


def test_the_orders_of_the_document():
    """All of them, with where each is published, and the word that the interval beside it gives."""
    rows = table("docs/results.md", "order", "verdict")
    claims = {f"{better} above {worse}": source for source, orders in proxies.CLAIMS.items() for better, worse in orders}
    assert {row["order"]: row["of"].partition(", ")[2] for row in rows} == claims
    for row in rows:
        mean, low, high = map(float, re.fullmatch(r"(\S+) \((\S+) to (\S+)\)", row["difference"]).groups())
        assert low <= mean <= high
        assert row["verdict"] == ("seen" if low > 0 else "not seen" if high < 0 else "undecided"), row


@pytest.mark.extra
def test_the_models_of_the_rows():
    """Each gives a number per class, rivals have the multiply-adds of LITv2, and what depends on the map fits the small one."""
    ours = proxies.litv2(SIZE, 7)
    for name, make in proxies.ROWS.items():
        model = make(SIZE, 7).eval()
        with torch.inference_mode():
            assert model(torch.zeros(1, 3, 48, 48)).shape == (1, 7)
        assert model.flops(48, 48) == pytest.approx(ours.flops(48, 48), rel=0.2), name
        assert model.no_weight_decay() <= {name.removesuffix(".*") for name, _ in model.named_parameters()} | {"network.pos_embed.*"}
        assert {module.window for module in model.modules() if isinstance(module, WindowAttention)} <= {3}
        assert [module.side for module in model.modules() if isinstance(module, RelativeSelfAttention)] in ([], [6, 6, 3])
        if name in ("ResNet-50-D", "Swin-T", "PVTv2-B2", "ConvNeXt-T"):  # the pyramids: as many tokens as LITv2 has
            maps = model.network.forward_intermediates(torch.zeros(1, 3, 48, 48), intermediates_only=True)[-4:]
            assert [values.shape[-1] for values in maps] == [24, 12, 6, 3], name
    attentions = {alpha: proxies.litv2(SIZE, 7, alpha=alpha).layers[2].blocks[0].attn for alpha in (*proxies.ALPHA, 0.9)}
    assert {alpha: attention.l_heads for alpha, attention in attentions.items()} == {0: 0, 0.25: 1, 0.5: 2, 0.9: 3, 1: 4}


def test_what_is_refused(tmp_path):
    write_images(tmp_path / "train", {"a": 1})
    with pytest.raises(UserError, match=f"expected {tmp_path}/val/CLASS/IMAGE"):
        proxies.reduced(tmp_path, tmp_path / "copy", 64)
    good = dict(seeds=[0, 1], img_size=48, width=16)
    for wrong, words in (
        (dict(seeds=[0, 3, 3]), "--seeds 0 3 3: an interval needs at least two, and all different"),
        (dict(img_size=40), "--img-size 40: expected a multiple of 16"),
        (dict(width=12), "--width 12: expected a multiple of 8"),
    ):
        with pytest.raises(UserError, match=words):
            proxies.check(SimpleNamespace(**{**good, **wrong}))


@pytest.mark.extra
@pytest.mark.parametrize("command", documented("benchmarks/README.md", r"python benchmarks/proxies\.py DIR"), ids=str)
def test_the_command(command, tmp_path, monkeypatch, capsys):
    """Runs that are finished count; the others are trained, all with the same budget, and nothing again by the same command."""
    import main

    for part in ("train", "val"):
        write_images(tmp_path / "data" / part, {"a": 8, "b": 8}, size=70)
    settings = proxies.recipe(1, 32)
    runs = tmp_path / f"results_runs/{harness.fingerprint(tmp_path / 'data', 8, settings)}/runs"
    known = {"MSA-0": 50, "MSA-1": 52, "LIT-0": 40, "LIT-1": 43, "LIT-+-ConvFFN-0": 45, "LIT-+-ConvFFN-1": 48}
    for name, top1 in known.items():
        (runs / name).mkdir(parents=True)
        (runs / name / "metrics.jsonl").write_text(json.dumps(dict(kind="val", update=1, epoch=1, top1=top1)) + "\n")
    flags = "--tables lit --seeds 0 1 --epochs 1 --img-size 32 --width 8 --rounds 1 --warm-up 0 --batch-size 1".split()
    flags += ["--out", str(tmp_path / "results")]
    run_here(monkeypatch, command, *flags, files=dict(DIR=tmp_path / "data"))
    rows = {row["model"]: row for row in json.loads((tmp_path / "results.json").read_text())["rows"]}
    assert (rows["MSA"]["top1"], rows["MSA"]["interval"]) == (51, "38.3 to 63.7")
    configs = [(runs / f"LITv2-{seed}/config.yaml").read_text().splitlines() for seed in (0, 1)]
    assert {line.split(":")[0] for pair in zip(*configs) if len(set(pair)) > 1 for line in pair} == {"SEED", "TAG"}
    assert proxies.recipe(1, 32) == settings
    own = [trainings.evaluations(runs / f"LITv2-{seed}")[1] for seed in (0, 1)]
    assert rows["LITv2"]["top1"] == pytest.approx(np.mean(own), abs=0.05)
    assert rows["LIT"]["over_LITv2"] == pytest.approx(41.5 - np.mean(own), abs=0.05)
    assert "* LIT + ConvFFN above LIT (in words): seen (+5.0, +5.0 to +5.0)" in (tmp_path / "results.md").read_text()
    assert (tmp_path / "results.png").stat().st_size > 10_000

    monkeypatch.setattr(main, "main", None)  # a call would fail
    capsys.readouterr()
    run_here(monkeypatch, command, *flags, files=dict(DIR=tmp_path / "data"))
    assert "* LIT + ConvFFN above LIT (in words): seen (+5.0, +5.0 to +5.0)" in capsys.readouterr().out
