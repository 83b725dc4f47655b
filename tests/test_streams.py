"""Streams: order, resuming, sharing, flips and dequantization."""

import contextlib
import multiprocessing
import os
import pickle
import signal
import time
import traceback

import numpy as np
import pytest
import torch
from dataset_helpers import assert_same, numbered_source, take, together
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from datasets import DataError, ImageStream, MemorySource, Source, Subset
from score_lib.data.sources import Remembered


def test_training_order_is_a_sequence_of_permutations():
    """50 examples in batches of 7: batches straddle the epochs, and nothing is dropped."""
    order = together(take(ImageStream(numbered_source(50), 7, seed=1), 50))["label"]
    epochs = order.reshape(7, 50)
    for epoch in epochs:
        assert sorted(epoch.tolist()) == list(range(50))
    assert not torch.equal(epochs[0], epochs[1])


def test_batch_may_be_larger_than_the_data():
    (batch,) = take(ImageStream(numbered_source(5), 12), 1)
    assert sorted(batch["label"][:10].tolist()) == sorted(2 * list(range(5)))


def test_order_is_a_function_of_the_seed():
    source = numbered_source(50)
    first, again, other = (take(ImageStream(source, 8, seed=s), 10) for s in (1, 1, 2))
    assert_same(first, again)
    assert not torch.equal(first[0]["label"], other[0]["label"])


@pytest.mark.parametrize("workers", [0, 2])
def test_seek_resumes_exactly(workers):
    """Across the end of the epoch at 20, with all random draws of a stream."""
    options = {"seed": 3, "random_flip": True, "dequantize": True}
    whole = ImageStream(numbered_source(20), 6, **options)
    batches = take(whole, 9)
    assert whole.position == 54
    for done in (0, 1, 3, 4, 7):
        resumed = ImageStream(numbered_source(20), 6, num_workers=workers, **options)
        resumed.seek(6 * done)
        assert_same(take(resumed, 9 - done), batches[done:])
        assert resumed.position == 54


def test_second_iteration_continues_the_first():
    stream = ImageStream(numbered_source(20), 6)
    batches = take(stream, 2) + take(stream, 3)
    assert_same(batches, take(ImageStream(numbered_source(20), 6), 5))


def test_iterating_does_not_change_the_global_generator():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    take(ImageStream(numbered_source(9), 4, random_flip=True, dequantize=True), 3)
    list(ImageStream(numbered_source(9), 4, evaluation=True, dequantize=True))
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("evaluation", [False, True])
def test_the_default_device_changes_no_batch(evaluation):
    """On the device "meta" a tensor holds no values."""
    options = {"evaluation": evaluation, "random_flip": True, "dequantize": True}
    stream = ImageStream(numbered_source(20), 6, **options)
    expected = take(stream, 3)
    stream.seek(0)
    with torch.device("meta"):
        found = take(stream, 3)
    assert_same(found, expected)


def test_evaluation_is_one_ordered_pass_over_all_examples():
    source = numbered_source(10)
    stream = ImageStream(source, 4, evaluation=True)
    assert len(stream) == 3
    for _ in range(2):
        batches = list(stream)
        assert [len(batch["label"]) for batch in batches] == [4, 4, 2]
        assert together(batches)["label"].tolist() == list(range(10))
    raw = (together(batches)["image"] * 255).round().to(torch.uint8)
    assert torch.equal(raw, source.images(range(10)))


def test_interrupted_evaluation_restarts_and_seek_skips():
    stream = ImageStream(numbered_source(10), 4, evaluation=True)
    take(stream, 1)
    assert len(list(stream)) == 3
    stream.seek(8)
    assert [batch["label"].tolist() for batch in stream] == [[8, 9]]
    assert len(list(stream)) == 3


@pytest.mark.parametrize("batch_size", [7, 9])
def test_shares_of_three_ranks_concatenate_to_the_batches_of_one(batch_size):
    options = {"seed": 5, "random_flip": True, "dequantize": True}
    whole = take(ImageStream(numbered_source(20), batch_size, **options), 6)
    ranks = [
        take(ImageStream(numbered_source(20), batch_size, rank=r, world=3, **options), 6)
        for r in range(3)
    ]
    assert_same([together(parts) for parts in zip(*ranks, strict=True)], whole)


@pytest.mark.parametrize("size, batch_size", [(20, 7), (7, 3), (2, 5), (10, 2)])
def test_shares_cover_an_evaluation_exactly_once(size, batch_size):
    options = {"evaluation": True, "dequantize": True}
    whole = together(list(ImageStream(numbered_source(size), batch_size, **options)))
    parts = [
        list(ImageStream(numbered_source(size), batch_size, rank=r, world=3, **options))
        for r in range(3)
    ]
    shared = together([batch for part in parts for batch in part])
    order = shared["label"].argsort()
    assert shared["label"][order].tolist() == list(range(size))
    assert torch.equal(shared["image"][order], whole["image"])


def test_flips_mirror_left_to_right_with_probability_one_half():
    source = numbered_source(400)
    batch = together(take(ImageStream(source, 100, random_flip=True), 20))
    raw = source.images(batch["label"].numpy()).float() / 255
    kept = (batch["image"] == raw).flatten(1).all(1)
    mirrored = (batch["image"] == raw.flip(-1)).flatten(1).all(1)
    assert (kept ^ mirrored).all()
    assert abs(mirrored.float().mean() - 0.5) < 4 * 0.5 / 2000**0.5


@pytest.mark.parametrize("levels", [2, 17, 256])
@pytest.mark.parametrize("evaluation", [False, True])
def test_dequantization_spreads_each_level_over_its_bin(levels, evaluation):
    source = numbered_source(300, levels=levels)
    stream = ImageStream(source, 100, dequantize=True, evaluation=evaluation)
    batch = together(take(stream, 3))
    x, raw = batch["image"], source.images(batch["label"].numpy())
    assert x.dtype == torch.float32
    assert (x >= 0).all() and (x < 1).all()
    assert torch.equal((x * levels).floor().to(torch.uint8), raw)
    u = x.double() * levels - raw
    assert abs(u.mean() - 0.5) < 4 * 12**-0.5 / u.numel() ** 0.5
    assert abs(u.var() - 1 / 12) < 0.005


def test_noise_close_to_one_does_not_reach_the_next_level(monkeypatch):
    largest = 1 - 2**-24
    monkeypatch.setattr(torch, "rand", lambda *shape, generator: torch.full(shape, largest))
    images = torch.arange(256, dtype=torch.uint8).reshape(256, 1, 1, 1)
    for levels in (17, 256):
        stream = ImageStream(MemorySource(images[:levels], levels=levels), levels, dequantize=True)
        x = take(stream, 1)[0]["image"].flatten().sort().values
        assert x.max() < 1
        assert torch.equal((x * levels).floor(), torch.arange(float(levels)))


def test_evaluation_noise_is_a_function_of_the_example():
    options = {"evaluation": True, "dequantize": True}
    small, large, other = (
        together(list(ImageStream(numbered_source(10), size, seed=seed, **options)))["image"]
        for size, seed in ((3, 0), (10, 0), (10, 1))
    )
    assert torch.equal(small, large)
    assert not torch.equal(large, other)
    # Equal images get unequal noise.
    constant = MemorySource(torch.zeros(2, 1, 4, 4, dtype=torch.uint8))
    first, second = together(list(ImageStream(constant, 2, **options)))["image"]
    assert not torch.equal(first, second)


def test_setting_the_seed_gives_fresh_evaluation_noise():
    stream = ImageStream(numbered_source(4), 4, evaluation=True, dequantize=True)
    first = next(iter(stream))["image"]
    stream.seed = 1
    assert not torch.equal(first, next(iter(stream))["image"])


def test_images_are_divided_by_the_highest_level():
    images = torch.tensor([0, 4, 16], dtype=torch.uint8).reshape(3, 1, 1, 1)
    (batch,) = ImageStream(MemorySource(images, levels=17), 3, evaluation=True)
    assert batch["image"].flatten().tolist() == [0, 0.25, 1]
    assert batch["label"].tolist() == [0, 0, 0]


def test_as_uint8_gives_bytes():
    source = numbered_source(10)
    stream = ImageStream(source, 4, evaluation=True, as_uint8=True)
    assert torch.equal(together(list(stream))["image"], source.images(range(10)))
    images = torch.tensor([0, 4, 16], dtype=torch.uint8).reshape(3, 1, 1, 1)
    stream = ImageStream(MemorySource(images, levels=17), 3, evaluation=True, as_uint8=True)
    (batch,) = stream
    assert batch["image"].dtype == torch.uint8
    assert batch["image"].flatten().tolist() == [0, 64, 255]


def test_batches_arrive_on_the_device():
    stream = ImageStream(numbered_source(8), 4, random_flip=True, dequantize=True).to("meta")
    for batch in (
        next(iter(stream)),
        next(iter(ImageStream(numbered_source(8), 4, device="meta"))),
    ):
        assert batch["image"].device.type == batch["label"].device.type == "meta"
        assert batch["image"].shape == (4, 3, 4, 4) and batch["image"].dtype == torch.float32


def test_cached_images_are_read_once():
    asked = []

    class Counting(Source):
        shape = (3, 4, 4)

        def __len__(self):
            return 6

        def read(self, numbers):
            asked.extend(numbers.tolist())
            return numbered_source(6).read(numbers)

    source = Remembered(Counting())
    expected = numbered_source(6).read(np.array([4, 1, 5]))
    for _ in range(2):
        images, labels = source.read(np.array([4, 1, 5]))
        assert torch.equal(images, expected[0]) and torch.equal(labels, expected[1])
    assert sorted(asked) == [1, 4, 5]


class Failing(Source):
    shape = (1, 2, 2)

    def __len__(self):
        return 8

    def read(self, numbers):
        raise DataError("image 3 is broken")


@pytest.mark.parametrize("workers", [0, 1])
def test_error_in_a_worker_keeps_its_message(workers):
    with pytest.raises(DataError, match=r"^image 3 is broken$"):
        next(iter(ImageStream(Failing(), 4, num_workers=workers)))


def test_there_are_no_more_workers_than_cores_that_the_process_may_use(monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0}, raising=False)
    others = set(multiprocessing.active_children())
    batches = iter(ImageStream(numbered_source(8), 4, num_workers=2))
    next(batches)
    assert len(set(multiprocessing.active_children()) - others) == 1


class Killed(Failing):
    """Ends the worker that reads it, as a machine without memory does."""

    def read(self, numbers):
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture
def soon(monkeypatch):
    """Whoever waits for a batch looks often whether its worker lives."""
    monkeypatch.setattr(_MultiProcessingDataLoaderIter._try_get_data, "__defaults__", (0.1,))


def test_a_worker_that_is_killed_is_told(soon):
    with pytest.raises(DataError, match=r"smaller data.num_workers, or 0 .*\(DataLoader worker"):
        next(iter(ImageStream(Killed(), 4, num_workers=1)))


def test_the_death_of_a_worker_disturbs_nothing_but_the_wait_for_its_batch(soon):
    """An error was raised wherever the program was, such as in a step that was lost thereby."""
    before, others = signal.getsignal(signal.SIGCHLD), set(multiprocessing.active_children())
    batches = iter(ImageStream(numbered_source(8), 4, num_workers=1))
    next(batches)
    (worker,) = set(multiprocessing.active_children()) - others
    worker.kill()
    worker.join()
    time.sleep(0.01)
    with pytest.raises(DataError, match=r"a process that reads the data has ended"):
        for _ in range(4):  # it has read ahead
            next(batches)
    assert signal.getsignal(signal.SIGCHLD) is before


@contextlib.contextmanager
def within(seconds):
    """Context that ends with an error if it lasts longer."""

    def expired(number, frame):
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, expired)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("base", [ValueError, DataError])
def test_an_error_that_cannot_be_sent_is_told(base):
    """Of a class that no module holds, as a config's: the batch was waited for without end."""

    class Own(base):
        def __init__(self, number):
            super().__init__(f"image {number} is broken")

    class Broken(Failing):
        def read(self, numbers):
            raise Own(3)

    expected = DataError if base is DataError else RuntimeError
    with within(20), pytest.raises(expected, match=r"image 3 is broken") as told:
        next(iter(ImageStream(Broken(), 4, num_workers=1)))
    traceback.clear_frames(told.tb)  # or the loader ends late, in a cycle


def test_parts_of_a_source_can_be_sent_to_workers_that_are_not_forked():
    """Of a source without names of classes, pickle refused the parts."""
    part = Remembered(Subset(numbered_source(8), np.array([6, 1, 3])))
    copy = pickle.loads(pickle.dumps(part))
    assert copy.read(np.arange(3))[1].tolist() == [6, 1, 3] and copy.class_to_idx == {}


@pytest.mark.filterwarnings("ignore:Got pickle error")  # PyTorch's own advice
def test_data_that_cannot_be_sent_to_workers_are_refused():
    source = Failing()
    source.start_method, source.draw = "spawn", lambda: 0
    with pytest.raises(DataError, match=r"started by 'spawn': .* data.num_workers=0.*lambda"):
        next(iter(ImageStream(source, 4, num_workers=1)))


def test_a_worker_without_shared_memory_is_told(monkeypatch):
    """The batch was lost in a thread of the worker, and training waited for it without end."""

    def full(storage):
        raise RuntimeError("unable to allocate shared memory(shm): No space left on device (28)")

    monkeypatch.setattr(torch.UntypedStorage, "_share_fd_cpu_", full)
    source = numbered_source(8)
    source.start_method = "fork"
    with pytest.raises(DataError, match=r"/dev/shm.*data.num_workers.*No space left"):
        next(iter(ImageStream(source, 4, num_workers=1)))


def test_source_with_wrong_images_is_refused():
    class Wrong(Failing):
        def read(self, numbers):
            return torch.zeros(len(numbers), 2, 2), None

    with pytest.raises(DataError, match=r"Wrong gave torch.float32 \(4, 2, 2\) for 4 uint8"):
        next(iter(ImageStream(Wrong(), 4)))


@pytest.mark.parametrize(
    ("labels", "said"),
    (
        (torch.tensor([1]), r"labels of torch.int64 \(1,\) for 4 examples"),
        (torch.tensor([[0], [1], [2], [0]]), r"\(4, 1\) for 4 examples: .* whole numbers, \(4,\)"),
        (torch.tensor([0.0, 1.0, 2.0, 0.0]), r"labels of torch.float32 \(4,\)"),
        (torch.tensor([0, 1, 3, 2]), r"the label 3, but its num_classes = 3 allows 0 to 2"),
        (torch.tensor([0, 1, -1, 2]), r"the label -1, but"),
    ),
)
def test_source_with_wrong_labels_is_refused(labels, said):
    """One label would stand for a whole batch, and one of too many classes for no class."""

    class Wrong(Failing):
        num_classes = 3

        def read(self, numbers):
            return torch.zeros(len(numbers), 1, 2, 2, dtype=torch.uint8), labels

    with pytest.raises(DataError, match=rf"Wrong gave .*{said}"):
        next(iter(ImageStream(Wrong(), 4)))


def test_labels_come_as_int64():
    """As bytes they would be taken for a mask where they choose rows."""

    class Bytes(Failing):
        num_classes = 3

        def read(self, numbers):
            images = torch.zeros(len(numbers), 1, 2, 2, dtype=torch.uint8)
            return images, torch.tensor([2, 1, 2, 0], dtype=torch.uint8)

    labels = next(iter(ImageStream(Bytes(), 4)))["label"]
    assert labels.dtype == torch.int64 and labels.tolist() == [2, 1, 2, 0]


def test_options_out_of_range():
    source = numbered_source(8)
    for options, message in [
        ({"rank": 2, "world": 2}, "rank 2 is not one of 2"),
        ({"batch_size": 0}, "a batch of 0 cannot"),
        ({"batch_size": 2, "world": 3}, "a batch of 2 cannot be shared by 3"),
        ({"as_uint8": True, "random_flip": True}, "as_uint8"),
        ({"as_uint8": True, "dequantize": True}, "as_uint8"),
    ]:
        with pytest.raises(ValueError, match=message):
            ImageStream(source, **{"batch_size": 4, **options})
    with pytest.raises(DataError, match="no examples"):
        ImageStream(Subset(source, np.arange(0)), 4)
    with pytest.raises(ValueError, match=r"position 9 is not in 0 \.\.\. 8"):
        ImageStream(source, 4, evaluation=True).seek(9)
    with pytest.raises(TypeError, match="endless"):
        len(ImageStream(source, 4))
