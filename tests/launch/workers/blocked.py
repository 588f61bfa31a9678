"""A worker that says its pid and then stays in C code: asleep, or on rank 0 in a receive that never ends."""

import os
import sys
import time

from farspan.launch.guard import end_with_parent

end_with_parent()
print(f"pid {os.getpid()}", flush=True)
if sys.argv[1] == "receive":
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo")
    print("blocked", flush=True)
    if dist.get_rank() == 0:
        dist.recv(torch.zeros(1), src=1)
print("blocked", flush=True)
time.sleep(600)
