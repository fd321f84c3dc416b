"""What the command lines share: flags with an example in every help, and one line for an error.

Exit status: 0 done; 2 bad input, one line that says what, where and what to do; 1 an internal failure;
130 interrupted. `--debug` shows the traceback.
"""

import argparse
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import NoReturn

from vikhr_t5.errors import UserError, nearest


class Parser(argparse.ArgumentParser):
    """argparse, with errors that are one line; text after the flags is kept as it is."""

    def __init__(self, **arguments: object) -> None:
        given = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False, **arguments}
        super().__init__(**given)  # type: ignore[arg-type]

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")


def add_command(
    commands: argparse._SubParsersAction,
    name: str,
    run: Callable[[argparse.Namespace], int | None],
    summary: str,
    example: str,
    notes: str = "",
) -> argparse.ArgumentParser:
    """A command with `--debug` and an example in its help. `run` gets the flags and gives the exit status, or None."""
    parser = commands.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog=f"{notes}\n\nexample:\n  {example}".lstrip(),
    )
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    parser.set_defaults(run=run, parser=parser)
    return parser


def refuse_unknown(flags: argparse.Namespace, unknown: Sequence[str]) -> None:
    """UserError with the nearest flag of the command, if there is an argument that it does not know."""
    if unknown:
        known = [option for action in flags.parser._actions for option in action.option_strings]
        hint = nearest(unknown[0].split("=")[0], known)
        raise UserError(f"unknown argument {unknown[0]!r} of {flags.command} ({hint})")


def exit_status(program: str, action: Callable[[], int | None], debug: bool) -> int:
    """Do `action`; an error becomes one line on stderr and its status."""
    try:
        return action() or 0
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        line, status = error_line(error, debug)
        print(f"{program}: {line}", file=sys.stderr)
        return status


def error_line(error: BaseException, debug: bool) -> tuple[str, int]:
    """(an error in one line, its exit status); with `debug` the traceback is printed."""
    if debug:
        traceback.print_exception(error)
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", 130
    message = str(error).split("\n")[0]  # gin appends its own account of the call to further lines
    if isinstance(error, UserError):
        return message, 2
    return f"{type(error).__name__}: {message} (run with --debug to see where)", 1
