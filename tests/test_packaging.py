# SPDX-License-Identifier: Apache-2.0
"""The wheel: what is in it, and that it works where there is no checkout, native operators included."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import torch

import litv2
from command_helpers import run
from document_helpers import documented
from helpers import ROOT
from mm_modules.build import why_not

NEEDS_A_COMPILER = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
SOURCES = (".cpp", ".cu", ".cuh", ".h", ".inl")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())

INFERENCE = """
import torch, litv2, hilo
from hilo import HiLo
model = litv2.litv2_small().eval()
with torch.no_grad():
    print(tuple(model(torch.rand(1, 3, 224, 224)).shape), tuple(HiLo(32, num_heads=4, window_size=2)(torch.rand(1, 36, 32), 6, 6).shape))
print(litv2.__version__, litv2.__file__, hilo.__file__)
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A copy, so that nothing that lies about in the checkout gets in, and nothing is left in it."""
    source = tmp_path_factory.mktemp("source")
    for name in ("litv2", "mm_modules"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("build", "__pycache__"))
    for name in ("hilo.py", "setup.py", "pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, source)
    return source


@pytest.fixture(scope="module")
def wheel(source) -> Path:
    command = [sys.executable, *"-m pip wheel --quiet --no-index --no-deps --no-build-isolation --wheel-dir dist .".split()]
    environment = {name: value for name, value in os.environ.items() if name not in ("LITV2_BUILD", "PYTHONPATH")}
    subprocess.run(command, cwd=source, env=environment, check=True, timeout=120)
    (wheel,) = (source / "dist").glob("*.whl")
    return wheel


class Installed:
    """The wheel in an empty folder, with a home and a cache of its own."""

    def __init__(self, wheel: Path, root: Path) -> None:
        self.site, self.cache = root / "site packages", root / "cache"
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target", self.site, wheel]
        subprocess.run(command, check=True, timeout=120)
        self.home = root / "home"
        self.home.mkdir()

    def command(self, *words, **environment) -> dict:
        own = {"PYTHONPATH": str(self.site), "XDG_CACHE_HOME": str(self.cache), "HOME": str(self.home), "OMP_NUM_THREADS": "1"}
        own |= {"LITV2_DCN_CUDA": "0", "PYTHONDONTWRITEBYTECODE": "1"}
        return dict(args=list(words), cwd=self.home, env={**os.environ, **own, **environment}, text=True)

    def run(self, *words, **environment) -> subprocess.CompletedProcess:
        return subprocess.run(**self.command(*words, **environment), capture_output=True, timeout=600)

    def python(self, *words, **environment) -> subprocess.CompletedProcess:
        return self.run(sys.executable, *words, **environment)


@pytest.fixture
def installed(wheel, tmp_path) -> Installed:
    return Installed(wheel, tmp_path)


def package_files(package: str) -> list[Path]:
    """Of the checkout, without what building leaves there."""
    files = [path for path in (ROOT / package).rglob("*") if path.is_file()]
    return [path for path in files if not {"__pycache__", "build"} & set(path.relative_to(ROOT).parent.parts)]


def test_importable_names():
    """``hilo``, ``litv2`` and ``mm_modules``; all that their folders hold is found, not listed; a build needs no torch."""
    tools = PROJECT["tool"]["setuptools"]
    assert tools["py-modules"] == ["hilo"] and tools["packages"]["find"]["include"] == ["litv2*", "mm_modules*"]
    assert PROJECT["build-system"]["requires"] == ["setuptools>=77"]
    assert PROJECT["project"]["dependencies"] == ["torch>=2.6"]


def test_the_version_stands_in_one_place():
    assert PROJECT["project"]["dynamic"] == ["version"]
    files = [ROOT / "pyproject.toml", ROOT / "setup.py", *package_files("litv2"), *package_files("mm_modules")]
    files = [file for file in files if file.suffix in (".py", ".toml")]
    assert [file for file in files if f'"{litv2.__version__}"' in file.read_text()] == [ROOT / "mm_modules/__init__.py"]


def test_what_the_wheel_holds(wheel):
    assert wheel.name == f"litv2-{litv2.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        (metadata,) = (archive.read(name).decode() for name in archive.namelist() if name.endswith("entry_points.txt"))
    assert "litv2 = litv2.__main__:main" in metadata
    expected = {"hilo.py"}
    for package in ("litv2", "mm_modules"):
        expected |= {path.relative_to(ROOT).as_posix() for path in package_files(package) if path.suffix in (".py", ".typed", *SOURCES)}
    assert names == expected
    assert {"litv2/py.typed", "mm_modules/py.typed", "mm_modules/DCN/csrc/kernels_cuda.cu", "litv2/ops/csrc/kernels.inl"} <= names


@pytest.mark.extra
def test_the_wheel_works_elsewhere(installed):
    done = installed.python("-c", INFERENCE)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    shapes, places = done.stdout.splitlines()
    assert shapes == "(1, 1000) (1, 36, 32)"
    assert places == f"{litv2.__version__} {installed.site / 'litv2/__init__.py'} {installed.site / 'hilo.py'}"
    for command in ((sys.executable, "-m", "litv2"), (installed.site / "bin/litv2",)):
        done = installed.run(*command, "list")
        assert done.returncode == 0 and "litv2_small" in done.stdout, done.stderr


@NEEDS_A_COMPILER
@pytest.mark.extra
def test_build_from_the_wheel(installed):
    """Two at once: one compiles, the other waits and finds the library. Nothing is written beside the packages."""
    before = sorted(installed.site.rglob("*"))
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    both = [subprocess.Popen(**installed.command(sys.executable, "-m", "litv2", "build", "dcn"), **pipes) for _ in range(2)]
    outputs = [process.communicate(timeout=600) for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert sorted("compiling" in errors for _, errors in outputs) == [False, True]
    assert outputs[0][0] == outputs[1][0]
    library = Path(outputs[0][0].strip())
    assert library.is_relative_to(installed.cache) and library.is_file()
    assert sorted(installed.site.rglob("*")) == before
    code = "import sys; from mm_modules.DCN import compiled; print(compiled.problem, sys.modules['mm_modules.DCN._C'].__file__)"
    assert installed.python("-c", code).stdout.strip() == f"None {library}"


@pytest.mark.extra
@pytest.mark.parametrize("command", documented("*", r"pip install (-e )?\."), ids=str)
def test_documented_installation(command, source, tmp_path):
    """From the copy into a folder, by what is installed already."""
    assert command.folder == ROOT
    more = "--quiet --no-index --no-deps --no-build-isolation --target".split()
    run(command, *more, tmp_path / "site", folder=source, PYTHONPATH="", LITV2_BUILD="")
    code = (
        f"import site; site.addsitedir({str(tmp_path / 'site')!r}); from importlib.util import find_spec; print(find_spec('litv2').origin)"
    )
    found = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert Path(found) == (source if "-e" in command.words else tmp_path / "site") / "litv2/__init__.py"


@pytest.mark.extra
@pytest.mark.parametrize("command", documented("*", r"pip install -r \S+"), ids=str)
def test_documented_requirements(command):
    """Without an index: they are what is installed here."""
    if torch.__version__.partition("+")[0] not in (ROOT / "requirements.txt").read_text():
        pytest.skip(f"this environment has torch {torch.__version__}, for which the files are not")
    assert "Would install" not in run(command, "--dry-run", "--no-index").stdout


def libraries(installed: Installed) -> list[Path]:
    return [path for path in installed.cache.rglob("*") if path.suffix in (".so", ".tmp")]


@NEEDS_A_COMPILER
def test_a_compiler_that_fails(installed, tmp_path):
    compiler = tmp_path / "c++"
    compiler.write_text('#!/bin/sh\n[ "$1" = --version ] && echo "c++ 1.0" && exit 0\necho "fatal error: no space left" >&2\nexit 1\n')
    compiler.chmod(0o755)
    done = installed.python("-m", "litv2", "build", "dcn", CXX=str(compiler))
    assert done.returncode == 2
    assert "no space left" in done.stderr
    assert done.stderr.splitlines()[-1] == "error: mm_modules.DCN._C could not be built; see the compiler's messages above"
    assert not libraries(installed)


@pytest.mark.parametrize(
    "words, environment, message",
    [
        (["dcn"], {"CXX": "no-such-compiler -O3"}, "no C++ compiler: no-such-compiler was not found. Install GCC or clang"),
        (["operators"], {}, "unknown extension 'operators'; expected dcn or native"),
    ],
)
def test_errors_of_build(installed, words, environment, message):
    done = installed.python("-m", "litv2", "build", *words, **environment)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2 and line.startswith(f"error: {message}")
    assert not libraries(installed)


def test_requirements():
    """What training needs is in the first file, and the files together pin each package once."""
    pins: dict[str, str] = {}
    for file in sorted(ROOT.glob("requirements*.txt")):
        for line in file.read_text().splitlines():
            if line and not line.startswith(("#", "-r ")):
                name, version = re.match(r"([\w.-]+)==([\w.]+)( |$)", line).groups()[:2]
                assert name.lower() not in pins, line
                pins[name.lower()] = version
    core = re.findall(r"^([\w-]+)==", (ROOT / "requirements.txt").read_text(), re.M)
    extras = PROJECT["project"]["optional-dependencies"]
    for extra in ("timm", "safetensors", "train", "build"):
        assert {re.match(r"[\w-]+", requirement)[0] for requirement in extras[extra]} <= set(core), extra
    assert not {"executorch", "openvino", "datasets", "onnx", "pytest"} & set(core)
    if torch.__version__.partition("+")[0] != pins["torch"]:
        pytest.skip(f"this environment has torch {torch.__version__}")
