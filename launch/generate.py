"""One worker process of `farspan generate`, and the words that both the command and its workers understand."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from farspan.launch.worker import at_least_one, carry_out_request

if TYPE_CHECKING:
    from farspan.trainer.generate import Request


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_directory", type=Path, metavar="RUN_DIR")
    parser.add_argument("--prompt-file", type=Path, required=True, metavar="FILE", help="the long text, in UTF-8")
    parser.add_argument("--question", default="", metavar="TEXT", help="what follows the text, and sees all of it")
    parser.add_argument("--tokens", type=at_least_one, default=64, help="longest answer in tokens (64)")
    parser.add_argument("--temperature", type=_not_negative, default=0.0, help="0 (default) for the likeliest tokens")
    parser.add_argument("--seed", type=int, default=0, help="of the draws at a temperature above 0")
    parser.add_argument(
        "--star-block",
        type=at_least_one,
        metavar="TOKENS",
        help="read the text with Star Attention in blocks of so many tokens (default: as in training)",
    )
    parser.add_argument(
        "--replicate-anchor", action="store_true", help="every rank computes the anchor itself, and nothing is sent"
    )


def request_of(options: argparse.Namespace) -> Request:
    from farspan.trainer.generate import Request

    return Request(
        run=options.run_directory,
        prompt=options.prompt_file,
        question=options.question,
        tokens=options.tokens,
        temperature=options.temperature,
        seed=options.seed,
        star_block=options.star_block,
        replicate_anchor=options.replicate_anchor,
        overrides=tuple(options.overrides),
    )


def words_of(options: argparse.Namespace) -> list[str]:
    """The same request as words for a worker's command line."""
    words = [str(options.run_directory), *options.overrides, f"--prompt-file={options.prompt_file}"]
    words += [f"--question={options.question}", f"--tokens={options.tokens}", f"--temperature={options.temperature}"]
    words += [f"--seed={options.seed}"]
    if options.star_block is not None:
        words.append(f"--star-block={options.star_block}")
    return [*words, "--replicate-anchor"] if options.replicate_anchor else words


def work(options: argparse.Namespace) -> None:
    from farspan.trainer.generate import run

    run(request_of(options))


def main(arguments: Sequence[str] | None = None) -> int:
    """Errors of the user's are one line and exit code 2; others carry their traceback."""
    return carry_out_request("farspan.launch.generate", add_arguments, work, arguments)


def _not_negative(text: str) -> float:
    number = float(text)
    if not 0 <= number < float("inf"):
        raise argparse.ArgumentTypeError(f"it must be 0 or more, not {text}")
    return number


if __name__ == "__main__":
    sys.exit(main())
