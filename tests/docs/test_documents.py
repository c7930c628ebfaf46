# SPDX-License-Identifier: Apache-2.0
"""What the documents say is true: Python sessions are run, links lead somewhere, figures that the code has too are the same."""

from __future__ import annotations

import doctest
import re
import runpy
import subprocess
import sys
import tomllib

import pytest
import torch
import yaml

import litv2
from document_helpers import FENCE, anchors, blocks, documents, links, prose, table, tables
from helpers import ROOT
from litv2.weights.releases import DOWNLOADS, ZOO

LOG_NAMES = {f"v1.0/litv2_{variant}_log.txt" for variant in "smb"} | {f"v1.0/{name}_log.json" for name, row in ZOO.items() if row.config}
SESSIONS = [document for document in documents() if any(">>>" in block for block in blocks(document, "python"))]


def test_the_documents_are_found():
    assert {"README.md", "classification/README.md", "docs/speed.md", "CONTRIBUTING.md"} <= set(documents())
    assert len(documents()["README.md"].splitlines()) <= 200


@pytest.mark.parametrize("document", SESSIONS)
def test_python_sessions(document):
    """The blocks of a document are one session."""
    session = "\n".join(block for block in blocks(document, "python") if ">>>" in block)
    test = doctest.DocTestParser().get_doctest(session, {}, document, document, 0)
    runner = doctest.DocTestRunner(verbose=False, optionflags=doctest.ELLIPSIS)
    runner.run(test)
    assert runner.failures == 0 and runner.tries > 0


@pytest.mark.parametrize("document", documents())
def test_blocks_are_of_a_kind_that_is_checked(document):
    """bash: test_commands.py. Python: a session, or a configuration, which the tests of its task run (mm_helpers.readme_config), or tests
    that the reader can take, which test_hilo_document.py runs."""
    assert {kind for kind, _ in FENCE.findall(documents()[document])} <= {"bash", "python", "bibtex", ""}
    assert len(re.findall(r"^```", documents()[document], re.M)) == 2 * len(FENCE.findall(documents()[document]))
    for block in blocks(document, "python"):
        config = document in ("detection/README.md", "segmentation/README.md") and "_base_ =" in block
        assert ">>>" in block or config or (document == "docs/hilo.md" and "def test_" in block)


@pytest.mark.parametrize("document", documents())
def test_links(document):
    for link in links(document):
        path, _, anchor = link.partition("#")
        if re.match(r"https?://", link):
            continue
        target = (ROOT / document).parent / path if path else ROOT / document
        assert target.exists(), f"{document}: {link} leads nowhere"
        if anchor:
            name = target.resolve().relative_to(ROOT.resolve()).as_posix()
            assert anchor in anchors(name), f"{document}: {name} has no heading #{anchor}"


@pytest.mark.parametrize("document", documents())
def test_files_that_are_named_exist(document):
    """`folder/file.py` from the document's folder or from the root; `{a,b}` and `*` as a shell reads them."""
    for name in re.findall(r"`([\w./{},*-]+\.(?:py|sh|md|yaml|toml|cff))`", prose(document)):
        for path in _expanded(name):
            if path not in WRITTEN:
                folders = (ROOT / document).parent, (ROOT / document).parent / "configs", ROOT, ROOT / "benchmarks"
                assert any(list(folder.glob(path)) for folder in folders), f"{document}: there is no {path}"


WRITTEN = (  # by programs and users
    "config.yaml", "detection/configs/mine.py", "segmentation/configs/mine.py", "configs/mine.py", "output/benchmarks/paper.md"
)  # fmt: skip


def _expanded(name: str) -> list[str]:
    found = re.fullmatch(r"(.*)\{(.*)\}(.*)", name)
    return [found[1] + option + found[3] for option in found[2].split(",")] if found else [name]


def test_pictures_are_for_light_and_dark_pages():
    pictures = re.findall(r"<picture>\n(.*?)</picture>", documents()["README.md"], re.S)
    assert len(pictures) == 4
    for picture in pictures:
        dark, light = re.search(r'dark\)" srcset="(\S+)"', picture)[1], re.search(r'src="(\S+)"', picture)[1]
        assert dark.replace("-dark", "-light") == light and re.search(r'alt="[^"]{30,}"', picture)


# Figures that the code has too.


def test_every_file_of_the_release_is_linked():
    found = {link.removeprefix(f"{DOWNLOADS}/") for document in documents() for link in links(document) if link.startswith(DOWNLOADS)}
    assert found == {row.url.removeprefix(f"{DOWNLOADS}/") for row in ZOO.values()} | LOG_NAMES


def test_classifiers():
    rows = table("README.md", "constructor", "top-1")
    names = {("litv2_base", "384"): "litv2_base_384"}
    assert len(rows) == 4
    for row in rows:
        size, release = int(row["image"]), ZOO[names.get((row["constructor"], row["image"]), row["constructor"])]
        with torch.device("meta"):
            model = getattr(litv2, row["constructor"])()
        assert f"{sum(p.numel() for p in model.parameters()) / 1e6:.3f}" == row["parameters (M)"] == release.parameters
        assert f"{model.flops(size, size) / 1e9:.3f}" == row["GFLOPs"] == release.gflops
        assert float(row["top-1"]) == release.figures["top-1"] and f"({release.url})" in row["files"]
    costs = [(row["model"], row["image"], row["top-1"]) for row in rows]
    short = table("classification/README.md", "training memory")
    assert [(row["model"], row["image"], row["top-1"]) for row in short] == costs
    for row, full in zip(short, rows):
        assert [row["parameters (M)"], row["GFLOPs"]] == [f"{float(full['parameters (M)']):.0f}", f"{float(full['GFLOPs']):.1f}"]


def test_alpha_sweep():
    rows = table("classification/README.md", "alpha")
    releases = [row for row in ZOO.values() if row.path.startswith("v1.1")]
    assert len(rows) == len(releases) == 7
    for row, release in zip(rows, releases):
        with torch.device("meta"):
            model = litv2.litv2_small(alpha=release.alpha)
        heads = model.layers[2].blocks[0].attn
        assert row["alpha"] == str(release.alpha) and row["heads in stage 3, Lo-Fi / Hi-Fi"] == f"{heads.l_heads} / {heads.h_heads}"
        assert row["GFLOPs"].split()[0] == f"{model.flops(224, 224) / 1e9:.3f}" and release.gflops in row["GFLOPs"]
        assert float(row["top-1"]) == release.figures["top-1"] and f"({release.url})" in row["weights"]


@pytest.mark.parametrize("task", ("detection", "segmentation"))
def test_dense_models(task):
    rows = [row for rows in tables(f"{task}/README.md") for row in rows if "FPS" in row]
    assert [row["configuration in configs/litv2"] for row in rows] == _in_the_order_of_the_document(task)
    for row in rows:
        name = row["configuration in configs/litv2"]
        release = ZOO[name]
        assert (ROOT / task / "configs/litv2" / f"{name}.py").is_file()
        assert {metric: float(row[metric]) for metric in release.figures} == release.figures
        assert row.get("ws", "2") == str(release.window[2])
        assert row["parameters (M)"] == release.parameters.split(".")[0]
        gflops = "331" if name == "mask_rcnn_litv2_m_fpn_1x_coco_ws_4" else release.gflops  # where the paper's table has 315
        assert row["GFLOPs"] == gflops.split(".")[0]
        assert row["files"] == f"[weights]({release.url}), [log]({DOWNLOADS}/v1.0/{name}_log.json)"


def _in_the_order_of_the_document(task: str) -> list[str]:
    """RetinaNet first; of each backbone windows of 2, then of 4."""
    names = [name for name, release in ZOO.items() if release.task == task]
    return sorted(names, key=lambda name: (not name.startswith("retinanet"), "smb".index(name.split("litv2_")[1][0]), "ws_4" in name))


def test_dense_models_in_short():
    for row in table("README.md", "Semantic FPN, mIoU"):
        variant = row["backbone"][-1].lower()
        detectors = [f"{name}_litv2_{variant}_fpn_1x_coco" for name in ("retinanet", "mask_rcnn")]
        names = [*detectors, f"litv2_{variant}_fpn_r50_512x512_80k_ade20k"]
        expected = [f"[{' / '.join(map(str, ZOO[name].figures.values()))}]({ZOO[name].url})" for name in names]
        assert list(row.values())[1:] == expected


def test_published_speed_and_accuracy(monkeypatch):
    """The release's images/s on an RTX 3090 and the accuracies, as benchmarks/models.py prints them beside its own."""
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])
    candidates = {candidate.name: candidate for candidate in runpy.run_path(str(ROOT / "benchmarks/models.py"))["CANDIDATES"]}
    published = {row["model"]: int(row["RTX 3090"]) for row in table("docs/speed.md", "A100", "RTX 3090")}
    assert len(published) == 13
    published |= {row["model"]: int(row["throughput"]) for row in table("classification/README.md", "throughput") if row["image"] == "224"}
    assert published == {name: candidate.rtx3090 for name, candidate in candidates.items() if candidate.rtx3090}
    rows = [row for rows in tables("docs/speed.md") for row in rows if "top-1, published" in row]
    assert len(rows) == 20 and all(float(row["top-1, published"]) == candidates[row["model"]].top1 for row in rows)


# What stands beside the documents.


def test_citation():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert citation["cff-version"] == "1.2.0" and citation["license"] == "Apache-2.0"
    assert citation["version"] == project.get("version", getattr(litv2, "__version__", None))
    papers = [citation["preferred-citation"], *citation["references"]]
    entries = blocks("README.md", "bibtex")
    assert len(papers) == len(entries) == 2
    for paper, entry in zip(papers, entries):
        authors = " and ".join(f"{author['family-names']}, {author['given-names']}" for author in paper["authors"])
        assert authors in entry and f"{{{paper['title']}}}" in entry and str(paper["year"]) in entry


def test_no_document_holds_a_path_of_a_machine():
    listing = ["git", "ls-files", "*.md", "*.cff", "*.ipynb", "docs/*"]
    for path in subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines():
        assert not re.search(r"(?<![\w.])/(work|root|home|tmp)/", (ROOT / path).read_text(encoding="utf-8", errors="replace")), path
