# SPDX-License-Identifier: Apache-2.0
"""python -m litv2 COMMAND: the model zoo, checkpoints, predictions and exports. ``python -m litv2 COMMAND --help`` shows the options."""

from __future__ import annotations

import argparse
import sys
from functools import partial
from importlib import import_module

from .errors import run_program

# The module of a command has ``add_arguments(parser)`` and ``run(args)``, which returns the exit code or None. It is imported
# only when that command runs, so that no command requires the packages of another.
COMMANDS = {
    "list": ("litv2.commands.list", "list the model zoo"),
    "download": ("litv2.commands.download", "download files of the model zoo"),
    "info": ("litv2.commands.info", "show what a checkpoint contains"),
    "convert": ("litv2.commands.convert", "write the weights of a checkpoint as .pth or .safetensors"),
    "predict": ("litv2.commands.predict", "classify images"),
    "embed": ("litv2.commands.embed", "write the features of a folder of images"),
    "knn": ("litv2.commands.knn", "classify images by the nearest ones, from their features"),
    "linear-probe": ("litv2.commands.linear_probe", "fit a linear classifier to the features of images"),
    "nearest": ("litv2.commands.nearest", "find the images that are most similar to one"),
    "check-data": ("litv2.commands.check_data", "find unreadable images, duplicates, leaks and suspicious labels in a data set"),
    "compare": ("litv2.commands.compare", "compare trainings: figures, settings, curves and classes, with a paired test"),
    "explain": ("litv2.commands.explain", "draw what a model does inside: spectra, attention, sampling points, class activation"),
    "demo": ("litv2.commands.demo", "serve a page on this machine that classifies and explains images"),
    "build": ("litv2.commands.build", "compile the optional native operators"),
    "env": ("litv2.commands.env", "describe this machine and which backend computes each operator on it"),
    "export": ("litv2.commands.export", "export a model to another runtime and check its outputs"),
    "site": ("litv2.commands.site", "write a page that classifies images in the browser"),
}


def main(argv: list[str] | None = None) -> int:
    """Runs a command and returns the exit status: 2 after a user error (see ``errors.py``), 1 if part of the work failed."""
    return run_program(partial(_run, sys.argv[1:] if argv is None else argv))


def _run(argv: list[str]) -> int | None:
    parser = argparse.ArgumentParser(prog="python -m litv2", description="LITv2: model zoo and tools.", allow_abbrev=False)
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (module, summary) in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".", allow_abbrev=False)
        if argv[:1] == [name]:
            import_module(module).add_arguments(subparser)
    args = parser.parse_args(argv)
    return import_module(COMMANDS[args.command][0]).run(args)


if __name__ == "__main__":
    sys.exit(main())
