"""`farspan data`: what prepared data holds, and whether it is whole; and `farspan tokenizer train`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from farspan.data.prepared import Prepared


def add_data_verbs(actions: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """stats, show and verify."""
    counting = actions.add_parser("stats", help="Lengths of documents, and the rows that decomposition makes of them.")
    _add_directory(counting)
    _add_split(counting)
    counting.add_argument("--source", metavar="NAME", help="only the documents of this source")
    counting.add_argument("--shortest", type=_power_of_two, default=256, metavar="N", help="smallest bucket (256)")
    counting.add_argument("--longest", type=_power_of_two, default=8192, metavar="N", help="largest bucket (8192)")
    counting.add_argument("--no-randomize", action="store_true", help="cut long documents into the largest buckets")
    counting.add_argument("--seed", type=int, default=0, help="of the buckets that long documents draw (0)")
    counting.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the lengths (needs farspan[plot])")
    counting.set_defaults(verb=stats)

    showing = actions.add_parser("show", help="Tokens as text again, with the bounds of documents.")
    _add_directory(showing)
    _add_split(showing)
    place = showing.add_mutually_exclusive_group()
    place.add_argument("--document", type=int, metavar="N", help="this document from its start")
    place.add_argument("--source", metavar="NAME", help="the first documents of this source")
    place.add_argument("--start", type=int, default=0, metavar="N", help="from this token of the split on (0)")
    showing.add_argument("--tokens", type=_positive, metavar="N", help="how many (512, or the whole document)")
    showing.set_defaults(verb=show)

    verifying = actions.add_parser("verify", help="Check every byte, every id and every document's end.")
    _add_directory(verifying)
    verifying.set_defaults(verb=verify)


def add_tokenizer_verbs(actions: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """train."""
    training = actions.add_parser(
        "train",
        help="Train a SentencePiece tokenizer on files, or on the sources of a configuration.",
        usage="farspan tokenizer train CONFIG.yaml|FILE_OR_FOLDER... --output FILE [--vocabulary-size N] [--seed N]",
    )
    training.add_argument("sources", nargs="+", metavar="CONFIG.yaml|FILE_OR_FOLDER")
    training.add_argument("--output", type=Path, required=True, metavar="FILE", help="such as books.model")
    training.add_argument("--vocabulary-size", type=_positive, metavar="N", help="the configuration's, or 32000")
    training.add_argument("--seed", type=int, metavar="N", help="of the text that is read: run.seed, or 0")
    training.set_defaults(verb=train_tokenizer)


def stats(options: argparse.Namespace) -> int:
    """Prints a table of the sources, and the lengths of one split's documents."""
    from farspan.data.corpus import Corpus
    from farspan.data.errors import DataError
    from farspan.data.report import check_plot, plot_lengths, read_report
    from farspan.data.statistics import describe_lengths

    if options.plot:
        check_plot(options.plot)
    if options.shortest > options.longest:
        raise DataError(f"--shortest {options.shortest} is more than --longest {options.longest}")
    prepared = _open(options.directory)
    chosen = slice(None)
    if options.source is not None:
        here = _of_source(prepared, options)
        chosen = slice(here.start, here.stop)
    lengths = Corpus(prepared, options.split).lengths
    for line in read_report(prepared.directory):
        print(line)
    of_source, randomize = f" of {options.source}" if options.source else "", not options.no_randomize
    print(f"\n{options.split}{of_source}: {len(lengths[chosen]):,} documents")
    for line in describe_lengths(lengths, chosen, options.shortest, options.longest, randomize, options.seed):
        print(line)
    if options.plot:
        plot_lengths(lengths[chosen], options.plot)
    return 0


def show(options: argparse.Namespace) -> int:
    """Prints text, each document under a line that says where it comes from."""
    from farspan.data.show import document_start, show

    prepared = _open(options.directory)
    start, tokens = options.start, options.tokens or 512
    if options.source is not None:
        start, _ = document_start(prepared, options.split, _of_source(prepared, options).start)
    if options.document is not None:
        start, length = document_start(prepared, options.split, options.document)
        tokens = min(length, options.tokens or length)
    for line in show(prepared, options.split, start, tokens):
        print(line)
    return 0


def verify(options: argparse.Namespace) -> int:
    """Exit code 1 when something is wrong."""
    from farspan.data.verify import find_problems

    directory = _directory(options.directory)
    problems = list(find_problems(directory))
    for problem in problems:
        print(f"{directory}: {problem}")
    if not problems:
        print(f"{directory}: good")
    return 1 if problems else 0


def train_tokenizer(options: argparse.Namespace) -> int:
    """Writes the tokenizer that `farspan prepare` would train on a configuration, or one of files."""
    from farspan.data.tokenizer_training import train_on_sources
    from farspan.trainer.config_file import load_config

    first = options.sources[0]
    if first.endswith((".yaml", ".yml")):
        config = load_config(Path(first), options.sources[1:])
        data = config.data
        size, seed = options.vocabulary_size or data.vocabulary_size, config.run.seed
        train_on_sources(
            [source.listed() for source in data.sources],
            options.output,
            size,
            seed=seed if options.seed is None else options.seed,
            heldout_fraction=data.heldout_fraction,
            drop_invalid=data.drop_invalid,
            max_record_bytes=data.max_record_bytes,
        )
    else:
        size = options.vocabulary_size or 32_000
        train_on_sources(options.sources, options.output, size, seed=options.seed or 0)
    print(f"{options.output} is ready: {size:,} pieces")
    return 0


def _of_source(prepared: Prepared, options: argparse.Namespace) -> range:
    """The documents of `--source` in the split that was asked for."""
    from farspan.data.errors import DataError

    if options.source not in prepared.sources:
        raise DataError(f"--source {options.source}: {options.directory} has {', '.join(prepared.sources)}")
    here = prepared.sources[options.source][options.split]
    if not here:
        raise DataError(f"--source {options.source} has no document in the {options.split} split")
    return here


def _open(path: Path) -> Prepared:
    from farspan.data.prepared import load_prepared

    return load_prepared(_directory(path))


def _directory(path: Path) -> Path:
    """`data.directory` of a configuration, or the path itself."""
    if path.suffix not in (".yaml", ".yml"):
        return path
    from farspan.trainer.config_file import load_config

    return load_config(path).data.directory


def _add_directory(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "directory", type=Path, metavar="DIRECTORY_OR_CONFIG", help="what `farspan prepare` wrote, or what it was told"
    )


def _add_split(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--split", choices=("train", "heldout"), default="train")


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"a number above 0 is needed, not {text!r}")
    return int(text)


def _power_of_two(text: str) -> int:
    number = _positive(text)
    if number & (number - 1):
        raise argparse.ArgumentTypeError(f"a power of two is needed, not {text}")
    return number
