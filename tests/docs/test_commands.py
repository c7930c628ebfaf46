"""Every command that a document shows is checked: RULES says how. A command that no rule knows fails, and says what to add.

Most are parsed by their own program, which is stopped there; a few are run as they are written, with small files for FILE and DIR.
"""

from __future__ import annotations

import argparse
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.distributed.run import get_args_parser

import litv2
from config import parse_args
from document_helpers import Command, commands
from helpers import FAST, ROOT, TINY, trainer_environment, write_images

Check = Callable[[Command, pytest.MonkeyPatch], None]


class Parsed(BaseException):
    """Leaves a program once its command line has been accepted; nothing in it catches this."""


def parsed_by(start: Callable[[], object], argv: list[str], folder: Path, patch: pytest.MonkeyPatch) -> None:
    """Starts a program in this process, and stops it when argparse has accepted its arguments."""
    accept = argparse.ArgumentParser.parse_args

    def stop(self, *args, **kwargs):
        raise Parsed(accept(self, *args, **kwargs))

    patch.setattr(argparse.ArgumentParser, "parse_args", stop)
    patch.setattr(sys, "argv", argv)
    patch.chdir(folder)
    patch.setattr(sys, "path", [str(folder / Path(argv[0]).parent), *sys.path])  # as the interpreter does for a script
    with pytest.raises(Parsed):
        start()


def script(command: Command, patch: pytest.MonkeyPatch) -> None:
    """python SCRIPT ..."""
    path, *_ = argv = command.words[1:]
    assert (command.folder / path).is_file(), f"there is no {path} in {command.folder}"
    if not torch.cuda.is_available():
        argv = " ".join(argv).replace("--device cuda", "--device cpu").split()  # the benchmarks refuse a device that is not there
    parsed_by(lambda: runpy.run_path(str(command.folder / path), run_name="__main__"), argv, command.folder, patch)


def dist_script(command: Command, patch: pytest.MonkeyPatch) -> None:
    """tools/dist_train.sh CONFIG GPUS ..., tools/dist_test.sh CONFIG FILE GPUS ...: as the Python program beside it."""
    words = [word for word in command.words if word != "bash"]
    assert (command.folder / words[0]).is_file()
    name, gpus = ("train", 2) if "dist_train" in words[0] else ("test", 3)
    assert words[gpus].isdigit()
    line = f"python tools/{name}.py {' '.join(words[1:gpus] + words[gpus + 1 :])}"
    script(Command(command.document, command.folder, line), patch)


def trainer(command: Command, patch: pytest.MonkeyPatch) -> None:
    """python main.py ... and torchrun ... main.py ...: the launcher's flags, the trainer's, and the configuration that they ask for."""
    words = command.words
    if words[0] == "torchrun":
        launch = get_args_parser().parse_args(words[1:])
        words = ["python", launch.training_script, *launch.training_script_args]
    assert (command.folder / words[1]).is_file()
    patch.chdir(command.folder)
    parse_args(words[2:])


def tool(command: Command, patch: pytest.MonkeyPatch) -> None:
    """python -m litv2 COMMAND ..."""
    parsed_by(lambda: runpy.run_module("litv2", run_name="__main__"), command.words[2:], command.folder, patch)


def launched(command: Command, patch: pytest.MonkeyPatch) -> None:
    """python -m torch.distributed.launch ... SCRIPT ..."""
    launch = get_args_parser().parse_args(command.words[3:])
    line = " ".join(["python", launch.training_script, *launch.training_script_args])
    script(Command(command.document, command.folder, line), patch)


def make(command: Command, patch: pytest.MonkeyPatch) -> None:
    subprocess.run(["make", "-n", *command.words[1:]], cwd=command.folder, check=True, capture_output=True)


def setup(command: Command, patch: pytest.MonkeyPatch) -> None:
    """Compiling takes minutes, and other tests do it: here the program must be there."""
    assert (command.folder / "setup.py").is_file()


def installed(command: Command, patch: pytest.MonkeyPatch) -> None:
    """pip install: the file of requirements or the project is there; no package is fetched."""
    target = command.folder / command.words[-1]
    assert target.is_file() or (target / "pyproject.toml").is_file()


def developing(command: Command, patch: pytest.MonkeyPatch) -> None:
    """The tools that make test runs, on a path that is there."""
    assert (command.folder / command.words[-1]).exists()


def environment(command: Command, patch: pytest.MonkeyPatch) -> None:
    """conda and docker are not here; tests/test_environments.py checks the files that they read."""
    tested = (ROOT / "tests/test_environments.py").read_text(encoding="utf-8")
    (name,) = (name for program, name in (("conda", "environment.yml"), ("docker", "Dockerfile")) if program == command.words[0])
    assert (command.folder / name).is_file() and name in tested


def elsewhere(test: str) -> Check:
    """Run as it is written in another file of tests."""

    def check(command: Command, patch: pytest.MonkeyPatch) -> None:
        program = command.words[-1]
        assert program in (ROOT / test).read_text(encoding="utf-8"), f"{test} does not mention {program}"

    return check


# The first that matches the whole line decides.
RULES: list[tuple[str, Check]] = [
    (r"make \S+", make),
    (r"pip install -r \S+|pip install (-e )?\.|.* && pip install -r \S+", installed),
    (r"conda env create --file environment\.yml|docker build .*", environment),
    (r"python setup\.py build(_ext --inplace| install)?", setup),
    (r"(python|torchrun .*) ?main\.py .*", trainer),
    (r"python docs/figures/draw\.py", elsewhere("tests/docs/test_figures.py")),
    (r"python -m mm_modules\.DCN", elsewhere("tests/mm_modules/test_compiled.py")),
    (r"python -m litv2 .*", tool),
    (r"python -m torch\.distributed\.launch .*", launched),
    (r"(bash )?tools/dist_(train|test)\.sh .*", dist_script),
    (r"python \S+\.py .*", script),
    (r"\.venv/bin/(python -m pytest -n 0|ruff check) \S+", developing),
]


def rule(command: Command) -> Check | None:
    return next((check for pattern, check in RULES if re.fullmatch(pattern, command.line)), None)


def needs_openmmlab(command: Command) -> bool:
    return bool(re.search(r"tools/|demo\.py|dense\.py", command.line)) or command.line == "make mm"


CASES = [
    pytest.param(command, id=f"{command.document}: {command.line}", marks=pytest.mark.extra if needs_openmmlab(command) else ())
    for command in commands()
]


@pytest.mark.parametrize("command", CASES)
def test_command(command, monkeypatch):
    check = rule(command)
    assert check is not None, f"no rule is for {command.line!r} ({command.document}): add one to RULES, which says how it is checked"
    for word in command.words:
        if re.match(r"(\S+/)?configs/.*\.(py|yaml)$", word) and not word.endswith("mine.py"):
            assert (command.folder / word).is_file(), f"there is no {word}"
    check(command, monkeypatch)


def test_an_unknown_command_has_no_rule():
    for line in ("python", "rm -r output", "litv3 list", "pip uninstall torch"):
        assert rule(Command("README.md", ROOT, line)) is None


def test_a_wrong_command_is_seen(monkeypatch):
    """The parsers refuse what they do not know."""
    for check, line in (
        (trainer, "python main.py --cfg configs/litv2-small.yaml --dta-path DIR"),
        (trainer, "python main.py --cfg configs/litv2-small.yaml --opts TRAIN.EPOCH 3"),
        (tool, "python -m litv2 convert FILE"),
        (script, "python ../benchmarks/models.py --models litv3_small"),
    ):
        with monkeypatch.context() as patch, pytest.raises((SystemExit, ValueError)):
            check(Command("README.md", ROOT / "classification", line), patch)


# Run as they are written.


def substitute(line: str, files: dict[str, Path]) -> list[str]:
    return [str(files.get(word, word)) for word in Command("", ROOT, line).words]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    write_images(root / "train", {"a": 70, "b": 70}, size=32)
    write_images(root / "val", {"a": 3, "b": 3}, size=32)
    return root


@pytest.mark.extra
def test_training_then_fine_tuning(images, tmp_path):
    """From scratch, then from those weights: two of the trainer's commands, with a smaller model and schedule appended."""
    first, tune = (
        next(command.line for command in commands() if re.fullmatch(r"python main\.py " + pattern, command.line))
        for pattern in (r".* --data-path DIR --batch-size 64", r".*--pretrained FILE --opts .*")
    )
    files = dict(DIR=images, FILE=tmp_path / "first/litv2_small/default/best.pth")
    for line, output, epochs in ((first, "first", 1), (tune, "second", 3)):
        flags, _, opts = (" ".join(substitute(line, files)[2:])).partition("--opts")
        words = [sys.executable, "main.py", *flags.split(), "--output", str(tmp_path / output), "--opts", *FAST, *opts.split()]
        words += ["TRAIN.EPOCHS", str(epochs), "DATA.IMG_SIZE", "32"]
        folder, environment = ROOT / "classification", trainer_environment()
        done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        assert (tmp_path / output / "litv2_small/default/curves.png").is_file()


@pytest.fixture
def weights(tmp_path, monkeypatch):
    """A checkpoint for FILE; and the file of litv2_small, of random weights, where a download would put it."""
    (tmp_path / "hub/checkpoints").mkdir(parents=True)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    torch.save({"model": litv2.litv2_small().state_dict()}, tmp_path / "hub/checkpoints/litv2_s.pth")
    torch.save({"model": litv2.LITv2(**{**TINY, "depths": (1, 1, 1, 1)}).state_dict()}, tmp_path / "mine.pth")
    return tmp_path / "mine.pth"


def test_tools_of_the_weights(weights, images, tmp_path, monkeypatch, capsys):
    files = dict(FILE=weights, IMAGE=images / "val/a/0.png")
    expected = {"list": "litv2_small_alpha00", "download": "litv2_s.pth", "info": "parameters", "convert": "weights.safetensors"}
    lines = [command.line for command in commands() if command.document == "docs/weights.md"]
    assert len(lines) == 5
    monkeypatch.chdir(tmp_path)
    for line in lines:
        monkeypatch.setattr(sys, "argv", substitute(line, files)[2:])
        with pytest.raises(SystemExit) as ended:
            runpy.run_module("litv2", run_name="__main__")
        output = capsys.readouterr()
        assert not ended.value.code, output.err
        assert expected.get(line.split()[3], str(files["IMAGE"])) in output.out
