"""Processes that share a run, as `torchrun` starts them; no-ops in a single process.

Every process runs the same program.  A batch is split evenly, process r taking the r-th contiguous
part; independent pieces of work, such as the rounds of an evaluation, are dealt out whole.  Only
the main process, of rank 0, writes what is there once.
"""

import atexit
import contextlib
import datetime
import gc
import inspect
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from score_lib.base.preemption import deadly
from score_lib.base.tensors import derive_seed

T = TypeVar("T")
R = TypeVar("R")

# Timeout of collectives.  Other processes may be a whole round of an evaluation behind; a process
# that died is noticed at once, by its connection and by torchrun.
PATIENCE = datetime.timedelta(hours=12)
# Until all processes of a run have started.
ARRIVAL = datetime.timedelta(minutes=30)

# References to every group joined.  Otherwise a DistributedDataParallel may hold the last one, and
# freeing both at once can deadlock on the GIL.
_groups: list[dist.ProcessGroup] = []


def _free_groups() -> None:
    """Free the groups at exit, after the networks in them: left to the end of the interpreter,
    their threads can abort a program that has done all its work."""
    gc.collect()
    _groups.clear()


@contextlib.contextmanager
def joined(device: torch.device) -> Iterator[None]:
    """Context in which this process works with the others that `torchrun` started, if any.

    Args:
        device: the run's, in this process.
    Raises:
        OSError: the others cannot be reached, or one of them is lost on the way.
    """
    if dist.is_initialized() or "RANK" not in os.environ or not dist.is_available():
        yield
        return
    backend = "gloo"  # also beside NCCL, for tensors on the host
    if device.type == "cuda":
        torch.cuda.set_device(device.index or 0)
        backend = "cpu:gloo,cuda:nccl"
    _meet(backend)
    _groups.append(dist.group.WORLD)
    atexit.register(_free_groups)
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or "gloo" in str(error):
            raise OSError(
                "another process of this run is gone, and says why if it could "
                f"({str(error).splitlines()[0].partition(' This is typically')[0]})"
            ) from error
        raise
    finally:
        dist.destroy_process_group()


def _meet(backend: str) -> None:
    where = ":".join(os.environ.get(key, "?") for key in ("MASTER_ADDR", "MASTER_PORT"))
    logging.info("meeting the other processes of this run at %s", where)
    try:
        with deadly():
            store, rank, world = next(dist.rendezvous("env://", timeout=ARRIVAL))
            # When torchrun starts all processes again it keeps the store, with addresses of dead
            # ones.
            store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
            options = {"store": store, "rank": rank, "world_size": world, "timeout": PATIENCE}
            dist.init_process_group(backend, **options)
            # Or the first, which keeps the store, could refuse its work and leave while others
            # arrive.
            barrier()
    except RuntimeError as error:
        raise OSError(
            f"the other processes of this run cannot be reached at {where}; if it has no others, "
            f"unset RANK ({str(error).splitlines()[0]})"
        ) from error


def rank() -> int:
    """Number of this process among all."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def local_rank() -> int:
    """Number of this process on its machine, which is that of its GPU."""
    return int(os.environ.get("LOCAL_RANK", 0))


def local_world() -> int:
    """Number of processes on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def is_main() -> bool:
    """Whether this is rank 0, which writes shared files."""
    return rank() == 0


def check_alone(mode: str) -> None:
    """Refuse several processes, for a mode of the command line whose work they do not share.

    Raises:
        ValueError: there are several.
    """
    if world() > 1:
        raise ValueError(f"--mode {mode} runs in one process: start it without torchrun")


def barrier() -> None:
    """Wait until every process is here."""
    gather(None)


def gather(value: T) -> list[T]:
    """The value of every process, in the order of their ranks, in every process.

    Values are pickled, so tensors should be on the CPU.
    """
    if world() == 1:
        return [value]
    values = [None] * world()
    dist.all_gather_object(values, value)
    return values


def agreed(value: T, name: str) -> T:
    """A value that every process has found by itself, in files of its machine.

    Args:
        name: of such values, in the plural, for the message.
    Raises:
        ValueError: they differ, in every process.
    """
    found = list(dict.fromkeys(gather(value)))
    if len(found) > 1:
        raise ValueError(
            f"the processes of this run found different {name} ({', '.join(map(str, found))}): all "
            "machines should see the same --workdir and the same data"
        )
    return value


def check_same(options: Mapping[str, object]) -> None:
    """Refuse processes that were started with different options.

    They would train on different batches of a common network, or wait for each other without end.

    Raises:
        ValueError: names those that differ, in every process.
    """
    given = gather({name: str(value) for name, value in options.items()})
    differing = {}
    for name in dict.fromkeys(name for one in given for name in one):
        values = dict.fromkeys(one.get(name, "missing") for one in given)
        if len(values) > 1:
            differing[name] = " or ".join(values)
    if differing:
        shown = ", ".join(f"{name} is {values}" for name, values in [*differing.items()][:5])
        raise ValueError(
            f"the processes of this run have different options ({shown}): start all of them by "
            "the same command"
        )


def on_main(compute: Callable[[], T]) -> T:
    """The result of rank 0's computation, in every process.

    Raises:
        Exception: in the main process, what `compute` raises.
        SystemExit: in the others, which then end as well, and leave it to the main process to say
            why.
    """
    if world() == 1:
        return compute()
    if not is_main():
        (succeeded, value) = _from_main()
        if not succeeded:
            raise SystemExit(1)
        return value
    try:
        value = compute()
    except Exception:
        _from_main((False, None))
        raise
    return _from_main((True, value))[1]


def _from_main(value: object = None) -> object:
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def average(value: Tensor) -> Tensor:
    """The mean of every process's value."""
    if world() == 1:
        return value
    total = value.detach().clone()
    dist.all_reduce(total)
    return total / world()


def share(items: Sequence[T]) -> Sequence[T]:
    """This rank's contiguous shard of the items, which may be empty."""
    count = len(items)
    return items[count * rank() // world() : count * (rank() + 1) // world()]


def dealt_out(items: Sequence[T], compute: Callable[[T], R]) -> list[R]:
    """[compute(item) for item in items], each computed by one process and known to all."""
    return [result for part in gather([compute(item) for item in share(items)]) for result in part]


def share_of_batch(draw: Callable[[int], Tensor], count: int) -> Tensor:
    """This rank's rows, (count, ...), of a draw for the global batch.

    So that several processes see the random numbers that one would.

    Args:
        draw: gives random rows, as many as it is asked for.
        count: rows in each process.
    """
    return draw(count * world())[count * rank() : count * (rank() + 1)]


def draw_apart() -> None:
    """Decorrelate the RNG across ranks until the next seed.

    For what is drawn inside a network, such as dropout, where the rows of a batch must not share
    their numbers with those of another process.
    """
    if rank() > 0:
        torch.manual_seed(derive_seed(torch.initial_seed(), "rank", rank()))


def is_shared(model: nn.Module) -> bool:
    """Whether a caller has wrapped the network, to share its work with other processes itself."""
    return any(True for _ in _shared_parts(model))


def _shared_parts(model: nn.Module) -> Iterator[nn.Module]:
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel  # a second to import

    wrappers = nn.parallel.DistributedDataParallel, FullyShardedDataParallel, FSDPModule
    return (module for module in model.modules() if isinstance(module, wrappers))


def replicated(model: nn.Module) -> nn.Module:
    """The network with gradients averaged over processes; itself in a single process, or where a
    caller sees to that.

    Raises:
        ValueError: the caller has wrapped some of the trained parameters alone.
    """
    if world() == 1:
        return model
    if is_shared(model):
        _check_whole(model)
        return model
    parallel = nn.parallel.DistributedDataParallel
    # Buffers are tables, alike everywhere.  PyTorch 2.13 has renamed the option.
    names = inspect.signature(parallel).parameters
    sync = "forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers"
    # Looking for parameters without a gradient costs a walk through each step's graph.
    idle = _tells_idle_parameters(model)
    device = next(model.parameters()).device
    devices = [device] if device.type == "cuda" else None
    # Where a side is 1, as the channels of grey images, several strides mean the same.
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
    options = {"gradient_as_bucket_view": True, "find_unused_parameters": idle, sync: False}
    return parallel(model, device_ids=devices, **options)


def _check_whole(model: nn.Module) -> None:
    """Refuse a network of which a part is wrapped: gradients of the rest would differ."""
    shared = {id(p) for part in _shared_parts(model) for p in part.parameters()}
    trained = ((name, p) for name, p in model.named_parameters() if p.requires_grad)
    if apart := [name for name, p in trained if id(p) not in shared]:
        raise ValueError(
            f"the network is wrapped for several processes in a part without {len(apart)} trained "
            f"parameters, the first is {apart[0]!r}: wrap all of it, or leave it to the "
            "training step"
        )


def _tells_idle_parameters(model: nn.Module) -> bool:
    return any(getattr(module, "has_idle_parameters", False) for module in model.modules())


def check_gradients(model: nn.Module) -> None:
    """Refuse a network, after its first backward pass, of which some parameters have no gradient
    and no attribute tells it: several processes would wait for those.

    Raises:
        ValueError: names them.
    """
    if world() == 1 or is_shared(model) or _tells_idle_parameters(model):
        return
    trained = ((name, p) for name, p in model.named_parameters() if p.requires_grad)
    if idle := [name for name, p in trained if p.grad is None]:
        raise ValueError(
            f"the loss does not depend on {len(idle)} parameters of the network, the first is "
            f"{idle[0]!r}, and several processes would wait for their gradients: set "
            "has_idle_parameters = True in the network's class, or remove them"
        )


def unwrapped(model: nn.Module) -> nn.Module:
    """The network inside wrappers that hold it as `module`, or as `torch.compile` does."""
    while isinstance(
        inner := getattr(model, "module", getattr(model, "_orig_mod", None)), nn.Module
    ):
        model = inner
    return model


class AnyProcess:
    """Whether any process has raised its flag; all processes get the answer at the same call.

    Nothing waits for the network: an answer is that to the call before.
    """

    def __init__(self):
        self._pending: tuple[dist.Work, Tensor] | None = None

    def __call__(self, flag: bool) -> bool:
        """Report this process's flag; every process calls this equally often."""
        if world() == 1:
            return flag
        answer = self.last()
        votes = torch.tensor(int(flag))
        self._pending = dist.all_reduce(votes, op=dist.ReduceOp.MAX, async_op=True), votes
        return answer

    def last(self) -> bool:
        """The answer to the last call."""
        if self._pending is None:
            return False
        work, votes = self._pending
        work.wait()
        return bool(votes)
