"""The cost of conditions: a guided evaluation against one, and against an unconditional network.

    python -m benchmarks.conditioning --nf 32 --batch_size 16

Times are taken in turns, so that noise of the machine affects all alike.
"""

import argparse
import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from benchmarks.measure import in_turns, show
from configs.defaults import load
from models.conditioning import Given, Guided
from models.unet import UNet
from models.utils import create_model
from score_lib.base.devices import resolve_device
from score_lib.base.mistakes import brief_mistakes
from score_lib.disk.logs import log_to_console
from score_lib.options import complete


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="vp/cifar10_ddpmpp_continuous")
    parser.add_argument("--nf", type=int, default=32)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", default="auto")
    given = parser.parse_args(argv)
    log_to_console()
    device = resolve_device(given.device)
    works = calls(given, device)
    with torch.no_grad():
        in_turns(works, device, rounds=2)
        times = in_turns(works, device, given.rounds)
    one, plain = times["conditional"], times["unconditional"]
    records = [
        {
            "call": name,
            "milliseconds": 1e3 * taken.median,
            "of conditional": taken.median / one.median,
            "of unconditional": taken.median / plain.median,
        }
        for name, taken in times.items()
    ]
    title = f"conditions, {given.config}, nf {given.nf}, {given.batch_size} images"
    show(title, device, records)
    logging.info(
        "guidance costs %.3f evaluations; conditional code leaves an unconditional network %.3f "
        "of its speed",
        times["guided"].median / one.median, times["without the code"].median / plain.median,
    )  # fmt: skip


def calls(given: argparse.Namespace, device: torch.device) -> dict[str, Callable[[], Tensor]]:
    """The calls to compare, of networks of the same size."""
    config = complete(load(given.config))
    config.model.nf = given.nf
    plain = create_model(config, device).eval()
    config.data.num_classes = 10
    config.training.update(condition="classes", condition_dropout=0.1)
    conditional = create_model(config, device).eval()
    side, count = config.data.image_size, given.batch_size
    x = torch.randn(count, config.data.num_channels, side, side, device=device)
    labels = torch.rand(count, device=device) * 999
    classes = torch.arange(count, device=device) % 10
    one = Given(conditional, classes=classes)
    both = Guided(conditional, {"classes": classes}, conditional.takes.null, 2.0)
    return {
        "conditional": lambda: one(x, labels),
        "guided": lambda: both(x, labels),
        "unconditional": lambda: plain(x, labels),
        "without the code": lambda: without_conditions(plain, x, labels),
    }


def without_conditions(model: UNet, x: Tensor, labels: Tensor) -> Tensor:
    """The forward pass of an unconditional network as it would be if there were no conditions."""
    images = model._prepare(x, labels)
    temb = model._embed(labels, x.dtype, {})
    skips = model._encode(images, temb, None)
    h = model._decode(model._middle(skips[-1], temb), skips, temb)
    return model._rescale(h.to(x.dtype), labels)


if __name__ == "__main__":
    with brief_mistakes():
        main()
