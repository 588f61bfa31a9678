"""One worker process of `farspan calibrate`, and the words that both the command and its workers understand."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from farspan.launch.worker import at_least_one, carry_out_request

if TYPE_CHECKING:
    from farspan.trainer.calibrate import Request


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_directory", type=Path, metavar="RUN_DIR")
    parser.add_argument("--output", type=Path, default=Path("budgets.yaml"), metavar="FILE", help="(budgets.yaml)")
    parser.add_argument("--rows", type=at_least_one, default=8, help="held-out rows that are read (8)")
    parser.add_argument("--quantile", type=_share, default=0.9, help="share of the rows that budgets suffice for (0.9)")


def request_of(options: argparse.Namespace) -> Request:
    from farspan.trainer.calibrate import Request

    return Request(options.run_directory, options.output, options.rows, options.quantile, tuple(options.overrides))


def words_of(options: argparse.Namespace) -> list[str]:
    """The same request as words for a worker's command line."""
    words = [str(options.run_directory), *options.overrides, f"--output={options.output}"]
    return [*words, f"--rows={options.rows}", f"--quantile={options.quantile}"]


def work(options: argparse.Namespace) -> None:
    from farspan.trainer.calibrate import run

    run(request_of(options))


def main(arguments: Sequence[str] | None = None) -> int:
    """Errors of the user's are one line and exit code 2; others carry their traceback."""
    return carry_out_request("farspan.launch.calibrate", add_arguments, work, arguments)


def _share(text: str) -> float:
    share = float(text)
    if not 0 < share <= 1:
        raise argparse.ArgumentTypeError(f"it must be above 0 and at most 1, not {text}")
    return share


if __name__ == "__main__":
    sys.exit(main())
