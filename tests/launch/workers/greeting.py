"""A worker that ends well, and says what it was given."""

import os
import sys

rank, threads = os.environ["RANK"], os.environ["OMP_NUM_THREADS"]
print(f"rank {rank} of {os.environ['WORLD_SIZE']}, threads {threads}, arguments {sys.argv[1:]}")
print(f"step 1\rstep 2 of rank {rank}", end="", file=sys.stderr)
