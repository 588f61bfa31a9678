"""One worker process: that of `farspan train`, and what all have in common."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from farspan.launch.allocator import configure_allocator
from farspan.launch.guard import end_with_parent, report_errors_to_launcher

USER_ERROR = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Trains as one rank. Errors of the user's are one line and exit code 2; others carry their traceback."""
    parser = argparse.ArgumentParser(prog="python -m farspan.launch.worker")
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--resume", choices=("auto", "never"), default="auto")
    parser.add_argument("--parent", type=int, help="process id of the launcher, without which this process ends")
    options = parser.parse_args(arguments)

    def work() -> None:
        from farspan.trainer.config_file import load_config
        from farspan.trainer.train import run

        run(load_config(options.config, options.overrides), resume=options.resume == "auto")

    return carry_out(work, options.parent)


def carry_out_request(
    prog: str,
    add_arguments: Callable[[argparse.ArgumentParser], None],
    work: Callable[[argparse.Namespace], None],
    arguments: Sequence[str] | None,
) -> int:
    """A verb on a run's folder, as one rank: the request is on the command line, with overrides."""
    parser = argparse.ArgumentParser(prog=f"python -m {prog}")
    add_arguments(parser)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--parent", type=int, help="process id of the launcher, without which this process ends")
    options = parser.parse_args(arguments)
    return carry_out(lambda: work(options), options.parent)


def at_least_one(text: str) -> int:
    """The type of an argument."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"it must be 1 or more, not {number}")
    return number


def carry_out(work: Callable[[], None], parent: int | None) -> int:
    """The life of a worker: `work` imports what it needs by itself, and later than this module."""
    end_with_parent(parent)
    report_errors_to_launcher()
    configure_allocator()
    # Imported only now: it takes seconds, in which the launcher may die.
    from farspan.launch.quiet import quiet_libraries

    quiet_libraries()
    from farspan.data.errors import DataError
    from farspan.trainer.config import ConfigError
    from farspan.trainer.run_lock import RunLockedError

    try:
        work()
    except (ConfigError, DataError, RunLockedError) as error:
        print(f"farspan: {error}", file=sys.stderr, flush=True)
        return USER_ERROR
    return 0


if __name__ == "__main__":
    sys.exit(main())
