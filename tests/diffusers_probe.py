"""Runs Diffusers itself on folders: `python diffusers_probe.py jobs.pt outputs.pt`.

Jobs are, by name, a folder, and either x, timesteps and perhaps classes for its network, or a seed
and a number of steps for its pipeline.
"""

import importlib
import sys

import torch

try:
    import torchvision  # noqa: F401
except (ImportError, RuntimeError):  # one that does not fit PyTorch; the library can do without
    sys.modules["torchvision"] = None


def network(folder, x, timesteps, classes=None):
    """The output of a network."""
    loaded = importlib.import_module("diffusers").UNet2DModel.from_pretrained(folder)
    return loaded(x, timesteps, class_labels=classes).sample


def pipeline(folder, seed, steps):
    """Samples of a pipeline, (B, H, W, C) in [0, 1]."""
    loaded = importlib.import_module("diffusers").DiffusionPipeline.from_pretrained(folder)
    loaded.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(seed)
    images = loaded(2, generator=generator, num_inference_steps=steps, output_type="np").images
    return type(loaded).__name__, torch.from_numpy(images)


if __name__ == "__main__":
    jobs = torch.load(sys.argv[1])
    with torch.no_grad():
        results = {name: (network if "x" in job else pipeline)(**job) for name, job in jobs.items()}
    torch.save(results, sys.argv[2])
