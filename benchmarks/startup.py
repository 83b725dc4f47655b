"""How long the command line takes to start, beside `import torch`.

python -m benchmarks.startup
"""

from __future__ import annotations

import subprocess
import sys

import torch

from benchmarks.measure import alternating, show

COMMANDS = {
    "import torch": [sys.executable, "-c", "import torch"],
    "import run_lib": [sys.executable, "-c", "import run_lib"],
    "main.py --helpfull": [sys.executable, "main.py", "--helpfull"],
}


def main() -> None:
    """Measure and print."""
    works = {
        name: lambda command=command: subprocess.run(command, capture_output=True)
        for name, command in COMMANDS.items()
    }
    device = torch.device("cpu")
    times = alternating(works, device)
    records = [
        {"work": name, "seconds": time, "more than torch": time - times["import torch"]}
        for name, time in times.items()
    ]
    show("start-up", device, records)


if __name__ == "__main__":
    main()
