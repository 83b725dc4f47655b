"""Limits that the control groups of Linux, as of a container, put on this process."""

import pathlib

ROOT = pathlib.Path("/sys/fs/cgroup")
PROCESS = pathlib.Path("/proc/self/cgroup")


def limits(controller: str, new: str, *old: str) -> list[str]:
    """The limits of this process's control group, and of those around it.

    Args:
        controller: such as "memory".
        new: name of the file with a limit in version 2.
        old: names of files in version 1, whose contents are joined by a space.
    Returns:
        contents that begin with a number; none outside of Linux.
    """
    try:
        lines = PROCESS.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return []
    found = {}
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        top, names = (ROOT / controllers, old) if controllers else (ROOT, (new,))
        inside = top / path.lstrip("/")
        # In a container the path may be the host's: what is mounted then is at the top.
        for folder in (inside, *(p for p in inside.parents if p.is_relative_to(top))):
            found[folder] = " ".join(_read(folder / name) for name in names)
    return [text for text in found.values() if text[:1].isdigit()]


def _read(path: pathlib.Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return ""
