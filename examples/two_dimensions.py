"""Two densities of the plane, learned from samples and compared with the truth in closed form.

    python -m examples.two_dimensions --workdir runs/two_dimensions

Trains `configs/vp/vectors.py` on a ring of eight Gaussians and on a blurred checkerboard.  Of each
it prints KL(truth || model) in nats, the integral of the model's density over the plane, and the
error of the score, and draws densities, samples and scores.  Started again, it resumes.
"""

import abc
import dataclasses
import math
import pathlib

import numpy as np
import torch
from torch import Tensor

import run_lib
from configs.vp.vectors import get_config
from examples.common import present, save_data
from score_lib.base.mistakes import brief_mistakes
from score_lib.base.tensors import SampleNoise
from score_lib.disk.reports import mean_and_error, new_figure, save_figure
from score_lib.runs.measures import likelihood_terms
from score_lib.runs.setup import in_batches
from score_lib.scores import get_score_fn

# Time at which scores are compared.
_TIME = 0.05
# Half the side of the square that is drawn and integrated over.
_HALF = 3.25
# Examples in a batch of the likelihood.
_BATCH = 2000


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How much is computed: examples of the data, steps of training, fresh samples for the KL
    divergence, and points on a side of the grid."""

    examples: int = 100_000
    steps: int = 7000
    fresh: int = 4000
    side: int = 72


class Density(abc.ABC):
    """A density of the plane, known in closed form also under noise."""

    @abc.abstractmethod
    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """Independent draws, (count, 2)."""

    @abc.abstractmethod
    def log_prob(self, x: Tensor, scale: float = 1.0, std: Tensor | float = 0.0) -> Tensor:
        """log density of scale x_0 + std z, with z ~ N(0, I), at x (B, 2): (B,), in nats.

        Args:
            std: one of both axes, or of each, (2,).
        """


def noisy_std(std: float, scale: float, noise: Tensor | float) -> Tensor:
    """Deviation of scale x_0 + noise z along both axes, (2,), where x_0 has the deviation std."""
    noise = torch.as_tensor(noise, dtype=torch.float64).expand(2)
    return ((scale * std) ** 2 + noise**2).sqrt()


class Ring(Density):
    """Eight Gaussians of deviation 0.25 on a circle of radius 2."""

    std = 0.25

    def __init__(self):
        angles = torch.arange(8, dtype=torch.float64) * (math.pi / 4)
        self.centres = 2 * torch.stack([angles.cos(), angles.sin()], dim=1)

    def sample(self, count, generator):
        chosen = torch.randint(len(self.centres), (count,), generator=generator)
        noise = torch.randn(count, 2, generator=generator, dtype=torch.float64)
        return self.centres[chosen] + self.std * noise

    def log_prob(self, x, scale=1.0, std=0.0):
        spread = noisy_std(self.std, scale, std)
        normal = torch.distributions.Normal(scale * self.centres, spread)
        of_each = normal.log_prob(x[:, None]).sum(dim=2)
        return torch.logsumexp(of_each, dim=1) - math.log(len(self.centres))


class Checkerboard(Density):
    """The eight black fields of a board of four by four, of side 1, blurred by 0.1."""

    std = 0.1

    def sample(self, count, generator):
        column = torch.randint(4, (count,), generator=generator)
        row = 2 * torch.randint(2, (count,), generator=generator) + column % 2
        shape = {"size": (count, 2), "generator": generator, "dtype": torch.float64}
        corner = torch.stack([column, row], dim=1) - 2
        return corner + torch.rand(**shape) + self.std * torch.randn(**shape)

    def log_prob(self, x, scale=1.0, std=0.0):
        """As in `Density`: a field is the product of two strips."""
        blur = noisy_std(self.std, scale, std)
        centres = scale * (torch.arange(4, dtype=x.dtype) - 1.5)
        away = (x[:, :, None] - centres).abs()
        inner, outer = (
            torch.special.log_ndtr((side * scale / 2 - away) / blur[:, None]) for side in (1, -1)
        )
        # In logarithms, since far away both are tiny.
        strips = inner + torch.log1p(-torch.exp(outer - inner)) - math.log(scale)
        parts = [strips[:, :, k::2].logsumexp(dim=2).sum(dim=1) for k in range(2)]
        return torch.logaddexp(*parts) - math.log(8)  # eight fields of area 1


DENSITIES = {"ring": Ring(), "checkerboard": Checkerboard()}


def demonstrate(workdir: pathlib.Path, sizes: Sizes = Sizes()) -> tuple[list[dict], pathlib.Path]:
    """Learn each density in a folder of its own.

    Returns:
        a row of figures for each density, and the picture's file.
    """
    figure = new_figure(9, 2.0 * len(DENSITIES))
    panels = figure.subplots(len(DENSITIES), 5, squeeze=False)
    records = []
    for row, (name, density) in zip(panels, DENSITIES.items(), strict=True):
        run = learned(density, workdir / name, sizes)
        with run.state["ema"].applied(run.state["model"].parameters()):
            on_grid = model_log_prob(run, grid(sizes.side)[0])
            records.append({"density": name} | figures(run, density, on_grid, sizes))
            draw(row, name, run, density, on_grid, sizes)
    picture = workdir / "densities.png"
    save_figure(picture, figure)
    return records, picture


def learned(density: Density, workdir: pathlib.Path, sizes: Sizes) -> run_lib.Run:
    """A network trained on samples of the density, with its averaged weights."""
    config, path = get_config(), workdir / "values.npy"
    data = density.sample(sizes.examples, torch.Generator().manual_seed(0))
    save_data(path, data.float().numpy())
    config.data.path = str(path)
    # Training as in EDM, on the noise levels at which these densities have structure.
    config.model.update(parametrization="edm", embedding_type="fourier", fourier_log=False)
    config.training.update(noise_levels="lognormal", lognormal_mean=-0.8, weighting="output")
    config.model.update(nf=64, input_fourier_scale=0.5)
    config.training.update(batch_size=256, snapshot_sampling=False)
    # A resumed run takes a new rate: with lower ones, the noise of the weights dies out.
    for lr, share in ((2e-3, 0.5), (5e-4, 0.8), (1e-4, 1.0)):
        steps = math.ceil(share * sizes.steps)
        config.optim.lr = lr
        config.training.update(n_iters=steps, snapshot_freq=steps)
        run_lib.train(config, workdir)
    return run_lib.restored(config, workdir)


def figures(run: run_lib.Run, density: Density, on_grid: Tensor, sizes: Sizes) -> dict[str, float]:
    """KL divergence in nats on fresh samples, integral, and relative error of the score.

    Args:
        on_grid: log density of the model on the grid.
    """
    fresh = density.sample(sizes.fresh, torch.Generator().manual_seed(1))
    excess = density.log_prob(fresh) - model_log_prob(run, fresh)
    points, area = grid(sizes.side)
    exact, found = scores(run, density, noisy(run, fresh))
    error = (found - exact).square().sum() / exact.square().sum()
    return {
        **mean_and_error("KL divergence", excess.numpy()),
        **mean_and_error("-E log truth", -density.log_prob(fresh).numpy()),
        "integral of the truth": (density.log_prob(points).exp().sum() * area).item(),
        "integral of the model": (on_grid.exp().sum() * area).item(),
        f"error of the score at t = {_TIME}": error.sqrt().item(),
    }


def model_log_prob(run: run_lib.Run, x: Tensor) -> Tensor:
    """log density of the probability flow at x (B, 2), by the exact trace, in nats: (B,)."""
    parts = in_batches(range(len(x)), _BATCH)
    found = []
    for part in parts:
        noise = SampleNoise(run.config.seed, part, run.device)
        batch = run.scaler(x[part.start : part.stop].to(run.device))
        found.append(-likelihood_terms(run, batch, run.levels, noise)["nats"])
    return torch.from_numpy(np.concatenate(found))


def noisy(run: run_lib.Run, x: Tensor) -> Tensor:
    """x (B, 2) as it is at `_TIME`, in the network's range."""
    noise = SampleNoise(run.config.seed, range(len(x)), run.device)
    x = run.scaler(x.to(run.device))
    mean, std = run.sde.marginal_prob(x, torch.full((len(x),), _TIME, device=run.device))
    return mean + std[:, None] * noise(x)


def scores(run: run_lib.Run, density: Density, x: Tensor) -> tuple[Tensor, Tensor]:
    """The exact score and the network's at `_TIME`, of x (B, 2) in the network's range."""
    t = torch.full((len(x),), _TIME, device=run.device)
    found = get_score_fn(run.sde, run.state["model"], **run.reading)(x, t)
    scale, std = (value[0].double().cpu() for value in run.sde.scale_and_std(t, 1))
    unit, middle = run.scaler.std.cpu(), run.scaler.mean.cpu()
    at = x.detach().double().cpu().requires_grad_()
    log_p = density.log_prob(unit * at + scale * middle, scale.item(), unit * std)
    (exact,) = torch.autograd.grad(log_p.sum(), at)
    return exact, found.detach().double().cpu()


def grid(side: int) -> tuple[Tensor, float]:
    """Points of the plane, (side^2, 2), the second axis varying first, and the area of each."""
    axis = torch.linspace(-_HALF, _HALF, side, dtype=torch.float64)
    return torch.cartesian_prod(axis, axis), (2 * _HALF / (side - 1)) ** 2


def draw(row, name: str, run: run_lib.Run, density: Density, on_grid: Tensor, sizes: Sizes) -> None:
    """Fill five panels: the density, the model's, samples, the score, the network's."""
    points, _ = grid(sizes.side)
    for axes, title, log_p in (
        (row[0], f"{name}: density", density.log_prob(points)),
        (row[1], "density of the model", on_grid),
    ):
        image = log_p.exp().reshape(sizes.side, sizes.side).T
        axes.imshow(image.numpy(), origin="lower", extent=(-_HALF, _HALF) * 2, interpolation="none")
        axes.set_title(title, fontsize=8)
    samples = run.draw(range(sizes.fresh)).cpu()
    row[2].scatter(*samples[:1000].T.numpy(), s=1, linewidths=0)
    row[2].set_title("samples of the model", fontsize=8)
    places = 0.8 * grid(16)[0]  # further out, data are rare and scores large
    x = run.scaler(places.to(run.device))
    for axes, title, score in zip(
        row[3:],
        (f"score at t = {_TIME}", "score of the model"),
        scores(run, density, x),
        strict=True,
    ):
        axes.quiver(*places.T.numpy(), *score.T.numpy(), score.norm(dim=1).numpy(), scale=120)
        axes.set_title(title, fontsize=8)
    for axes in row:
        axes.set(xlim=(-_HALF, _HALF), ylim=(-_HALF, _HALF), xticks=[], yticks=[], aspect="equal")


if __name__ == "__main__":
    with brief_mistakes():
        present(__doc__, demonstrate)
