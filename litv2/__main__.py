"""python -m litv2 COMMAND: the model zoo, checkpoints, predictions and exports. ``python -m litv2 COMMAND --help`` says more."""

from __future__ import annotations

import argparse
import sys
from functools import partial
from importlib import import_module

from .errors import run_program

# The module of a command has ``add_arguments(parser)`` and ``run(args)``, which returns the exit code or None. It is imported
# only for its own command, so that no command needs another's packages.
COMMANDS = {
    "list": ("litv2.commands.list", "the model zoo"),
    "download": ("litv2.commands.download", "fetch files of the model zoo"),
    "info": ("litv2.commands.info", "what a checkpoint holds"),
    "convert": ("litv2.commands.convert", "write the weights of a checkpoint as .pth or .safetensors"),
    "predict": ("litv2.commands.predict", "classify images"),
    "build": ("litv2.commands.build", "compile the native operators, which are optional"),
    "env": ("litv2.commands.env", "this machine, and which backend computes each operator here"),
    "export": ("litv2.commands.export", "write a model for another runtime, and compare the two"),
}


def main(argv: list[str] | None = None) -> int:
    """Runs a command and returns the exit status: 2 after a user's mistake (see ``errors.py``), 1 where some of the work failed."""
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
