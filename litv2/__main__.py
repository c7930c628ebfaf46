"""python -m litv2 COMMAND: the model zoo, checkpoints, predictions and exports. ``python -m litv2 COMMAND --help`` says more."""

from __future__ import annotations

import argparse
import os
import sys
from importlib import import_module

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
    """Runs a command and returns the exit code: 1 after an error, which is one line; 2 for a command line that is not valid."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="python -m litv2", description="LITv2: model zoo and tools.", allow_abbrev=False)
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    try:
        for name, (module, summary) in COMMANDS.items():
            subparser = subparsers.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".", allow_abbrev=False)
            if argv[:1] == [name]:
                import_module(module).add_arguments(subparser)
        args = parser.parse_args(argv)
        return import_module(COMMANDS[args.command][0]).run(args) or 0
    except BrokenPipeError:  # the reader of a pipe, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
