"""A worker that counts the signals it gets and, after the first one, goes on for the given seconds."""

import signal
import sys
import time

from farspan.launch.guard import end_with_parent

end_with_parent()
received: list[str] = []
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda number, _: received.append(signal.Signals(number).name))

print("ready")
while not received:
    time.sleep(0.02)
time.sleep(float(sys.argv[1]))
print(f"saved after {received}")
