"""The samples in .tar files: where their images lie, and their labels; kept for later starts."""

import json
import logging
import pathlib
import re
import tarfile
from collections.abc import Iterator, Sequence
from typing import IO, NamedTuple

import numpy as np

from score_lib.data.index import index_places, packed_names, save_index, unpacked_names
from score_lib.data.names import Names
from score_lib.data.sources import MAX_CLASSES, DataError
from score_lib.disk.arrays import load_arrays
from score_lib.disk.files import file_state, printable
from score_lib.disk.logs import progress_bar

log = logging.getLogger(__name__)

IMAGES = ("jpg", "jpeg", "png", "webp")
LABELS = ("cls", "json")
# Fewer samples are found within 0.2 s, so that an index would save nothing that is felt.
SMALL = 1000
# In place of the size of an image, or of a label.
NONE = -1
_KIND, _VERSION = "shards", 3  # 1 lost labels that were links, 2 images
# As the format's authors split names: the key goes up to the first dot of the file's own name.
_NAME = re.compile(r"((?:.*/)?[^./]+)\.([^/]+)", re.DOTALL)
_PACKED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")  # gzip, bzip2, xz, zstd
# Bytes that are looked through at once.
_PART = 1 << 20
# Limit on a file with a label, in bytes.
_LONGEST_LABEL = 1 << 20
_COLUMNS = ("offsets", "sizes", "labels")


class Samples(NamedTuple):
    """The samples of some .tar files, in the order of the files and within them.

    Attributes:
        names: of the images within the files; the key where there is none.
        counts: samples in each file, (F,) int64.
        offsets: where the contents of each image start, in bytes, (N,) int64; of a sample without
            an image, where its first file starts.
        sizes: bytes of each image, (N,) int64; `NONE` without one.
        labels: (N,) int64; `NONE` without one.
    """

    names: Names
    counts: np.ndarray
    offsets: np.ndarray
    sizes: np.ndarray
    labels: np.ndarray


def known_samples(root: pathlib.Path, files: Sequence[str]) -> Samples:
    """The samples of .tar files below a folder, from its index where a file is still the same.

    All others are gone through, and if there are many samples, the index is written anew: a hidden
    file in the folder, or, where that cannot be written, in the user's cache.

    Raises:
        DataError: a file is packed, damaged or cut off, or a label is no whole number; names the
            file and the byte.
    """
    states = {name: file_state(root / name) for name in files}
    kept = _kept(root)
    found = {name: part for name, (state, part) in kept.items() if state == states.get(name)}
    new = [name for name in files if name not in found]
    with progress_bar(len(new), 0, " files") as bar:
        for name in new:
            found[name] = _scanned(root / name)
            bar.update()
    samples = _joined([found[name] for name in files])
    if new and len(samples.names) >= SMALL:
        others = {name: entry for name, entry in kept.items() if (root / name).is_file()}
        _save(root, others | {name: (states[name], found[name]) for name in files})
    return samples


def _joined(parts: Sequence[Samples]) -> Samples:
    names, *columns = zip(*parts, strict=True)
    return Samples(Names.of(name for part in names for name in part), *map(np.concatenate, columns))


def _save(root: pathlib.Path, found: dict[str, tuple[tuple[int, int], Samples]]) -> None:
    samples = _joined([part for _, part in found.values()])
    arrays = packed_names("files", Names.of(found)) | packed_names("names", samples.names)
    arrays["states"] = np.array([state for state, _ in found.values()], dtype=np.int64)
    arrays |= {name: getattr(samples, name) for name in ("counts", *_COLUMNS)}
    about = f"{len(samples.names)} samples"
    save_index(root, about, _KIND, version=np.int64(_VERSION), **arrays)


def _kept(root: pathlib.Path) -> dict[str, tuple[tuple[int, int], Samples]]:
    """State and samples of each file in the index of a folder; none without one."""
    for place in index_places(root, _KIND):
        try:
            return _load(place)
        except FileNotFoundError:
            continue
        except (ValueError, KeyError) as error:
            log.warning("%s is gone through again: the index %s", root, error)
    return {}


def _load(place: pathlib.Path) -> dict[str, tuple[tuple[int, int], Samples]]:
    arrays = load_arrays(place)
    files, names = (unpacked_names(place, arrays, kind) for kind in ("files", "names"))
    counts, states = arrays["counts"], arrays["states"]
    columns = [arrays[name] for name in _COLUMNS]
    sound = arrays["version"] == _VERSION and states.shape == (len(files), 2)
    sound = sound and counts.shape == (len(files),) and (counts >= 0).all()
    sound = sound and all(a.dtype == np.int64 for a in (*columns, counts, states))
    if not sound or any(column.shape != (counts.sum(),) for column in (names.ends, *columns)):
        raise ValueError(f"{place} holds something else")
    ends = np.cumsum(counts)
    parts = {}
    for file, state, first, last in zip(files, states.tolist(), ends - counts, ends, strict=True):
        rows = np.arange(first, last)
        own = names.chosen(rows), np.array([len(rows)]), *(column[rows] for column in columns)
        parts[file] = tuple(state), Samples(*own)
    return parts


class _Sample:
    """Of a sample: its image, and the labels in files of each kind."""

    def __init__(self, key: str, offset: int):
        self.name, self.offset, self.size = key, offset, NONE
        self.labels: dict[str, int] = {}

    def row(self) -> tuple[int, int, int]:
        """Offset and size of the image, and the label: that of a .cls file, else of a .json."""
        label = self.labels.get("cls", self.labels.get("json", NONE))
        return self.offset, self.size, label


def _scanned(file: pathlib.Path) -> Samples:
    """Go through a file."""
    samples: dict[str, _Sample] = {}
    try:
        with open(file, "rb") as raw:
            for member in _members(raw, file):
                _add(samples, member, raw, file)
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}") from error
    rows = np.array([sample.row() for sample in samples.values()], dtype=np.int64).reshape(-1, 3)
    names = Names.of(sample.name for sample in samples.values())
    return Samples(names, np.array([len(rows)]), *rows.T)


def _members(raw: IO[bytes], file: pathlib.Path) -> Iterator[tarfile.TarInfo]:
    """The files in an open .tar file, all of which are there as a whole.

    Raises:
        DataError: it is packed, damaged or cut off.
    """
    if raw.read(6).startswith(_PACKED):
        raise DataError(
            f"{file} is packed, so that images cannot be read by their place: unpack it to a .tar"
        )
    raw.seek(0)
    at = 0
    try:
        with tarfile.open(fileobj=raw, mode="r:") as archive:
            while (member := archive.next()) is not None:
                at = member.offset
                if archive.offset <= at or member.size < 0:
                    raise tarfile.TarError("a size is wrong")
                archive.members.clear()  # or they would all be kept
                yield member
            at = archive.offset
    except Exception as error:  # damaged files make it raise errors of nearly any type
        raise DataError(
            f"{file} (byte {at}) is damaged or cut off, or no .tar file: {error}"
        ) from error
    # The reader takes a damaged header for the end.
    raw.seek(at)
    if raw.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise DataError(f"{file} (byte {at}) is damaged or cut off: its end is not marked there")
    while part := raw.read(_PART):
        if part.strip(b"\0"):
            raise DataError(
                f"{file} goes on after its end (byte {at}), as files joined by cat do: join them "
                f"with tar --concatenate, or keep them apart"
            )


def _add(
    samples: dict[str, _Sample], member: tarfile.TarInfo, raw: IO[bytes], file: pathlib.Path
) -> None:
    """Add a file to the sample that it belongs to."""
    parts = _NAME.fullmatch(member.name)
    if parts is None:
        return
    where = f"{printable(member.name)} in {file} (byte {member.offset})"
    key, kind = parts[1], parts[2].lower()
    elsewhere = member.islnk() or member.issym() or member.issparse()  # a part of its contents
    if not (member.isreg() or elsewhere) or (elsewhere and kind not in IMAGES + LABELS):
        return
    if elsewhere and kind in LABELS:  # its label would be lost
        raise DataError(
            f"{where} is a link or a sparse file, and labels are read by their place: pack them "
            f"with tar --dereference --hard-dereference, without --sparse"
        )
    sample = samples.setdefault(key, _Sample(key, member.offset))
    if elsewhere:  # a sample without an image
        return
    if kind in sample.labels:
        raise DataError(f"{where} is a second label of its sample")
    if kind in IMAGES:
        if sample.size != NONE:
            raise DataError(f"{where} is a second image of its sample, beside {sample.name}")
        sample.name, sample.offset, sample.size = member.name, member.offset_data, member.size
    elif kind in LABELS:
        if member.size > _LONGEST_LABEL:
            raise DataError(f"{where} has {member.size} bytes: too many for a label")
        raw.seek(member.offset_data)
        content = raw.read(member.size)
        if len(content) < member.size:
            raise DataError(f"{where} is cut off")
        label = content.strip() if kind == "cls" else _field(content, where)
        if label is not None:
            sample.labels[kind] = _label(label, where)


def _field(content: bytes, where: str) -> str | None:
    """The field "label" of a JSON file, as text; None without one."""
    try:
        record = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is no JSON file: {error}") from error
    if not isinstance(record, dict) or "label" not in record:
        return None
    return json.dumps(record["label"])


def _label(text: bytes | str, where: str) -> int:
    if not re.fullmatch(r"\d{1,9}", shown := text if isinstance(text, str) else ascii(text)[2:-1]):
        raise DataError(f"{where} holds the label {shown[:50]!r}, which is no whole number")
    if int(shown) >= MAX_CLASSES:
        raise DataError(f"{where} holds the label {shown}: they must be below {MAX_CLASSES}")
    return int(shown)
