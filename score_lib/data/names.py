"""Names of very many files, in a few arrays."""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

# Lossless for any str, and in the order of str: also for names that are no valid Unicode.
_ENCODING = "utf-8", "surrogatepass"


class Names(Sequence[str]):
    """A sequence of str that takes a few bytes more than its text.

    A list would take about 100 bytes more for each name, and worker processes would copy all of
    it: each look at a str writes its count of references into the memory shared since the fork.

    Args:
        text: all names one after the other, uint8.
        ends: end of each name in the text, (N,) int64.
        starts: start of each name, (N,) int64; by default names follow each other without gaps.
    """

    def __init__(self, text: np.ndarray, ends: np.ndarray, starts: np.ndarray | None = None):
        self.text, self.ends = text, ends
        self._starts = np.concatenate([[0], ends])[: len(ends)] if starts is None else starts

    @classmethod
    def of(cls, names: Iterable[str]) -> "Names":
        """These names, in their order."""
        encoded = [name.encode(*_ENCODING) for name in names]
        ends = np.cumsum([len(name) for name in encoded], dtype=np.int64)
        return cls(np.frombuffer(b"".join(encoded), dtype=np.uint8), ends)

    @property
    def nbytes(self) -> int:
        """Memory in bytes, with the text that is shared between a sequence and those chosen."""
        return self.text.nbytes + self.ends.nbytes + self._starts.nbytes

    def chosen(self, numbers: np.ndarray) -> "Names":
        """The names of these numbers; the text is shared."""
        return Names(self.text, self.ends[numbers], self._starts[numbers])

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, number: int) -> str:
        return self.text[self._starts[number] : self.ends[number]].tobytes().decode(*_ENCODING)

    def __iter__(self) -> Iterator[str]:
        text = self.text.tobytes()
        for start, end in zip(self._starts.tolist(), self.ends.tolist(), strict=True):
            yield text[start:end].decode(*_ENCODING)
