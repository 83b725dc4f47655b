"""Settings that every test shares."""

import os

# Tests run several at a time on few cores; threads of their own would only get in each other's way.
os.environ.setdefault("OMP_NUM_THREADS", "1")
