"""From a command line to the one file of its subcommand, and from whatever happens there to an exit code.

Owns the imports being lazy (`--help` answers at once), Ctrl-C, standard streams that are closed, full or left by their reader, and that
an error is one sentence on standard error.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol, cast

from peerd import exit_codes
from peerd.client.errors import ClientError
from peerd.version import VERSION


class Command(NamedTuple):
    """A subcommand: the module whose ``run(prog, arguments)`` does it, and its line in the help."""

    module: str
    summary: str


class CommandModule(Protocol):
    """What a subcommand's file has."""

    def run(self, prog: str, arguments: Sequence[str]) -> int: ...


def dispatch(prog: str, description: str, commands: Mapping[str, Command], arguments: Sequence[str]) -> int:
    """Run the subcommand that ``arguments`` begin with; returns the exit code."""
    _open_missing_streams()
    width = max(len(name) for name in commands)
    listing = "\n".join(f"  {name:<{width}}  {command.summary}" for name, command in commands.items())
    parser = argparse.ArgumentParser(
        prog=prog,
        usage=f"{prog} [--version] [-h] COMMAND ...",
        description=description,
        epilog=f"commands:\n{listing}\n\n`{prog} COMMAND --help` says more.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"{prog} {VERSION}")
    parser.add_argument("command", metavar="COMMAND", help=argparse.SUPPRESS)
    name = parser.parse_args(arguments[:1] or ["--help"]).command
    if name not in commands:
        parser.error(f"there is no command {name[:40]!r}; there are {', '.join(commands)}.")
    return _guarded(commands[name], f"{prog} {name}", arguments[1:])


def _guarded(command: Command, prog: str, arguments: Sequence[str]) -> int:
    """Run a subcommand; every way out is an exit code, and no traceback is for people."""
    try:
        module = cast(CommandModule, importlib.import_module(command.module))
        code = module.run(prog, arguments)
        sys.stdout.flush()
    except ClientError as error:
        print(f"{prog}: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return exit_codes.INTERRUPTED
    except BrokenPipeError:
        _silence_output()  # whoever read us has enough
        return exit_codes.BROKEN_PIPE
    except OSError as error:
        # The socket's and the daemon's errors are ClientErrors: what is left is where the output goes.
        _silence_output()
        print(f"{prog}: Can't write the output ({error.strerror}); send it to another place.", file=sys.stderr)
        return exit_codes.OUTPUT_FAILED
    return code


def _silence_output() -> None:
    """Point standard output elsewhere, so that the interpreter's own flush at the end can't fail."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _open_missing_streams() -> None:
    """Give a process that was started with closed standard streams empty ones: no file or socket may become number 0, 1 or 2."""
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        if getattr(sys, name) is None:
            descriptor = os.open(os.devnull, os.O_RDWR)
            if descriptor != number:
                os.dup2(descriptor, number)
                os.close(descriptor)
            setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))  # noqa: SIM115 - the process's own
