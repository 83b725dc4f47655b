"""Diffusers' U-Net and scheduler, trained in the loop that its tutorial documents.

    python -m benchmarks.peers.diffusers_loop train --images data.npz --folder diffusers \
        --parameters 1990000 --widths 1 2 3 --attention 2

Steps of the chain drawn uniformly, mean square error of the noise, AdamW, a cosine schedule after
warm-up, gradients clipped to norm 1.  The tutorial counts the schedule in epochs; here its end is
that of the given time.  It is on one device, where the tutorial's Accelerate changes nothing.
"""

import itertools
import math
import pathlib
import time

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.peers import shared
from benchmarks.peers.shared import Images, Journal, Turns
from score_lib.base.mistakes import brief_mistakes

GROUPS = 4  # of normalisation; widths are multiples


def main(argv=None) -> None:
    """Train, measure the held-out loss, or draw samples."""
    parser = shared.arguments(__doc__.splitlines()[0], ("train", "loss", "sample"))
    parser.add_argument("--parameters", type=int, help="of the network, within 3 %%")
    parser.add_argument("--widths", type=int, nargs="+", default=[1, 2, 3], help="about, by level")
    parser.add_argument("--attention", type=int, nargs="*", default=[2], help="levels that have it")
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--warmup", type=int, default=500, help="steps")
    parser.add_argument("--ema", type=float, default=0.0, help="decay of an average; 0 is none")
    parser.add_argument("--scheduler", default="DPMSolverMultistepScheduler", help="for samples")
    given = parser.parse_args(argv)
    images, place = shared.load_images(given.images), pathlib.Path(given.folder) / "pipeline"
    torch.manual_seed(given.seed)
    if given.action == "train":
        network = find_network(images, given.parameters, given.widths, given.attention)
        journal = Journal(place.with_name("log.jsonl"), given.log_freq)
        pipeline(train(network, images, given, shared.turns_of(given), journal)).save_pretrained(
            place
        )
    elif given.action == "loss":
        network = trained(place).unet
        data = scaled(images.test[: given.held_out], images.levels)
        values = shared.noise_error(lambda x, k: network(x, k).sample, data)
        shared.save(given.out, losses=values)
    else:
        draw(trained(place), images, given)


def scaled(grey: Tensor, levels: int) -> Tensor:
    """Grey values in [-1, 1], as `ToTensor` and `Normalize` of the tutorial give them."""
    return 2 * grey.float() / (levels - 1) - 1


def network_of(images: Images, channels: tuple[int, ...], attention: list[int]) -> nn.Module:
    """A U-Net with a residual block a level, and attention at some."""
    from diffusers import UNet2DModel

    size = len(channels)
    kinds = ["Attn" if level in attention else "" for level in range(size)]
    return UNet2DModel(
        sample_size=images.train.shape[-1],
        in_channels=images.train.shape[1],
        out_channels=images.train.shape[1],
        layers_per_block=1,
        block_out_channels=channels,
        down_block_types=tuple(f"{kind}DownBlock2D" for kind in kinds),
        up_block_types=tuple(f"{kind}UpBlock2D" for kind in reversed(kinds)),
        norm_num_groups=GROUPS,
        attention_head_dim=None,  # one head, as ours
    )


def find_network(images: Images, wanted: int, widths: list[int], attention: list[int]) -> nn.Module:
    """The network whose number of parameters is nearest, with widths about in proportion.

    Raises:
        ValueError: the nearest is further than 3 % off.
    """

    def count(channels: tuple[int, ...]) -> int:
        with torch.device("meta"):
            network = network_of(images, channels, attention)
        return sum(p.numel() for p in network.parameters())

    # Parameters grow as the square of the width.
    scale = math.sqrt(wanted / count(tuple(GROUPS * width for width in widths)))
    nearby = [
        sorted({GROUPS * max(1, round(scale * width) + more) for more in (-1, 0, 1)})
        for width in widths
    ]
    counts = {channels: count(channels) for channels in itertools.product(*nearby)}
    best = min(counts, key=lambda channels: abs(counts[channels] - wanted))
    off = counts[best] / wanted - 1
    print(f"channels {best}: {counts[best]} parameters, {100 * off:+.2f} % of {wanted}", flush=True)
    if abs(off) > 0.03:
        raise ValueError(f"no network of widths {widths} has {wanted} parameters within 3 %")
    return network_of(images, best, attention)


def train(network: nn.Module, images: Images, given, turns: Turns, journal: Journal) -> nn.Module:
    """Train until the turns are over; the network, with averaged weights if there are such."""
    from diffusers import DDPMScheduler
    from diffusers.training_utils import EMAModel

    loader = DataLoader(TensorDataset(images.train), given.batch_size, shuffle=True)
    scheduler = DDPMScheduler(num_train_timesteps=shared.CHAIN)
    optimizer = torch.optim.AdamW(network.parameters(), lr=given.lr)
    average = EMAModel(network.parameters(), decay=given.ema) if given.ema else None

    def rate(step: int) -> float:
        return min(step / given.warmup, 1.0) * (1 + math.cos(math.pi * turns.used())) / 2

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    step, over = 0, False
    while not over:
        for (grey,) in loader:
            clean = scaled(grey, images.levels)
            noise = torch.randn(clean.shape)
            level = torch.randint(0, shared.CHAIN, (len(clean),), dtype=torch.int64)
            noisy = scheduler.add_noise(clean, noise, level)
            loss = nn.functional.mse_loss(network(noisy, level, return_dict=False)[0], noise)
            loss.backward()
            nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            if average:
                average.step(network.parameters())
            step += 1
            journal.step(step, loss.detach().item())
            over = turns.over()
            if over:
                break
    if average:
        average.copy_to(network.parameters())
    return network


def pipeline(network: nn.Module):
    """The library's pipeline of samples for a network."""
    from diffusers import DDPMPipeline, DDPMScheduler

    return DDPMPipeline(network, DDPMScheduler(num_train_timesteps=shared.CHAIN))


def trained(place: pathlib.Path):
    """The pipeline that a training saved."""
    from diffusers import DDPMPipeline

    return DDPMPipeline.from_pretrained(place, local_files_only=True)


def draw(pipe, images: Images, given) -> None:
    """Samples of the pipeline with a scheduler of the library; writes them."""
    import diffusers

    scheduler = getattr(diffusers, given.scheduler).from_config(pipe.scheduler.config)
    pipe = diffusers.DDPMPipeline(pipe.unet.eval(), scheduler)
    pipe.set_progress_bar_config(disable=True)
    generator, parts = torch.Generator().manual_seed(given.seed), []
    start = time.perf_counter()
    for first in range(0, given.samples, given.batch_size):
        count = min(given.batch_size, given.samples - first)
        found = pipe(count, generator, num_inference_steps=given.evaluations, output_type="np")
        parts.append(found.images)
    seconds = time.perf_counter() - start
    grey = np.rint(np.concatenate(parts) * (images.levels - 1))
    pixels = np.rint(grey * (255 / (images.levels - 1))).astype(np.uint8)
    shared.save(given.out, samples=pixels, seconds=seconds)


if __name__ == "__main__":
    with brief_mistakes():
        main()
