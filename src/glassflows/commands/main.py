"""`glassflows COMMAND …`, also as `python -m glassflows`."""

from __future__ import annotations

import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from importlib import import_module

COMMANDS = {"steer": "steer", "serve": "serve", "verify-rewards": "verify_rewards"}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command.

    Args:
        arguments: Of the command line; those of the process if None.
    """
    parser = ArgumentParser("glassflows", description="Steer pipelines of diffusers by a reward.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    given = sys.argv[1:] if arguments is None else list(arguments)
    named = [name for name in COMMANDS if name == next(iter(given), None)]
    for name in named or COMMANDS:  # one alone begins sooner
        module = import_module(f".{COMMANDS[name]}", __package__)
        described = (module.__doc__ or "").partition(": ")[2]
        command = commands.add_parser(name, help=described.splitlines()[0], description=described)
        module.add_arguments(command)
        command.set_defaults(run=module.run, prog=command.prog)
    args = parser.parse_args(given)
    try:
        args.run(args)
    except (ValueError, TypeError, OSError) as error:
        raise SystemExit(f"{args.prog}: {error}") from error
