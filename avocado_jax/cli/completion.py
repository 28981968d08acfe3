"""Print the completion script of a shell, with all commands, options and config fields."""

import argparse
import importlib
from collections.abc import Mapping, Sequence

import shtab

from avocado_jax.config import GrpoConfig, RunConfig, SftConfig, flat

FIELDS: Mapping[str, RunConfig] = {
    "sft": SftConfig(),
    "grpo": GrpoConfig(),
    "plan": GrpoConfig(),
    "ablate": GrpoConfig(),
}


def completion(parser: argparse.ArgumentParser, commands: Mapping[str, str], given: Sequence[str]) -> str:
    """Return the completion script.

    Args:
        given: arguments: the name of the shell. Other arguments exit with status 2.
    """
    if len(given) != 1 or given[0] not in shtab.SUPPORTED_SHELLS:
        parser.error(f"--print-completion takes one of {', '.join(shtab.SUPPORTED_SHELLS)}")
    subparsers = parser.add_subparsers(metavar="COMMAND")
    for name, summary in commands.items():
        command = subparsers.add_parser(name, help=summary, allow_abbrev=False)
        importlib.import_module(f"avocado_jax.cli.{name}").add_arguments(command)
        if name in FIELDS:
            for field, _, _ in flat(FIELDS[name]):
                command.add_argument(f"--{field}", help="a field of the config")
        for action in command._actions:
            if action.choices is None and action.nargs != 0:
                action.complete = shtab.FILE
    return shtab.complete(parser, shell=given[0])
