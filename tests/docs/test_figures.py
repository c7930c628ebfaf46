# SPDX-License-Identifier: Apache-2.0
"""The pictures of the documents are what docs/figures/draw.py draws from the tables and the model of today."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree

import pytest
import torch

from command_helpers import run
from document_helpers import documented, table
from helpers import ROOT
from litv2 import litv2_small

FIGURES = ROOT / "docs/figures"
KINDS = ("architecture", "hilo", "map-size", "models", "small-models")
NAMES = [f"{name}-{theme}.svg" for name in KINDS for theme in ("dark", "light")]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """By the command of the document."""
    folder = tmp_path_factory.mktemp("figures")
    (command,) = documented("CONTRIBUTING.md", r"python docs/figures/draw\.py")
    run(command, "--out", folder)
    return folder


def shapes(path) -> list[tuple]:
    """Each element with its text, colours and numbers; how these are written is left to the program."""
    elements = []
    for element in ElementTree.parse(path).iter():
        values = {
            key: tuple(map(float, re.findall(r"-?[\d.]+", value))) if re.fullmatch(r"[-\d., ]+", value) else value
            for key, value in element.attrib.items()
        }
        elements.append((element.tag, (element.text or "").strip(), values))
    return elements


def test_all_are_committed():
    assert sorted(path.name for path in FIGURES.glob("*.svg")) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_up_to_date_and_small(name, drawn):
    assert shapes(FIGURES / name) == shapes(drawn / name), f"{name} is not up to date: run python docs/figures/draw.py"
    assert (FIGURES / name).stat().st_size < 200_000


@pytest.mark.parametrize("name", KINDS)
def test_themes_differ_in_colours_alone(name):
    light, dark = ([(tag, text) for tag, text, _ in shapes(FIGURES / f"{name}-{theme}.svg")] for theme in ("light", "dark"))
    assert light == dark


def test_nothing_lies_outside():
    for name in NAMES:
        root = ElementTree.parse(FIGURES / name).getroot()
        _, _, width, height = map(float, root.get("viewBox").split())
        for element in root.iter():
            for key, largest in (("x", width), ("cx", width), ("y", height), ("cy", height)):
                assert 0 <= float(element.get(key, 0)) <= largest, (name, element.attrib)


def texts(name: str) -> list[str]:
    return [text for _, text, _ in shapes(FIGURES / f"{name}-light.svg") if text]


def test_architecture_is_that_of_the_model():
    with torch.device("meta"):
        model = litv2_small()
    found, levels = texts("architecture"), model.feature_info
    sides = [224 // level["reduction"] for level in levels]
    assert [text for text in found if re.fullmatch(r"\d+ × \d+ × \d\d+", text)] == [
        f"{side} × {side} × {level['num_chs']}" for side, level in zip(sides, levels)
    ]
    assert [text for text in found if re.fullmatch(r"stride \d+", text)] == [f"stride {level['reduction']}" for level in levels]
    blocks = []
    for stage in model.layers:
        window = f", s = {stage.blocks[0].attn.window_size}" if stage.blocks[0].attn else ""
        blocks.append(f"{len(stage.blocks)} blocks{window}")
    assert [text for text in found if re.match(r"\d+ blocks", text)] == blocks


def test_heads_are_those_of_the_model():
    with torch.device("meta"):
        attention = litv2_small().layers[2].blocks[0].attn
    assert f"{attention.num_heads} heads" in texts("hilo") and f"α = {attention.alpha}" in texts("hilo")


def test_models_are_those_of_the_table():
    found = texts("models")
    for columns in (("batch 8: eager, ms", "images/s"), ("eager, ms", "native, ms", "images/s")):
        assert all(row["model"] in found for row in table("docs/speed.md", "top-1, published", *columns))


def test_layers_are_those_of_the_table():
    rows = table("docs/hilo.md", "side", "Local Window")
    assert {name for name in rows[0] if name != "side"} <= set(texts("map-size"))
    assert all(f"{row['side']} × {row['side']}" in texts("map-size") for row in rows)


def test_small_models_are_those_of_the_table():
    assert {row["model"] for row in table("docs/results.md", "top-1 (%)", "8 images (ms)")} <= set(texts("small-models"))
