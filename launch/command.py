"""The `farspan` command."""

from __future__ import annotations

import argparse
import os
import re
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from farspan.launch.worker import USER_ERROR, carry_out

if TYPE_CHECKING:
    from farspan.trainer.config import RunConfig


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0; 2 for an error of the user's, said in one line; 130 after Ctrl-C; 141 when nobody reads what is
    printed any more, as behind `| head`; else that of the failed worker."""
    options = _parse(arguments)
    try:
        code = _run(options)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        print("farspan: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # What is left in the buffer goes nowhere: Python would complain of it when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE


def _run(options: argparse.Namespace) -> int:
    from farspan.launch.quiet import quiet_libraries

    quiet_libraries()
    from farspan.data.errors import DataError
    from farspan.trainer.checkpoint.manifest import CheckpointError
    from farspan.trainer.config import ConfigError
    from farspan.trainer.run_lock import RunLockedError

    try:
        code: int = options.verb(options)
    except (ConfigError, DataError, CheckpointError, RunLockedError) as error:
        print(f"farspan: {error}", file=sys.stderr)
        return USER_ERROR
    except OSError as error:
        if error.filename is None:
            raise
        print(f"farspan: {error.filename}: {error.strerror} (see run.dir and data.directory)", file=sys.stderr)
        return USER_ERROR
    return code


def train(options: argparse.Namespace) -> int:
    """Starts the workers of this machine, or trains right here when torchrun has started this process as one."""
    from farspan.launch import elastic, worker
    from farspan.trainer.config_file import load_config
    from farspan.trainer.preflight import check, default_processes
    from farspan.trainer.run_lock import RunLockedError, is_locked

    passed_on = [str(options.config), *options.overrides, "--resume", options.resume]
    if _is_worker():
        return worker.main(passed_on)
    config = load_config(options.config, options.overrides)
    processes = default_processes(config)
    check(config, processes)
    holder = is_locked(config.run.dir)
    if holder is not None:
        raise RunLockedError(holder)
    return elastic.run_workers(
        "farspan.launch.worker",
        [*passed_on, "--parent", str(os.getpid())],
        processes=processes,
        stop_seconds=config.launch.stop_seconds,
        log_directory=config.run.dir / "logs",
    )


def generate(options: argparse.Namespace) -> int:
    """Asks the newest checkpoint of a run, on as many processes of this machine as shared a sequence in training."""
    from farspan.launch import generate as worker
    from farspan.trainer.generate import check

    if _is_worker():
        return carry_out(lambda: worker.work(options), None)
    ready = check(worker.request_of(options))
    return _run_workers(worker, options, ready.config, ready.degrees.world)


def calibrate(options: argparse.Namespace) -> int:
    """Measures budgets of sparse attention on the newest checkpoint of a run, on as many processes as `generate`."""
    from farspan.launch import calibrate as worker
    from farspan.trainer.calibrate import check

    if _is_worker():
        return carry_out(lambda: worker.work(options), None)
    config, degrees = check(worker.request_of(options))
    return _run_workers(worker, options, config, degrees.world)


def _is_worker() -> bool:
    """Whether torchrun started this process as one."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def _run_workers(worker: ModuleType, options: argparse.Namespace, config: RunConfig, processes: int) -> int:
    """On a run's folder, with the request that `worker` reads from its command line."""
    from farspan.launch import elastic

    return elastic.run_workers(
        worker.__name__,
        [*worker.words_of(options), "--parent", str(os.getpid())],
        processes=processes,
        stop_seconds=config.launch.stop_seconds,
        log_directory=options.run_directory / "logs",
    )


def prepare(options: argparse.Namespace) -> int:
    """Encodes `data.sources` into `data.directory`."""
    from farspan.data.prepare import prepare as prepare_data
    from farspan.trainer.config_file import load_config
    from farspan.trainer.preflight import short_splits

    config = load_config(options.config, options.overrides)
    data = config.data
    prepared = prepare_data(
        [source.listed() for source in data.sources],
        data.directory,
        tokenizer=data.tokenizer,
        vocabulary_size=data.vocabulary_size,
        heldout_fraction=data.heldout_fraction,
        seed=config.run.seed,
        end_of_document=data.end_of_document,
        drop_invalid=data.drop_invalid,
        max_record_bytes=data.max_record_bytes,
        processes=data.processes,
        report=lambda line: print(line, flush=True),
        terminal=sys.stderr if sys.stderr.isatty() else None,
    )
    for shortage in short_splits(config, prepared):
        print(f"warning: {shortage}")
    return 0


def plan(options: argparse.Namespace) -> int:
    """Prints mesh, plan, its verification, expected time and memory of a step, and who computes and sends what."""
    from farspan.trainer.config_file import load_config
    from farspan.trainer.describe_plan import describe_plan
    from farspan.trainer.preflight import default_processes

    config = load_config(options.config, options.overrides)
    describe_plan(config, default_processes(config), print, options.plot)
    return 0


def data_schedule(options: argparse.Namespace) -> int:
    """Prints which lengths the steps of a run have, and what of the text they read."""
    from farspan.trainer.config_file import load_config
    from farspan.trainer.describe_schedule import describe_schedule

    describe_schedule(load_config(options.config, options.overrides), print, options.plot)
    return 0


def data_compare(options: argparse.Namespace) -> int:
    """Prints what each way of making rows does to the documents."""
    from farspan.trainer.compare import compare
    from farspan.trainer.config_file import load_config

    compare(load_config(options.config, options.overrides), print)
    return 0


def doctor(options: argparse.Namespace) -> int:
    """Prints versions, devices and attention backends, and which of them a configuration's first batch will use."""
    from farspan.trainer.config_file import load_config
    from farspan.trainer.doctor import examine
    from farspan.trainer.preflight import default_processes

    config = load_config(options.config, options.overrides) if options.config else None
    examine(config, default_processes(config) if config else 1, options.gpu, print)
    return 0


def checkpoint_list(options: argparse.Namespace) -> int:
    from farspan.trainer.checkpoint.store import CheckpointStore

    listed = CheckpointStore(_checkpoints(options.run_directory), keep=1).list()
    for entry in listed:
        tokens = f"{entry.state['tokens']:>16,} tokens" if entry.state else f"{'unreadable':>23}"
        print(f"step {entry.step:>9,} {tokens} {entry.bytes / 1e9:>9.3f} GB  {entry.path}")
    if not listed:
        print(f"there are no checkpoints in {_checkpoints(options.run_directory)}")
    return 0


def checkpoint_verify(options: argparse.Namespace) -> int:
    """Checks every byte of one checkpoint, or of all of a run; exit code 1 when something is damaged."""
    from farspan.trainer.checkpoint.store import CheckpointStore

    path: Path = options.path
    directory = path.parent if (path / "manifest.json").exists() else _checkpoints(path)
    store = CheckpointStore(directory, keep=1)
    paths = [path] if directory == path.parent else [entry.path for entry in store.list()]
    damaged = False
    for checkpoint in paths:
        problems = store.verify(checkpoint)
        damaged |= bool(problems)
        print(f"{checkpoint}: {'; '.join(problems) if problems else 'good'}")
    for aside in sorted(directory.glob("*.damaged*")):
        print(f"{aside}: was damaged and set aside")
    if not paths:
        print(f"there are no checkpoints in {directory}")
    return 1 if damaged or not paths else 0


def _checkpoints(run_directory: Path) -> Path:
    from farspan.trainer.config import ConfigError

    if not run_directory.is_dir():
        raise ConfigError(f"there is no run directory {run_directory}")
    return run_directory if run_directory.name == "checkpoints" else run_directory / "checkpoints"


def _capability(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"sm_(\d+)(\d)", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"a compute capability is written like sm_90, not {text!r}")
    return int(found[1]), int(found[2])


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Overrides may stand anywhere behind the verb, which argparse alone does not allow."""
    parser = _parser()
    options, others = parser.parse_known_args(arguments)
    unknown = [word for word in others if word.startswith("-") or "overrides" not in options]
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    options.overrides = others
    return options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="farspan", description="Distributed training on very long sequences.")
    verbs = parser.add_subparsers(required=True, metavar="VERB")

    def with_config(name: str, verb: object, summary: str, option: str = "") -> argparse.ArgumentParser:
        usage = f"farspan {name} CONFIG [key=value ...]{option}"
        epilog = "key=value overrides a key of the file, such as train.steps=10."
        added = verbs.add_parser(name, help=summary, description=summary, usage=usage, epilog=epilog)
        added.add_argument("config", type=Path, metavar="CONFIG", help="YAML file")
        added.set_defaults(verb=verb, overrides=[])
        return added

    training = with_config(
        "train", train, "Train, on this machine's processes or as a torchrun worker.", " [--resume {auto,never}]"
    )
    training.add_argument(
        "--resume",
        choices=("auto", "never"),
        default="auto",
        help="auto (default): go on from the newest valid checkpoint; never: refuse a run that has one",
    )
    with_config("prepare", prepare, "Encode text for training.")
    planning = with_config(
        "plan",
        plan,
        "Print and verify who computes what, with the expected time and memory; starts nothing.",
        " [--plot FILE.png]",
    )
    planning.add_argument(
        "--plot", type=Path, metavar="FILE.png", help="draw the work by rank and stage (needs farspan[plot])"
    )

    examining = verbs.add_parser(
        "doctor",
        help="Say what this machine has, and which attention backends a configuration will use.",
        description="Versions, devices and attention backends; with a configuration, who computes its first batch.",
        usage="farspan doctor [CONFIG [key=value ...]] [--gpu sm_90]",
    )
    examining.add_argument("config", type=Path, nargs="?", metavar="CONFIG", help="YAML file")
    examining.add_argument(
        "--gpu", type=_capability, metavar="sm_90", help="speak of a GPU of this compute capability instead"
    )
    examining.set_defaults(verb=doctor, overrides=[])

    from farspan.launch.generate import add_arguments

    asking = verbs.add_parser(
        "generate",
        help="Ask the newest checkpoint of a run a question about a long text.",
        description="The run's context ranks read the text together, then the question, and print the answer.",
        usage="farspan generate RUN_DIR --prompt-file FILE [--question TEXT] [options] [key=value ...]",
        epilog="key=value overrides a key of the run's configuration, such as parallel.context=1.",
    )
    add_arguments(asking)
    asking.set_defaults(verb=generate, overrides=[])

    from farspan.launch import calibrate as calibration

    measuring = verbs.add_parser(
        "calibrate",
        help="Measure how many columns and diagonals sparse attention needs on a run's held-out text.",
        description="The newest checkpoint reads held-out rows with dense attention; what each head would select for "
        "attention.sparse.mass becomes its budget in a file for attention.sparse.budgets.",
        usage="farspan calibrate RUN_DIR [--output FILE] [--rows N] [--quantile SHARE] [key=value ...]",
        epilog="key=value overrides a key of the run's configuration, such as attention.sparse.mass=0.95.",
    )
    calibration.add_arguments(measuring)
    measuring.set_defaults(verb=calibrate, overrides=[])

    from farspan.launch import data as data_verbs

    data = verbs.add_parser("data", help="Look at what training reads.")
    looks = data.add_subparsers(required=True, metavar="ACTION")
    data_verbs.add_data_verbs(looks)
    scheduling = looks.add_parser(
        "schedule",
        help="Which lengths of rows a run's steps have, and tokens of each.",
        description="For data.method decompose: rows and tokens by length, steps of each, and what is discarded.",
        usage="farspan data schedule CONFIG [key=value ...] [--plot FILE.png]",
        epilog="key=value overrides a key of the file, such as curriculum.odds=uniform.",
    )
    scheduling.add_argument("config", type=Path, metavar="CONFIG", help="YAML file")
    scheduling.add_argument(
        "--plot", type=Path, metavar="FILE.png", help="draw lengths by step and tokens by length (needs farspan[plot])"
    )
    scheduling.set_defaults(verb=data_schedule, overrides=[])
    comparing = looks.add_parser(
        "compare",
        help="What each way of making rows does to the documents: padding, cuts, and how much tokens see.",
        description="Each data.method at train.sequence_length, by the lengths of the documents; no text is read.",
        usage="farspan data compare CONFIG [key=value ...]",
        epilog="key=value overrides a key of the file, such as data.overlong=drop.",
    )
    comparing.add_argument("config", type=Path, metavar="CONFIG", help="YAML file")
    comparing.set_defaults(verb=data_compare, overrides=[])
    tokenizing = verbs.add_parser("tokenizer", help="Train a tokenizer.")
    data_verbs.add_tokenizer_verbs(tokenizing.add_subparsers(required=True, metavar="ACTION"))

    checkpoints = verbs.add_parser("checkpoint", help="List or verify checkpoints.")
    actions = checkpoints.add_subparsers(required=True, metavar="ACTION")
    listing = actions.add_parser("list", help="Steps, tokens and sizes of a run's checkpoints.")
    listing.add_argument("run_directory", type=Path, metavar="RUN_DIR")
    listing.set_defaults(verb=checkpoint_list)
    verifying = actions.add_parser("verify", help="Check every byte against the manifest.")
    verifying.add_argument("path", type=Path, metavar="RUN_DIR_OR_CHECKPOINT")
    verifying.set_defaults(verb=checkpoint_verify)
    return parser


if __name__ == "__main__":
    sys.exit(main())
