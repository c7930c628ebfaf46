# SPDX-License-Identifier: Apache-2.0
"""The Dockerfile, its runner, the conda environment and the workflow: what can be said of them without Docker, conda and GitHub.

``scripts/run_dockerfile.py FOLDER`` runs the steps of the real Dockerfile, in as long as they take.
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys

import pytest
import yaml

from document_helpers import documented
from helpers import ROOT

spec = importlib.util.spec_from_file_location("run_dockerfile", ROOT / "scripts/run_dockerfile.py")
run_dockerfile = importlib.util.module_from_spec(spec)
spec.loader.exec_module(run_dockerfile)
STEPS = run_dockerfile.instructions((ROOT / "Dockerfile").read_text())


def words(instruction: str) -> list[str]:
    return [rest for word, rest in STEPS if word == instruction]


def test_bases_are_pinned_and_the_user_is_not_root():
    stages = {rest.split(" AS ")[1] for rest in words("FROM") if " AS " in rest}
    for base in (rest.split()[0] for rest in words("FROM")):
        if base == "base-${DEVICE}":
            assert {"base-cpu", "base-cu130"} <= stages
        else:
            assert re.fullmatch(r"[\w/]+:[\d.]+[\w.-]*", base), base
    last_stage = STEPS[max(i for i, (word, _) in enumerate(STEPS) if word == "FROM") :]
    users = [rest for word, rest in last_stage if word == "USER"]
    assert users and users[-1] not in ("root", "0")
    assert not any(word == "ENTRYPOINT" for word, _ in STEPS) and last_stage[-1][0] == "CMD"


@pytest.mark.parametrize("command", documented("README.md", r"docker build .*"), ids=str)
def test_docker_build(command):
    """Not run, for want of Docker: the folder has the Dockerfile whose steps are tested here."""
    assert command.folder / command.words[-1] / "Dockerfile" == ROOT / "Dockerfile" and STEPS


def test_no_cache_stays_in_a_layer():
    for step in words("RUN"):
        assert "apt-get install" not in step or "rm -rf /var/lib/apt/lists/*" in step, step
        assert "pip install" not in step or "--no-cache-dir" in step or "--mount=type=cache,target=/root/.cache/pip" in step, step


def test_steps_are_shell_and_name_files_that_exist():
    for step in words("RUN"):
        subprocess.run(["sh", "-n", "-c", re.sub(r"--mount=\S+", "", step)], check=True)
    for copied in words("COPY"):
        assert "--from=" in copied or all((ROOT / source).exists() for source in copied.split()[:-1])
    packages = [i for i, (word, rest) in enumerate(STEPS) if word == "RUN" and "requirements.txt" in rest]
    project = [i for i, (word, rest) in enumerate(STEPS) if word == "COPY" and rest.startswith(". ")]
    assert packages < project  # a change of the code leaves the layer of the packages


DOCKERFILE = """
# a comment
ARG COLOUR=blue
FROM ubuntu:24.04 AS build
RUN apt-get update \\
    && apt-get install --yes g++ \\
    && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/litv2
ARG SHADE=dark-${COLOUR}
ENV PAINT=${SHADE}-paint PLACE=/opt/litv2/bin
COPY hilo.py ./
RUN --mount=type=cache,target=/root/.cache/pip \\
    # another comment
    echo "$PAINT $PLACE" > said \\
    && ls > files
RUN FAILS
"""


@pytest.mark.parametrize("last, status", [("test -f said", 0), ("false && touch late", 1)])
def test_the_runner(last, status, tmp_path):
    """ARG, ENV, WORKDIR, COPY and RUN do what Docker's do; a step that fails ends the run."""
    root = tmp_path / "pro ject"
    (root / "scripts").mkdir(parents=True)
    (root / "scripts/run_dockerfile.py").write_bytes((ROOT / "scripts/run_dockerfile.py").read_bytes())
    (root / "hilo.py").touch()
    (root / "Dockerfile").write_text(DOCKERFILE.replace("FAILS", last))
    subprocess.run("git init -q . && git add -A", shell=True, cwd=root, check=True)
    folder = tmp_path / "fol der"
    command = [sys.executable, root / "scripts/run_dockerfile.py", folder, "COLOUR=green"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode != 0) == status, done.stderr
    assert (folder / "said").read_text() == f"dark-green-paint {folder}/bin\n"
    assert (folder / "files").read_text().split() == ["files", "hilo.py", "said"]
    assert not (folder / "late").exists()


@pytest.mark.parametrize("command", documented("README.md", r"conda env create --file .*"), ids=str)
def test_conda(command):
    """Not run, for want of conda: what it would read."""
    environment = yaml.safe_load((command.folder / command.words[-1]).read_text())
    (pip,) = (each["pip"] for each in environment["dependencies"] if isinstance(each, dict))
    assert pip == ["--requirement requirements.txt", "--editable ."]
    assert "nodefaults" in environment["channels"] and "cxx-compiler" in environment["dependencies"]


def test_workflow():
    """GitHub runs the same file as everybody, and keeps what is slow to make."""
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    steps = workflow["jobs"]["test"]["steps"]
    assert [step["run"] for step in steps if "run" in step] == [".ci/run"]
    (cache,) = (step["with"] for step in steps if step.get("uses", "").startswith("actions/cache@"))
    assert cache["path"] == "~/.cache/litv2"
    for pattern in re.findall(r"'([^']+)'", cache["key"]):
        assert list(ROOT.glob(pattern)), pattern
    assert workflow["permissions"] == {"contents": "read"}
