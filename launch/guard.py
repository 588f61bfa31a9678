"""What a worker does before anything else: it ties its life to its launcher's, and leaves word of its errors there."""

import ctypes
import faulthandler
import json
import os
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from types import TracebackType

_PR_SET_PDEATHSIG = 1  # from <linux/prctl.h>
_POLL_SECONDS = 0.5


def end_with_parent(parent: int | None = None) -> None:
    """Kill this process as soon as its parent is gone, however the parent ended (kill -9 included).

    torch starts each worker in a session of its own, so nothing else would end the workers of a killed launcher: they
    would train on and write into a run that someone else may have resumed. Works under any launcher. On Linux the
    kernel does it, even while this process is blocked in C code. It watches the thread that started this process;
    torch's launchers start workers from their main thread. Call it from the main thread, once.

    Args:
        parent: pid of the launcher, when the launcher told it to us: a launcher that died even before this call is
            then noticed. By default, the parent at the time of the call.

    Raises:
        SystemExit: the parent is gone already.
        OSError: the kernel refused.
    """
    parent = os.getppid() if parent is None else parent
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed: cannot end with the launcher")
    else:
        threading.Thread(target=_watch_parent, args=(parent,), daemon=True).start()
    # The kernel sends nothing for a parent that had already ended.
    if os.getppid() != parent:
        sys.exit(f"The launcher (process {parent}) ended before this worker began.")


def _watch_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_POLL_SECONDS)
    os.kill(os.getpid(), signal.SIGKILL)


def report_errors_to_launcher() -> None:
    """Send the traceback of an uncaught exception to the launcher, which prints the first one of all ranks, once.

    The file and its layout are torch's (`TORCHELASTIC_ERROR_FILE`), so torchrun understands it too. Nothing is printed
    here then: what rank 0 prints reaches the console, and the first error is rarely rank 0's own. Without a launcher
    that asks for it, the traceback goes to stderr as ever. Crashes in C code leave a stack on stderr.
    """
    faulthandler.enable()
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not path:
        return

    def write_report(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        details = {
            "py_callstack": "".join(traceback.format_exception(kind, error, trace)),
            "timestamp": str(int(time.time())),
        }
        unfinished = Path(f"{path}.unfinished")
        unfinished.write_text(json.dumps({"message": {"message": f"{kind.__name__}: {error}", "extraInfo": details}}))
        unfinished.rename(path)  # the launcher may look at any moment, and may end us at any moment

    sys.excepthook = write_report
