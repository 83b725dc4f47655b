"""A run's numbers and pictures in Weights & Biases, beside TensorBoard."""

import json
import os
import pathlib
import secrets

from ml_collections import ConfigDict
from torch import Tensor

from score_lib.disk.files import write_text

_ID = "wandb_id.txt"


class WandbWriter:
    """The part of TensorBoard's `SummaryWriter` that a log calls, for Weights & Biases.

    A run that resumes goes on under the id in its folder, and logged steps stay as they are.

    Args:
        project: the name there.
        workdir: folder of the run.
        config: all options, shown beside the run.
    Raises:
        ImportError: the library is missing.
    """

    def __init__(self, project: str, workdir: str | os.PathLike, config: ConfigDict):
        try:
            import wandb
        except ImportError as error:
            raise ImportError(
                f"training.wandb = {project!r} needs the package wandb ({error}): "
                "pip install wandb==0.31.0, or set training.wandb to ''"
            ) from error
        workdir = pathlib.Path(workdir)
        if not (workdir / _ID).is_file():
            write_text(workdir / _ID, secrets.token_hex(4))
        self._wandb = wandb
        self._run = wandb.init(
            project=project,
            name=workdir.resolve().name,
            id=(workdir / _ID).read_text(encoding="utf-8").strip(),
            resume="allow",
            dir=str(workdir),
            config=json.loads(config.to_json_best_effort()),
        )

    def add_scalar(self, name: str, value: float, step: int) -> None:
        """Log a number."""
        self._run.log({name: value}, step=step)

    def add_image(self, name: str, picture: Tensor, step: int) -> None:
        """Show a picture, (C, H, W) in [0, 1]."""
        pixels = (picture.clamp(0, 1) * 255).round().byte().movedim(0, -1).cpu().numpy()
        self._run.log({name: self._wandb.Image(pixels)}, step=step)

    def close(self) -> None:
        """Send or keep the rest."""
        self._run.finish()
