"""`python -m avocado_jax COMMAND`, installed as `avocado` too."""

import argparse
import importlib
import os
import signal
import sys
from typing import NoReturn

from avocado_jax.errors import report

COMMANDS = {
    "caption": "describe video clips in words",
    "curate": "turn raw videos into a training manifest, by models behind an endpoint",
    "prepare": "turn a manifest of videos into shards to train from",
    "sft": "fine-tune a captioner on captions",
    "grpo": "train a captioner on rewards of its own captions",
    "convert": "take a checkpoint from Hugging Face format to Orbax, or back",
    "plan": "say what a training step takes of its devices, without having them",
    "world": "make clips of a synthetic world with known truth, or check captions against it",
    "score": "score captions with the rewards that train captioners",
    "evaluate": "measure what a checkpoint can do",
    "ablate": "measure what each reward term is worth, over arms and seeds",
    "report": "put results of evaluate together, as the paper's ablation does",
    "view": "write a run as a page: its curves, its captions beside clips and references",
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
    """An argument parser whose complaint is one line on stderr and exit status 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def main(argv: list[str] | None = None) -> int:
    """Run one command. Returns its exit status, as in `STATUSES`."""
    argv = sys.argv[1:] if argv is None else argv
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # it would say that torch is absent
    parser = Parser(
        prog="avocado",
        description="Audiovisual captioners in JAX.",
        epilog=STATUSES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)
    for name, summary in COMMANDS.items():
        command = commands.add_parser(
            name, help=summary, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
        )
        if argv[:1] == [name]:  # only the command that runs is imported: `bench` works where `av` is absent
            try:
                module = importlib.import_module(f"avocado_jax.cli.{name}")
            except Exception as error:  # a broken installation
                return report(error, name)
            command.description = module.__doc__
            module.add_arguments(command)
            command.set_defaults(run=module.run)
    args, rest = parser.parse_known_args(argv)
    if rest and not hasattr(args, "fields"):  # commands that take a config take its fields too
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    args.fields = rest
    # At once: no file has its final name before it is complete, and the same command resumes or starts again.
    signal.signal(signal.SIGTERM, lambda *_: os._exit(75))
    try:
        return args.run(args)
    except KeyboardInterrupt:
        print(f"avocado {args.command}: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        return report(error, args.command)


if __name__ == "__main__":
    sys.exit(main())
