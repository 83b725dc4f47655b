"""Memory of the host: freed blocks are used again."""

import subprocess
import sys

import pytest
from small_runs import ROOT

from benchmarks import variants

FAULTS = """
import ctypes, resource, sys
import torch
from score_lib.base.memory import keep_freed_memory

if sys.argv[1] == "kept":
    keep_freed_memory()
for size in (20 << 20, 80 << 20):
    for _ in range(20):
        torch.ones(size, dtype=torch.uint8)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        torch.ones(size, dtype=torch.uint8)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(ctypes.CDLL(None).mallopt(-3, 1 << 30))
"""


def faults(how: str) -> list[int]:
    """Pages that the system gave for blocks as large as those freed before, of 20 and of 80 MiB.

    The second only where glibc lets such blocks be kept: older versions refuse.
    """
    command = [sys.executable, "-c", FAULTS, how]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    *found, accepted = map(int, done.stdout.split())
    return found if accepted else found[:1]


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a setting of glibc")
def test_freed_memory_is_used_again():
    returned, kept = faults("by default"), faults("kept")
    if returned[-1] < 5 * (20 << 20 >> 12):
        pytest.skip("memory comes in larger pages here, or is kept anyway")
    assert kept[-1] < 0.1 * returned[-1] and kept[0] < 0.1 * 5 * (20 << 20 >> 12), kept


def test_benchmarks_keep_memory_as_the_command_line_does(monkeypatch):
    calls = []
    monkeypatch.setattr(variants, "keep_freed_memory", lambda: calls.append(True))
    for device in ("cpu", "meta"):
        given = variants.arguments("").parse_args(["--config", "vp/digits"])
        monkeypatch.setattr(variants, "resolve_device", variants.torch.device)
        given.set = [f"device={device}"]
        variants.configured(given, 1)
    assert calls == [True]
