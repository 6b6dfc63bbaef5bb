"""What every command line shares: the parser, the flags of a run, and how errors become lines and exit codes.

parser = cli.parser("distill", description=..., examples=(...), resume=True, dry_run=True)
arguments = parser.parse_args(argv)
return cli.main_guard(lambda: run(arguments))            # sys.exit takes the result
"""

import argparse
import difflib
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NoReturn

from herd.run import errors, files, last_words, launcher
from herd.run.command_line import command_line as command_line  # part of this module's face

PACKAGE = "herd-workbench"
UNEXPECTED, ABORTED = 1, 130  # a bug, with its traceback; Ctrl-C where nothing could be saved
MOST_THREADS = 64  # where there are not more cores
PLANNING = ("--world-size", "--mfu")  # mean something beside --dry-run only
MAIN_PAUSE_S = 3.0  # longer than the second in which launchers notice that a rank has gone
FOLLOWER_PAUSE_S = 10.0  # longer than rank 0 is behind the others on a busy machine


class Parser(argparse.ArgumentParser):
    """ArgumentParser that speaks on rank 0 only, in one line, and names the nearest flag for an unknown one."""

    def _print_message(self, message: str, file: Any = None) -> None:
        if launcher.is_main():
            super()._print_message(message, file)

    def error(self, message: str) -> NoReturn:
        """Leave with exit code 2 and one line on stderr."""
        self.exit(errors.USAGE, f"error: {message} ({self.prog} --help lists the flags)\n")

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        """As ArgumentParser's, with a suggestion for an unknown flag (found first: it may be a required one).

        A flag that only plans is refused where nothing is planned.
        """
        flags = [word.partition("=")[0] for word in (sys.argv[1:] if args is None else args)]
        for flag in flags:
            if flag.startswith("--") and flag not in ("--", *self._option_string_actions):
                near = difflib.get_close_matches(flag, self._option_string_actions, n=1)
                self.error(f"{flag}: unknown{f'; did you mean {near[0]}?' if near else ''}")
        found = super().parse_args(args, namespace)
        for flag in PLANNING:
            if flag in flags and not found.dry_run:
                self.error(f"{flag}: plans only and changes no run; add --dry-run, or leave it out")
        return found


class _Refuse(argparse.Action):
    """DeepSpeed's own configuration flags: there is one source."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        parser.error(
            f"{self.option_strings[0]}: the DeepSpeed configuration is generated from --config; "
            "put further keys under deepspeed.extra, such as --set deepspeed.extra.wall_clock_breakdown=true"
        )


class _Version(argparse.Action):
    """Looked up only when asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        try:
            number = version(PACKAGE)
        except PackageNotFoundError:
            number = "(not installed)"
        parser._print_message(f"{PACKAGE} {number}\n", sys.stdout)
        parser.exit()


def parser(
    prog: str,
    *,
    description: str,
    examples: Sequence[str],
    config: bool = True,
    resume: bool = False,
    dry_run: bool = False,
) -> Parser:
    """A command's parser, run as `python -m {prog}`; flags of its own are added to the result.

    `config`: --config and --set. `resume`: --resume. `dry_run`: --dry-run, --world-size, --mfu.
    """
    shown = "examples:\n" + "\n".join(f"  {example}" for example in examples)
    out = Parser(
        prog=f"python -m {prog}",
        description=description,
        epilog=shown,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        add_help=False,
    )
    if config:
        group = out.add_argument_group("what to run")
        group.add_argument("--config", required=True, metavar="FILE", help="YAML configuration")
        group.add_argument(
            "--set",
            action="append",
            default=[],
            metavar="KEY=VALUE",
            help="override one value, such as optim.lr=2e-3; the value is YAML; may be repeated",
        )
    if resume:
        group = out.add_argument_group("going on")
        group.add_argument(
            "--resume",
            default="never",
            metavar="WHICH",
            help="auto: from the last whole checkpoint, else fresh; latest: it must exist; a checkpoint's path; "
            "never (default): only into an empty run folder",
        )
    if dry_run:
        group = out.add_argument_group("planning")
        group.add_argument("--dry-run", action="store_true", help="print the resolved configuration and the plan, stop")
        group.add_argument(
            "--world-size",
            type=_positive,
            default=launcher.world_size(),
            metavar="N",
            help="ranks to plan for (those started)",
        )
        group.add_argument("--mfu", type=_share, default=0.4, metavar="X", help="model FLOPs utilisation, 0 to 1 (0.4)")
    group = out.add_argument_group("other")
    group.add_argument("-h", "--help", action="help", help="show this and stop")
    group.add_argument("--version", action=_Version, nargs=0, help="show the version and stop")
    # What DeepSpeed's launcher and habit add.
    out.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    out.add_argument("--deepspeed_config", action=_Refuse, nargs="?", help=argparse.SUPPRESS)
    out.add_argument("--deepspeed", action=_Refuse, nargs="?", help=argparse.SUPPRESS)
    return out


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text}: must be a whole number, 1 or more")
    return int(text)


def threads(text: str) -> int:
    """A number of threads that a flag was given; torch dies without a word of far more than there are cores."""
    most = max(MOST_THREADS, os.cpu_count() or 1)
    if not text.isdecimal() or not 1 <= int(text) <= most:
        raise argparse.ArgumentTypeError(f"{text}: must be a whole number, 1 to {most}")
    return int(text)


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text}: must be more than 0, 1 at most")
    return value


def main_guard(body: Callable[[], None], *, interrupted: str = "interrupted") -> int:
    """Run a command's body and return its exit code; the user's mistakes become one line on stderr, bugs a traceback.

    interrupted: what Ctrl-C says where the body does not answer it.

    Rank 0 speaks for errors that all ranks meet: the others wait until the launcher has ended them, and speak only
    if it has not and nobody has said the same. It also makes rank 0's exit code the launcher's.
    """
    try:
        body()
    except errors.HerdError as error:
        prefix = "" if isinstance(error, errors.Interrupted) else "error: "
        return _leave(f"{prefix}{error}", error.exit_code)
    except KeyboardInterrupt:
        return _leave(interrupted, ABORTED)
    except Exception as error:
        full = files.full_disk(error)
        if full is not None:
            return _leave(f"error: {full}", full.exit_code)
        if launcher.world_size() > 1:  # a rank with a cause to name leaves first
            time.sleep(MAIN_PAUSE_S if launcher.is_main() else FOLLOWER_PAUSE_S)
        trace = traceback.format_exc()
        if last_words.first(trace):
            print(trace, end="", file=sys.stderr, flush=True)
        return UNEXPECTED
    return errors.DONE


def _leave(message: str, code: int) -> int:
    if not launcher.is_main():
        time.sleep(FOLLOWER_PAUSE_S)
    if last_words.first(message):
        rank = "" if launcher.is_main() else f"rank {launcher.rank()}: "
        print(f"{rank}{message}", file=sys.stderr, flush=True)
    return code
