# SPDX-License-Identifier: Apache-2.0
"""What the Makefile runs, in which order, and what it does when the native operators cannot be compiled. python only notes its words."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from document_helpers import documented
from helpers import ROOT

NPM = """#!/bin/sh
echo "npm $*" >> "{log}"
mkdir -p node_modules
exit {status}
"""
PYTHON = """#!/bin/sh
echo "$*" >> "{log}"
case "$*" in
    *"-m litv2 build"*) exit {status};;
    "-m venv .venv") mkdir -p .venv/bin && cp "$0" .venv/bin/python;;
    main.py*) mkdir -p output/litv2_digits/default && touch output/litv2_digits/default/curves.png;;
esac
"""


class Project:
    def __init__(self, root: Path) -> None:
        self.root = root / "a b" / "litv2"
        (self.root / "classification").mkdir(parents=True)
        (self.root / "scripts").mkdir()
        for path in [ROOT / "Makefile", ROOT / "pyproject.toml", *ROOT.glob("requirements*.txt")]:
            shutil.copy(path, self.root)
        (self.root / "scripts/build_mmcv.sh").write_text(f'#!/bin/sh\necho "build_mmcv.sh $*" >> "{self.root}/log"\n')
        (self.root / "scripts/build_mmcv.sh").chmod(0o755)
        (self.root / "docs/site").mkdir(parents=True)
        for name in ("package.json", "package-lock.json"):
            shutil.copy(ROOT / "docs/site" / name, self.root / "docs/site")
        self.interpreter, self.programs = root / "python-of-the-system", root / "bin"
        self.programs.mkdir()
        self.build_status(0)
        self.npm_status(0)

    def build_status(self, status: int) -> None:
        self.interpreter.write_text(PYTHON.format(log=self.root / "log", status=status))
        self.interpreter.chmod(0o755)

    def npm_status(self, status: int) -> None:
        (self.programs / "npm").write_text(NPM.format(log=self.root / "log", status=status))
        (self.programs / "npm").chmod(0o755)

    def make(self, *words: str) -> tuple[int, list[str], str]:
        """The exit status, the words of every python and npm, and the output."""
        log = self.root / "log"
        log.unlink(missing_ok=True)
        # Not as a part of the make that runs the tests, which would have it print the folders that it enters.
        environment = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
        environment["PATH"] = f"{self.programs}{os.pathsep}{environment['PATH']}"
        command = ["make", *words, f"PYTHON={self.interpreter}"]
        done = subprocess.run(command, cwd=self.root, env=environment, capture_output=True, text=True)
        return done.returncode, log.read_text().splitlines() if log.exists() else [], done.stdout + done.stderr


NPM_CI = "npm ci --ignore-scripts --no-audit --no-fund"
PYTEST = "-m pytest --no-loadscope-reorder"
CALLS = {
    "make demo": ["-m venv .venv", "-m litv2 build", "main.py --cfg configs/litv2-digits.yaml"],
    "make test": ["-m venv .venv", "-m litv2 build", "build_mmcv.sh .venv/bin/python", NPM_CI, "-m ruff check .", "-m mypy", PYTEST],
    "make test-core": [
        "-m venv .venv",
        "-m litv2 build",
        f"{PYTEST} -m not extra " + " ".join(f"--ignore=tests/{name}" for name in ("detection", "segmentation", "litv2/test_backbone.py")),
    ],
}
LOCKED = ("requirements", *(f"requirements-{name}" for name in ("export", "explain", "examples", "track", "test", "supply", "mm")))
CALLS |= {
    "make sanitize": ["-m venv .venv", "-m tests.sanitizers"],
    "make paper": ["-m venv .venv", "-m benchmarks.paper --quick"],
    "make locks": ["-m venv .venv"],  # and those of test_locks
    "make audit": ["-m venv .venv", "scripts/audit.py locks/*.txt"],
    "make sbom": ["-m venv .venv", "-m cyclonedx_py environment --output-format JSON --output-file output/sbom.json"],
}


SITE = "-m litv2 site --checkpoint my model.pth --out output/site"


@pytest.fixture
def project(tmp_path) -> Project:
    return Project(tmp_path)


@pytest.mark.parametrize("command", documented("*", r"make \S+"), ids=str)
def test_documented_targets(command, project):
    """In a new clone; what python itself does with these words is tested elsewhere."""
    status, calls, output = project.make(command.words[1])
    assert status == 0, output
    assert [call for call in calls if "pip" not in call] == CALLS[command.line]


def test_demo(project):
    status, calls, output = project.make("demo")
    assert status == 0, output
    assert [call for call in calls if "pip" not in call] == ["-m venv .venv", "-m litv2 build", "main.py --cfg configs/litv2-digits.yaml"]
    files = [call.split(" -r ")[1] for call in calls if " -r " in call]
    assert files == ["requirements.txt"]  # nothing for tests, nothing for exports
    assert output.splitlines()[-1] == "classification/output/litv2_digits/default/curves.png"
    assert not any("pip" in call for call in project.make("demo")[1])


def test_demo_without_a_compiler(project):
    project.build_status(2)
    status, calls, output = project.make("demo")
    assert status == 0 and "main.py --cfg configs/litv2-digits.yaml" in calls
    assert "going on without the native operators" in output


def test_tests_are_not_run_without_the_native_operators(project):
    project.build_status(2)
    status, calls, _ = project.make("test")
    assert status != 0 and not any("pytest" in call for call in calls)


def test_test(project):
    """In an environment that a demo has made, which lacks what tests need."""
    project.make("demo")
    status, calls, output = project.make("test")
    assert status == 0, output
    assert [call for call in calls if "pip" not in call] == [
        "-m litv2 build",
        "build_mmcv.sh .venv/bin/python",
        NPM_CI,
        "-m ruff check .",
        "-m mypy",
        PYTEST,
    ]
    for file in ("test", "mm", "examples"):
        assert any(f"-r requirements-{file}.txt" in call for call in calls)
    (project.root / "requirements-export.txt").touch()
    assert [call for call in project.make("test")[1] if "pip" in call][0].endswith("-r requirements-test.txt")


def test_locks(project):
    """Of every requirements file."""
    assert {f"{name}.txt" for name in LOCKED} == {path.name for path in ROOT.glob("requirements*.txt")}
    status, calls, output = project.make("locks")
    assert status == 0, output
    assert [call.split("--output-file ")[1] for call in calls if "uv pip compile" in call] == [f"locks/{name}.txt" for name in LOCKED]


def test_paper_with_images(project):
    """Whose folder has a space in its name."""
    status, calls, output = project.make("paper", "IMAGES=my images")
    assert status == 0 and calls[-1] == "-m benchmarks.paper --quick --images my images", output


@pytest.mark.parametrize("command", documented("docs/explain.md", r"make site CHECKPOINT=FILE"), ids=str)
def test_site(command, project):
    """In a new clone, and again: nothing is fetched twice."""
    assert command.folder == ROOT
    words = [word.replace("FILE", "my model.pth") for word in command.words[1:]]
    status, calls, output = project.make(*words)
    assert status == 0, output
    assert [call for call in calls if "pip" not in call] == ["-m venv .venv", NPM_CI, SITE]
    assert any("-r requirements-export.txt" in call for call in calls)
    assert project.make(*words)[1] == [SITE]


def test_site_without_a_checkpoint_or_npm(project):
    status, calls, output = project.make("site")
    assert status != 0 and not calls and "make site CHECKPOINT=FILE" in output
    project.npm_status(1)
    status, calls, _ = project.make("site", "CHECKPOINT=tiny.pth")
    assert status != 0 and not any("litv2 site" in call for call in calls)


def test_tests_are_run_without_npm(project):
    """A user's machine may have none; the tests that need what it fetches skip, the next time too."""
    project.npm_status(1)
    for _ in range(2):
        status, calls, output = project.make("test")
        assert status == 0 and calls[-1] == PYTEST and NPM_CI in calls
        assert "going on without onnxruntime-web" in output
