"""`python -m avocado_jax COMMAND`, installed as `avocado` too."""

import argparse
import importlib
import os
import signal
import sys
from typing import NoReturn

from avocado_jax.errors import InputError

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


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaint is one line on stderr and exit status 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def main(argv: list[str] | None = None) -> int:
    """Run one command. Returns its exit status: 0 finished, 1 failed, 2 bad input, 75 stopped and resumable."""
    argv = sys.argv[1:] if argv is None else argv
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # it would say that torch is absent
    parser = Parser(prog="avocado", description="Audiovisual captioners in JAX.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)
    for name, summary in COMMANDS.items():
        command = commands.add_parser(
            name, help=summary, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
        )
        if argv[:1] == [name]:  # only the command that runs is imported: `bench` works where `av` is absent
            module = importlib.import_module(f"avocado_jax.cli.{name}")
            command.description = module.__doc__
            module.add_arguments(command)
            command.set_defaults(run=module.run)
    args, rest = parser.parse_known_args(argv)
    if rest and not hasattr(args, "fields"):  # commands that take a config take its fields too
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    args.fields = rest
    # At once: nothing here has a target's name before it is whole, and the same command goes on or starts anew.
    signal.signal(signal.SIGTERM, lambda *_: os._exit(75))
    try:
        return args.run(args)
    except InputError as error:
        print(f"avocado {args.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"avocado {args.command}: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (OSError, FloatingPointError) as error:  # a full disk, a folder that may not be written; training diverged
        print(f"avocado {args.command}: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
