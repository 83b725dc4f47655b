"""Tools of all trainings; needs only PyTorch, for it runs in the peers' environment."""

import argparse
import json
import os
import pathlib
import signal
import threading
import time
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

CHAIN = 1000  # noise levels of a discrete chain
BETAS = 1e-4, 0.02  # its first and last step


class Images(NamedTuple):
    """Grey values 0 ... levels - 1, uint8, (N, C, H, W)."""

    train: Tensor
    test: Tensor
    levels: int


def load_images(path: str | os.PathLike) -> Images:
    """Read the .npz that holds them."""
    with np.load(path) as file:
        train, test = torch.from_numpy(file["train"]), torch.from_numpy(file["test"])
        return Images(train, test, int(file["levels"]))


class Turns:
    """The time of a training that takes turns with others.

    Args:
        seconds: for all of it, in wall-clock time.
        rounds: windows that they are split into; after each but the last the process stops itself
            until it is sent SIGCONT.
        started: when the first began, as `time.time()`; 0 is now.
    """

    def __init__(self, seconds: float, rounds: int = 1, started: float = 0.0):
        self.window, self.rounds = seconds / rounds, rounds
        self.done, self.began = 0, started or time.time()

    def used(self) -> float:
        """Share of the time that is used up, in [0, 1]."""
        now = min((time.time() - self.began) / self.window, 1.0)
        return min((self.done + now) / self.rounds, 1.0)

    def over(self) -> bool:
        """Whether all time is used up; to be asked after every step, and waits for its turn."""
        if time.time() < self.began + self.window:
            return False
        self.done += 1
        if self.done < self.rounds:
            # To this thread, so that the process has stopped before the next line.
            signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)
            self.began = time.time()
        return self.done >= self.rounds


class Journal:
    """Steps and losses with their times: one JSON object a line.

    Args:
        every: steps between two lines.
    """

    def __init__(self, path: str | os.PathLike, every: int):
        self.path, self.every = pathlib.Path(path), every
        self.path.write_text("")

    def step(self, step: int, loss: float) -> None:
        """Note a step, if it is its turn."""
        if step % self.every == 0:
            record = {"time": time.time(), "step": step, "loss": loss}
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")


def chain_levels() -> Tensor:
    """Products of 1 - beta along the chain, float64, (CHAIN,)."""
    return torch.cumprod(1 - torch.linspace(*BETAS, CHAIN, dtype=torch.float64), 0)


def noise_error(predict, data: Tensor, batch_size: int = 250, seed: int = 0) -> np.ndarray:
    """Mean square error of the predicted noise, for each image, (N,).

    Args:
        predict: noise (B, C, H, W) from x_k and k (B,) of the chain.
        data: in the network's range, (N, C, H, W).
        seed: of levels and noise, which are the same for all networks.
    """
    generator = torch.Generator().manual_seed(seed)
    level = torch.randint(0, CHAIN, (len(data),), generator=generator)
    noise = torch.randn(data.shape, generator=generator)
    kept = chain_levels()[level].float().view(-1, 1, 1, 1)
    x, errors = kept.sqrt() * data + (1 - kept).sqrt() * noise, []
    with torch.no_grad():
        for part in torch.arange(len(data)).split(batch_size):
            wrong = predict(x[part], level[part]) - noise[part]
            errors.append(wrong.square().mean(dim=(1, 2, 3)))
    return torch.cat(errors).double().numpy()


def save(path: str | os.PathLike, **arrays: np.ndarray) -> None:
    """Write an .npz, whole or not at all."""
    temporary = pathlib.Path(path).with_suffix(".tmp")
    with temporary.open("wb") as file:
        np.savez_compressed(file, **arrays)
    os.replace(temporary, path)


def arguments(description: str, actions: tuple[str, ...]) -> argparse.ArgumentParser:
    """A parser of what a peer is asked for."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("action", choices=actions)
    parser.add_argument("--folder", required=True, help="of this training")
    parser.add_argument("--images", required=True, help="file with the data")
    parser.add_argument("--out", help="file for losses or samples")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--log_freq", type=int, default=10, help="steps between two log lines")
    parser.add_argument("--seconds", type=float, default=60.0, help="of training")
    parser.add_argument("--rounds", type=int, default=1, help="windows of training")
    parser.add_argument("--started", type=float, default=0.0, help="time of the first")
    parser.add_argument("--held_out", type=int, default=2000, help="images for the loss")
    parser.add_argument("--samples", type=int, default=100)
    parser.add_argument("--evaluations", type=int, default=20, help="of the network, a sample")
    return parser


def turns_of(given: argparse.Namespace) -> Turns:
    """The turns that a command line asks for."""
    return Turns(given.seconds, given.rounds, given.started)
