"""The project's network in a training loop as a researcher would write it in an afternoon.

    python -m benchmarks.peers.plain_loop train --images images.npz --folder F --config config.json

The VP process in continuous time: epsilon matching, Adam with warm-up and clipping, float32.
"""

import itertools
import json
import pathlib
import time

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.peers import shared
from benchmarks.peers.shared import Images, Journal, Turns
from models.utils import create_model
from score_lib.base.mistakes import brief_mistakes
from score_lib.options import complete

EPS = 1e-5
SAMPLING_EPS = 1e-3


def main(argv=None) -> None:
    """Train, measure the held-out loss, or draw samples."""
    parser = shared.arguments(__doc__.splitlines()[0], ("train", "loss", "sample"))
    parser.add_argument("--config", required=True, help="complete config, as JSON")
    given = parser.parse_args(argv)
    config = complete(json.loads(pathlib.Path(given.config).read_text()))
    images, weights = shared.load_images(given.images), pathlib.Path(given.folder) / "weights.pth"
    torch.manual_seed(given.seed)
    network = create_model(config, "cpu")
    if given.action == "train":
        journal = Journal(weights.with_name("log.jsonl"), given.log_freq)
        train(network, config, images, shared.turns_of(given), journal)
        torch.save(network.state_dict(), weights)
        return
    network.load_state_dict(torch.load(weights, weights_only=True))
    network.eval()
    if given.action == "loss":
        values = held_out_loss(network, config, images, given.held_out)
        shared.save(given.out, losses=values)
    else:
        draw(network, config, images, given)


def train(network: nn.Module, config, images: Images, turns: Turns, journal: Journal) -> None:
    """Train until the turns are over; leaves the averaged weights in the network."""
    model, optim = config.model, config.optim
    loader = DataLoader(TensorDataset(images.train), config.training.batch_size, shuffle=True)
    parameters = list(network.parameters())
    average = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.Adam(parameters, lr=optim.lr, betas=(optim.beta1, 0.999), eps=optim.eps)
    network.train()
    step, over = 0, False
    while not over:
        for (grey,) in loader:
            x = 2 * (grey.float() + torch.rand(grey.shape)) / images.levels - 1
            t = EPS + (1 - EPS) * torch.rand(len(x))
            mean, std = marginal(t, model)
            z = torch.randn_like(x)
            loss = (network(mean * x + std * z, 999 * t) - z).square().mean()
            optimizer.zero_grad()
            loss.backward()
            for group in optimizer.param_groups:
                group["lr"] = optim.lr * min(step / max(optim.warmup, 1), 1.0)
            nn.utils.clip_grad_norm_(parameters, optim.grad_clip)
            optimizer.step()
            step += 1
            decay = min(model.ema_rate, (1 + step) / (10 + step))
            with torch.no_grad():
                for a, p in zip(average, parameters, strict=True):
                    a.mul_(decay).add_(p, alpha=1 - decay)
            journal.step(step, loss.item())
            over = turns.over()
            if over:
                break
    with torch.no_grad():
        for a, p in zip(average, parameters, strict=True):
            p.copy_(a)


def marginal(t: Tensor, model) -> tuple[Tensor, Tensor]:
    """Mean scale and standard deviation of x_t, (B, 1, 1, 1), of the VP process."""
    log_mean = -0.25 * t**2 * (model.beta_max - model.beta_min) - 0.5 * t * model.beta_min
    log_mean = log_mean.view(-1, 1, 1, 1)
    return log_mean.exp(), (1 - (2 * log_mean).exp()).sqrt()


def time_of(kept: Tensor, model) -> Tensor:
    """The time at which the process keeps a share of the variance, at most 1."""
    slope, start = (model.beta_max - model.beta_min) / 2, model.beta_min
    return ((start**2 - 4 * slope * kept.log()).sqrt() - start).div(2 * slope).clamp(max=1.0)


def held_out_loss(network: nn.Module, config, images: Images, count: int):
    """See `shared.noise_error`; of the first dequantised images."""
    grey = images.test[:count].float()
    spread = torch.rand(grey.shape, generator=torch.Generator().manual_seed(1))
    times = time_of(shared.chain_levels(), config.model).float()
    data = 2 * (grey + spread) / images.levels - 1
    return shared.noise_error(lambda x, level: network(x, 999 * times[level]), data)


def draw(network: nn.Module, config, images: Images, given) -> None:
    """Heun's method along the probability flow, in equal steps of time; writes samples."""
    start, parts = time.perf_counter(), []
    for first in range(0, given.samples, given.batch_size):
        count = min(given.batch_size, given.samples - first)
        parts.append(heun(network, config, (count, *images.test.shape[1:]), given.evaluations))
    seconds = time.perf_counter() - start
    grey = ((torch.cat(parts) + 1) / 2 * images.levels).floor().clamp(0, images.levels - 1)
    pixels = (grey * (255 / (images.levels - 1))).round().byte().movedim(1, -1)
    shared.save(given.out, samples=pixels.numpy(), seconds=seconds)


@torch.no_grad()
def heun(network: nn.Module, config, shape: tuple[int, ...], evaluations: int) -> Tensor:
    """Samples in the network's range, from two evaluations a step."""
    model = config.model

    def slope(x: Tensor, t: Tensor) -> Tensor:
        beta = model.beta_min + t * (model.beta_max - model.beta_min)
        std = marginal(t[None], model)[1]
        return -0.5 * beta * (x - network(x, 999 * t.expand(len(x))) / std)

    x = torch.randn(shape)
    times = torch.linspace(1, SAMPLING_EPS, evaluations // 2 + 1)
    for t, s in itertools.pairwise(times):
        first = slope(x, t)
        x = x + (s - t) * (first + slope(x + (s - t) * first, s)) / 2
    return x


if __name__ == "__main__":
    with brief_mistakes():
        main()
