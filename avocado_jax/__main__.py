"""The command line: `avocado COMMAND`, or `python -m avocado_jax COMMAND`."""

import argparse
import importlib
import os
import platform
import signal
import sys
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from typing import NoReturn

from avocado_jax.errors import report

COMMANDS = {
    "caption": "caption video clips",
    "serve": "serve captions over HTTP, in the protocol of OpenAI",
    "curate": "make a training manifest from raw videos with a model behind an endpoint",
    "prepare": "make training shards from a manifest of videos",
    "sft": "fine-tune a captioner on captions",
    "grpo": "train a captioner with GRPO on rewards of its captions",
    "convert": "convert a checkpoint between Hugging Face and Orbax format",
    "plan": "predict memory and time of a training step on a TPU slice, without the slice",
    "world": "render clips of a synthetic world with known truth, or check captions against it",
    "score": "score captions with the training rewards",
    "evaluate": "evaluate a checkpoint on a benchmark",
    "ablate": "run the reward ablation over arms and seeds",
    "report": "combine results of evaluate into the table of the paper's ablation",
    "view": "write an HTML page of a run: curves, captions, clips and references",
    "bench": "measure the hot paths against the ceilings of this machine",
}
STATUSES = """\
exit status:
  0    finished
  1    failed, and a retry may help: storage, network, a lost host
  2    bad input: one line on stderr names the problem
  3    failed, and a retry fails in the same way: divergence, out of memory, internal error, exhausted budget
  75   stopped by SIGTERM (in training by Ctrl-C too) and resumable: the same command continues
  130  stopped by Ctrl-C
"""


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line on stderr and exit status 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


VERSIONS = ("avocado-jax", "jax", "jaxlib", "libtpu", "flax", "transformers")


def versions() -> str:
    """The versions for a bug report; packages that are not installed are omitted."""
    python = f"python {platform.python_version()}"
    found = []
    for name in VERSIONS:
        with suppress(PackageNotFoundError):
            found.append(f"{name} {version(name)}")
    return ", ".join([*found, python])


def main(argv: list[str] | None = None) -> int:
    """Run a command. Returns its exit status (see `STATUSES`)."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        return _run(argv)
    except KeyboardInterrupt:  # also during the import of the command
        print(f"avocado {argv[0]}: stopped", file=sys.stderr)
        return 130


def _run(argv: list[str]) -> int:
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # suppress the warning that torch is missing
    parser = Parser(
        prog="avocado",
        description="Audiovisual captioners in JAX.",
        epilog=STATUSES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--version",
        action="version",
        version=versions() if argv[:1] == ["--version"] else "",
        help="print the versions of the package, Python, jax and its main dependencies",
    )
    parser.add_argument("--print-completion", metavar="SHELL", help="print the completion script for a shell")
    if argv[:1] == ["--print-completion"]:
        from avocado_jax.cli.completion import completion

        print(completion(parser, COMMANDS, argv[1:]))
        return 0
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)
    for name, summary in COMMANDS.items():
        command = commands.add_parser(
            name, help=summary, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
        )
        if argv[:1] == [name]:  # import only the selected command: `bench` works without `av`
            try:
                module = importlib.import_module(f"avocado_jax.cli.{name}")
            except Exception as error:  # a broken installation
                return report(error, name)
            command.description = module.__doc__
            module.add_arguments(command)
            command.set_defaults(run=module.run)
    args, rest = parser.parse_known_args(argv)
    if rest and not hasattr(args, "fields"):  # commands with a config accept its fields
        commands.choices[args.command].error(f"unrecognized arguments: {' '.join(rest)}")
    args.fields = rest
    # Immediate exit is safe: files get their final names when complete, and the same command resumes or starts again.
    signal.signal(signal.SIGTERM, lambda *_: os._exit(75))
    try:
        return args.run(args)
    except BrokenPipeError:  # the reader of stdout has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        return report(error, args.command)


if __name__ == "__main__":
    sys.exit(main())
