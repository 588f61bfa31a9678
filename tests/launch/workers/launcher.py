"""A launcher as the `farspan` command is one: launcher.py LOG_DIRECTORY PROCESSES STOP_SECONDS MODULE ARGUMENTS..."""

import sys
from pathlib import Path

from farspan.launch.elastic import run_workers

if __name__ == "__main__":
    log_directory, processes, stop_seconds, module, *arguments = sys.argv[1:]
    sys.exit(
        run_workers(
            module,
            arguments,
            processes=int(processes),
            stop_seconds=float(stop_seconds),
            log_directory=Path(log_directory),
        )
    )
