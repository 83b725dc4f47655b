"""Several processes that share a run, forked from a test, which saves the imports."""

from __future__ import annotations

import multiprocessing
import os
import socket
import traceback

import torch

from score_lib.base import distributed


def together(world, function, *arguments):
    """A function's result in each of `world` processes that work together, by rank.

    An exception is returned in place of a value; a process that ends itself gives its exit code.
    """
    context = multiprocessing.get_context("fork")
    port = free_port()
    ends = []
    for rank in range(world):
        ours, theirs = context.Pipe(duplex=False)
        target = context.Process(
            target=_process, args=(theirs, rank, world, port, function, arguments)
        )
        target.start()
        theirs.close()
        ends.append((target, ours))
    return [_outcome(*end) for end in ends]


def free_port():
    """A port of this machine that nobody listens to."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def _process(sender, rank, world, port, function, arguments):
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(1)
    try:
        with distributed.joined(torch.device("cpu")):
            outcome = function(*arguments)
            distributed.barrier()  # or the first to end would leave before the last has arrived
    except Exception as error:
        traceback.print_exc()
        outcome = error
    sender.send(outcome)


def _outcome(process, receiver):
    try:
        outcome = receiver.recv()
        process.join()
        return outcome
    except EOFError:  # it has ended itself
        process.join()
        return process.exitcode
