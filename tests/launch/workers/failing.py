"""Workers of which rank 1 fails in the way given; rank 0 notices at once, and fails in its turn or is stuck."""

import atexit
import os
import signal
import sys
import time
from pathlib import Path

from farspan.launch.guard import end_with_parent, report_errors_to_launcher

end_with_parent()
report_errors_to_launcher()
how, scratch = sys.argv[1], Path(sys.argv[2])
pid_file, failed = scratch / "rank_1.pid", scratch / "rank_1.failed"


def end_slowly() -> None:
    failed.touch()
    time.sleep(0.5)


def wait_for_the_end_of_rank_1() -> None:
    while not pid_file.exists() or not pid_file.read_text():
        time.sleep(0.002)
    stat = Path(f"/proc/{pid_file.read_text()}/stat")
    while not failed.exists() and stat.read_text().rsplit(")", 1)[1].split()[0] != "Z":
        time.sleep(0.002)


if os.environ["RANK"] == "1":
    pid_file.write_text(str(os.getpid()))
    time.sleep(0.3)
    if how in ("raise", "raise, other stuck"):
        atexit.register(end_slowly)  # after the report: rank 0 then ends before rank 1 does
        raise ValueError("the cause")
    if how == "_exit":
        os._exit(3)
    if how in ("SIGKILL", "SIGSEGV"):
        os.kill(os.getpid(), signal.Signals[how])
    print("train.steps is -1; it must be positive", file=sys.stderr)
    sys.exit(2)

wait_for_the_end_of_rank_1()
if how == "raise, other stuck":
    time.sleep(600)
if how == "both refuse":
    print("train.steps is -1; it must be positive", file=sys.stderr)
    sys.exit(2)
raise ConnectionError("the consequence")
