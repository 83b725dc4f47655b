"""Which levels of a discrete chain are visited.  [Nichol and Dhariwal 2021, section 4]"""

import re
from collections.abc import Callable

import torch
from torch import Tensor

FORMS = (
    "'', '250' (so many, evenly from the first to the last), '10,10,5' (so many of each of equal "
    "sections), 'ddim50', 'leading50', 'leading50+1' or 'trailing50' (at equal distances)"
)


def kept_levels(N: int, respacing: str | int) -> Tensor:
    """Numbers of the levels that are kept, rising.

    Args:
        N: number of levels, which are counted from 0, the least noise.
        respacing:
            - "" or "0": all;
            - a number: so many from the first to the last, rounded, as ADM, and as "linspace" of
              DDPM in Diffusers, whose DDIM then makes other steps than between visited levels;
            - several with commas: so many of each of as many sections, as ADM;
            - "ddim50": every k-th from the first, for the least k that gives so many, as ADM;
            - "leading50": every (N // 50)-th from the first, as Diffusers by default;
            - "leading50+1": the same, each one higher, as Diffusers with `steps_offset` 1;
            - "trailing50": every (N / 50)-th, rounded, back from the last, as "trailing" of
              Diffusers.
    Returns:
        (n,), int64, on the CPU.
    Raises:
        ValueError: another text, more levels than there are, or a number that "ddim" cannot give.
    """
    text = str(respacing).replace(" ", "")
    if text in ("", "0"):
        return torch.arange(N)
    if re.fullmatch(r"\d+(,\d+)*", text):
        return _sections(N, [int(count) for count in text.split(",")], text)
    found = re.fullmatch(r"(ddim|leading|trailing)(\d+)(?:\+(\d+))?", text)
    if not found or (found[3] and found[1] != "leading"):
        raise ValueError(f"sampling.respacing = {respacing!r} should be one of {FORMS}")
    count = int(found[2])
    if not 1 <= count <= N:
        raise _too_many(text, count, N)
    kept = _STRIDES[found[1]](N, count) + int(found[3] or 0)
    if kept[-1] >= N:
        raise ValueError(
            f"sampling.respacing = {text!r} goes up to level {kept[-1]}, and the last of {N} is "
            f"{N - 1}: choose a smaller number behind the +"
        )
    return kept


def _too_many(text: str, count: int, N: int) -> ValueError:
    return ValueError(
        f"sampling.respacing = {text!r} asks for {count} levels of {N}: at least 1 and at most "
        f"{N} can be kept"
    )


def _sections(N: int, counts: list[int], text: str) -> Tensor:
    """So many levels of each section, from its first to its last."""
    size, longer = divmod(N, len(counts))
    kept, start = [], 0
    for number, count in enumerate(counts):
        here = size + (number < longer)
        if not 1 <= count <= here:
            raise _too_many(text, count, here)
        stride = (here - 1) / (count - 1) if count > 1 else 1.0
        place = 0.0
        for _ in range(count):
            kept.append(start + round(place))
            # Summed up, for the published rounding.
            place += stride
        start += here
    return torch.tensor(kept)


def _ddim(N: int, count: int) -> Tensor:
    stride = next((k for k in range(1, N + 1) if len(range(0, N, k)) == count), None)
    if stride is None:
        raise ValueError(
            f"sampling.respacing = 'ddim{count}' is impossible: no whole distance between levels "
            f"gives {count} of {N}; choose '{count}' or 'leading{count}'"
        )
    return torch.arange(0, N, stride)


def _leading(N: int, count: int) -> Tensor:
    return torch.arange(count) * (N // count)


def _trailing(N: int, count: int) -> Tensor:
    # Halves are rounded to even numbers, as published.
    return torch.round(N - torch.arange(count).double() * (N / count)).long().flip(0) - 1


_STRIDES: dict[str, Callable[[int, int], Tensor]] = {
    "ddim": _ddim,
    "leading": _leading,
    "trailing": _trailing,
}
