"""One worker process of `farspan train`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
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
    end_with_parent(options.parent)
    report_errors_to_launcher()
    configure_allocator()
    # Imported only now: it takes seconds, in which the launcher may die.
    from farspan.launch.quiet import quiet_libraries

    quiet_libraries()
    from farspan.data.errors import DataError
    from farspan.trainer.config import ConfigError, load_config
    from farspan.trainer.run_lock import RunLockedError
    from farspan.trainer.train import run

    try:
        run(load_config(options.config, options.overrides), resume=options.resume == "auto")
    except (ConfigError, DataError, RunLockedError) as error:
        print(f"farspan: {error}", file=sys.stderr, flush=True)
        return USER_ERROR
    return 0


if __name__ == "__main__":
    sys.exit(main())
