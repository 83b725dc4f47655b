"""Tasks of `--mode control` in the latent space of the probability flow.  [S21, section 4.3]"""

from collections.abc import Callable

import torch
from torch import Tensor

from models.conditioning import Condition, given
from score_lib.base.tensors import SampleNoise
from score_lib.inverse import latent
from score_lib.runs.conditions import as_known
from score_lib.runs.setup import Run
from score_lib.runs.tasks import (
    Outcome,
    as_here,
    condition_of,
    other_run,
    read_images,
    read_stored,
    register_task,
)
from score_lib.runs.trained import weights_record


@register_task(name="reconstruct")
def reconstruct(run: Run) -> Outcome:
    """Encode images along the probability flow, and decode them."""
    images, _, condition = read_images(run)
    tolerance = run.config.control.tolerance
    codes = _encode(run, images, tolerance, condition)
    decoded = _decode(run, codes, tolerance, condition)
    error = decoded - images
    largest, mean = error.abs().max().item(), error.square().mean().sqrt().item()
    figures = {"largest_error": largest, "root_mean_square_error": mean}
    return Outcome({"input": images, "result": decoded}, [figures], {"codes": codes})


@register_task(name="interpolate")
def interpolate(run: Run) -> Outcome:
    """From each image to the next one but one, along `control.num_interpolations` latent codes.

    Each code is decoded under the condition of the nearer image.
    """
    images, _, condition = read_images(run, least=2)
    options = run.config.control
    weights = torch.linspace(0, 1, options.num_interpolations)
    first, second = _halves(images)
    pairs = {kind: _halves(value) for kind, value in condition.items()}
    ends = [
        _encode(run, x, options.tolerance, {kind: pair[k] for kind, pair in pairs.items()})
        for k, x in enumerate((first, second))
    ]
    codes = latent.interpolate(*ends, weights).movedim(0, 1)
    nearer = {
        kind: torch.stack([pair[int(w > 0.5)] for w in weights.tolist()], dim=1).flatten(0, 1)
        for kind, pair in pairs.items()
    }
    decoded = _decode(run, codes.flatten(0, 1), options.tolerance, nearer)
    decoded = decoded.unflatten(0, codes.shape[:2])
    errors = torch.stack([decoded[:, 0] - first, decoded[:, -1] - second])
    figures = {"largest_error_at_ends": errors.abs().max().item()}
    columns = {"first": first, "result": decoded, "second": second}
    return Outcome(columns, [figures], {"codes": codes})


@register_task(name="temperature")
def temperature(run: Run) -> Outcome:
    """The same codes, drawn from the prior, at each of `control.temperatures` a row."""
    options = run.config.control
    count = options.num_images
    noise = SampleNoise(run.config.seed, range(count), run.device)
    z = run.sde.prior_from_normal(noise(torch.empty(count, *run.shape, device=run.device)))
    rows = torch.stack([latent.temper(z, value) for value in options.temperatures])
    condition = run.conditions.of_samples(range(count), run.state["class_to_idx"])
    repeated = {kind: torch.cat([value] * len(rows)) for kind, value in condition.items()}
    decoded = _decode(run, rows.flatten(0, 1), options.tolerance, repeated)
    results = decoded.unflatten(0, rows.shape[:2])
    spread = (results if run.continuous else results.clamp(0, 1)).std(dim=1).flatten(1).mean(1)
    figures = [
        {"temperature": float(value), "spread_between_images": one.item()}
        for value, one in zip(options.temperatures, spread, strict=True)
    ]
    return Outcome({"result": results}, figures)


@register_task(name="compare_codes")
def compare_codes(run: Run) -> Outcome:
    """Whether this network and that of `control.other` give images the same codes.  [S21, D.5]

    The last column decodes the code of one network by the other.
    """
    path, tolerance = run.config.control.other, run.config.control.tolerance
    if not path:
        raise ValueError(
            "control.task = 'compare_codes' needs control.other: the checkpoint of a network that "
            "was trained independently, for instance with another seed"
        )
    other = other_run(run, path)
    if repr(as_here(run, other)) != repr(run.sde) or other.shape != run.shape:
        raise ValueError(
            f"{path} has codes of another process or shape: {other.sde} and "
            f"{other.shape}, not {run.sde} and {run.shape}"
        )
    stored, labels = read_stored(run, least=2)
    images = as_known(run.config, stored, run.levels)
    condition, others = (condition_of(run, told, stored, labels) for told in (run, other))
    ours = _encode(run, images, tolerance, condition)
    theirs = _encode(other, images, tolerance, others)
    swapped = _decode(other, ours, tolerance, others)
    found = latent.code_correlation(ours, theirs)
    figures = {
        "images": len(images),
        "correlation_same_image": found.same.item(),
        "correlation_same_image_standard_error": found.same_error.item(),
        "correlation_other_images": found.other.item(),
        "correlation_other_images_standard_error": found.other_error.item(),
        "relative_distance": found.distance.item(),
        "other": weights_record(other),
    }
    columns = {
        "input": images,
        "own": _decode(run, ours, tolerance, condition),
        "by_the_other": swapped,
    }
    return Outcome(columns, [figures], {"codes": ours, "codes_of_the_other": theirs})


def _halves(pairs: Tensor) -> tuple[Tensor, Tensor]:
    """The first and the second of each pair of rows, (n // 2, ...) each."""
    return pairs[: len(pairs) // 2 * 2].unflatten(0, (-1, 2)).unbind(1)


def _encode(run: Run, images: Tensor, tolerance: float, condition: Condition) -> Tensor:
    return _follow(run, latent.get_encoder, run.scaler, images, tolerance, condition)


def _decode(run: Run, codes: Tensor, tolerance: float, condition: Condition) -> Tensor:
    return _follow(run, latent.get_decoder, run.inverse_scaler, codes, tolerance, condition)


def _follow(
    run: Run,
    direction: Callable,
    scaler: Callable,
    x: Tensor,
    tolerance: float,
    condition: Condition,
) -> Tensor:
    """The flow from x in a direction, by the network as it samples, batch by batch.

    Guidance has no part in it: it is the flow of the data.
    """
    options = {"rtol": tolerance, "atol": tolerance, **run.reading}
    # per_sample: the code of an image does not depend on its batch.
    follow = direction(run.sde, scaler, per_sample=True, **options)
    parts = []
    with run.sampling_network() as network:
        for rows in torch.arange(len(x)).split(run.config.training.batch_size):
            part = {kind: value[rows] for kind, value in condition.items()}
            parts.append(follow(given(network, part), x[rows])[0])
    return torch.cat(parts)
