"""A network as files for others: `--mode export`."""

import json
import logging
import os
import pathlib
import shlex

import torch
from torch import Tensor, nn

from score_lib.base import distributed
from score_lib.disk.checkpoints import contents_of, safetensors_metadata, write_contents
from score_lib.disk.files import whole_folder, write_text
from score_lib.disk.safetensors_files import write_safetensors
from score_lib.exchange.diffusers import save_diffusers
from score_lib.exchange.schedulers import spacing_of
from score_lib.losses.optimization import get_optimizer
from score_lib.option_kinds import path as a_path
from score_lib.option_table import TABLE
from score_lib.options import Config, complete
from score_lib.runs.averages import one_average, recorded
from score_lib.runs.cards import figures_of, model_card
from score_lib.runs.export import as_trained
from score_lib.runs.history import run_digest
from score_lib.runs.nearest import nearest_experiment
from score_lib.runs.setup import Run
from score_lib.runs.start import options_for_folder
from score_lib.runs.trained import restored
from score_lib.samplers.respacing import kept_levels

RECORD = "exported.json"
# Options that name files, and what is taken of one.
_FILES = ("model.weights_except", *(key for key, option in TABLE.items() if option.check is a_path))


def export(config, workdir: str | os.PathLike) -> pathlib.Path:
    """Write the weights of a checkpoint, averaged as `eval.ema` says, in `export.format`.

    For the source see `load_chosen`, for the config that goes with them `as_trained`.  The folder
    is `export.folder`, or `export/` in the folder of the run; a `README.md` in it is the model
    card, and `exported.json` says whose export it is.

    - "safetensors": `weights.safetensors`, with the config, the step and the classes as metadata.
      With `export.precision` = "float16" it takes half the space; what is not trained, such as the
      frequencies of Fourier features, stays in float32.
    - "pth": `checkpoint.pth`, in the layout of published checkpoints.  Its optimiser has made no
      step.
    - "diffusers": a folder that Diffusers loads, see `save_diffusers`.

    Returns:
        the folder.
    Raises:
        FileNotFoundError: there is no such checkpoint.
        ValueError: the config or the checkpoint does not fit, or the folder holds other files.
        OSError: the folder cannot be written.
    """
    loaded, workdir = restored(config, workdir), pathlib.Path(workdir)
    run = as_trained(loaded)
    average, options = one_average(run.config.eval.ema), run.config.export
    if options.precision != "float32" and options.format != "safetensors":
        raise ValueError(
            f"export.precision = {options.precision!r} is for export.format = 'safetensors', not "
            f"{options.format!r}, whose weights are in float32"
        )
    kind = options.format if options.precision == "float32" else f"{options.format}_float16"
    name = "_".join(filter(None, [f"step_{run.state['step']}", average, kind]))
    folder = pathlib.Path(options.folder or workdir / "export" / name)
    distributed.on_main(lambda: _write(run, folder, average, figures_of(loaded, average, workdir)))
    return folder


@torch.no_grad()
def _write(run: Run, folder: pathlib.Path, average: str, figures: str) -> None:
    record = {"run": run_digest(run.config), "step": run.state["step"], "average": average}
    _check_folder(folder, record["run"])
    run.state["ema"].copy_to(run.state["model"].parameters())
    with whole_folder(folder) as new:
        usage = _WRITERS[run.config.export.format](run, new, average)
        nearest = nearest_experiment(shared_config(run))
        write_text(new / "README.md", model_card(run, average, nearest, figures, usage))
        write_text(new / RECORD, json.dumps(record) + "\n")
    logging.info("exported to %s", folder)


def _check_folder(folder: pathlib.Path, run: str) -> None:
    """Refuse a folder with anything else than an earlier export of the same run."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    try:
        found = json.loads((folder / RECORD).read_text(encoding="utf-8"))["run"]
    except (OSError, ValueError, TypeError, LookupError):
        found = ""
    if found != run:
        other = "the export of a run with other training options, or by another version"
        held = other if found else "other files"
        raise ValueError(
            f"export.folder = {str(folder)!r} holds {held}: choose another folder, or remove it"
        )


def shared_config(run: Run) -> Config:
    """The complete config, without the names of files on this machine."""
    config = complete(run.config)
    with config.unlocked():
        config.update_from_flattened_dict({key: TABLE[key].default for key in _FILES})
    return config


def _write_safetensors(run: Run, folder: pathlib.Path, average: str) -> str:
    path, config = folder / "weights.safetensors", shared_config(run).to_json_best_effort()
    contents = contents_of({**run.state, "config": config, "average": recorded(average)})
    weights = _weights(run.state["model"], run.config.export.precision)
    write_safetensors(path, weights, safetensors_metadata(contents))
    return _usage(run, path.name)


def _weights(model: nn.Module, precision: str) -> dict[str, Tensor]:
    """The state dict of a network, its trained parameters in "float32" or "float16"."""
    weights = model.state_dict()
    if precision == "float32":
        return weights
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    halves = {name: weights[name].half() for name in trained}
    if too_large := [name for name, value in halves.items() if not value.isfinite().all()]:
        raise ValueError(
            f"export.precision = 'float16' cannot hold {too_large[0]!r}, which has values above "
            "65504: export in float32"
        )
    return weights | halves


def _write_pth(run: Run, folder: pathlib.Path, average: str) -> str:
    state, path = run.state, folder / "checkpoint.pth"
    # The published code asks for an optimiser's state, and moments belong to unaveraged weights.
    optimizer = get_optimizer(run.config, list(state["model"].parameters()))
    config = shared_config(run).to_json_best_effort()
    contents = {**state, "optimizer": optimizer, "config": config, "average": recorded(average)}
    if "start" in state:
        contents["start"] = {"digest": state["start"]["digest"]}
    write_contents(path, contents_of(contents))
    return _usage(run, path.name)


def _write_diffusers(run: Run, folder: pathlib.Path, average: str) -> str:
    if run.continuous:
        raise ValueError(
            "export.format = 'diffusers' has no place for the mean and deviation of continuous "
            "data: choose 'safetensors' or 'pth'"
        )
    save_diffusers(folder, run)
    call = _network_call(run) if run.config.training.condition else _pipeline_call(run)
    others = options_for_folder(folder, run.config)
    flags = "".join(f" {shlex.quote(f'--config.{key}={value}')}" for key, value in others.items())
    return f"""In Diffusers:

```python
{call}
```

And here, with a config of these options:

```sh
python main.py --config CONFIG --workdir RUN --mode sample --config.model.weights=FOLDER{flags}
```
"""


def _pipeline_call(run: Run) -> str:
    """The call of the pipeline of Diffusers, whose own number of steps may be above all of them."""
    sampling, steps, arguments, comment = run.config.sampling, run.sde.N, ["batch_size=4"], ""
    if sampling.method == "chain":
        is_ddim = sampling.variance == "ddim"
        kind = "DDIMScheduler" if is_ddim else "DDPMScheduler"
        arguments += _ddim_arguments(sampling) if is_ddim else []
        if spacing_of(sampling.respacing, kind) is None:
            comment = (
                "# Samples here visit other levels than this pipeline can: sampling.respacing = "
                f"{sampling.respacing!r}.\n"
            )
        kept = len(kept_levels(steps, sampling.respacing))
        steps = min(steps, 50) if is_ddim and kept == steps else kept
    call = ", ".join([*arguments, f"num_inference_steps={steps}"])
    return f"""from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("FOLDER")
{comment}images = pipeline({call}).images"""


def _ddim_arguments(sampling) -> list[str]:
    """Arguments of the call beside the number of steps, for samples as here."""
    arguments = [f"eta={sampling.eta:g}"] if sampling.eta else []
    follows = sampling.clip and sampling.clip_noise
    return arguments + ["use_clipped_model_output=True"] * follows


def _network_call(run: Run) -> str:
    """The call of the network of Diffusers: pipelines tell it no classes."""
    data = run.config.data
    low, count = -1 if data.centered else 0, data.num_classes
    null = f", and {count} for none" if run.config.training.condition_dropout else ""
    return f"""from diffusers import UNet2DModel

# Its pipeline tells no classes: write the loop of your sampler around this call.
network = UNet2DModel.from_pretrained("FOLDER", subfolder="unet")
# x (B, {", ".join(map(str, run.shape))}), of data in [{low}, 1]; t (B,);
# classes (B,), int64, from 0 to {count - 1}{null}.
output = network(x, t, class_labels=classes).sample"""


def _usage(run: Run, file: str) -> str:
    describe = _of_classifier if run.objective == "classifier" else _of_score
    use, command = describe(run, file)
    return f"""The file holds the config above. In Python:

```python
import run_lib

run = run_lib.from_checkpoint("{file}", "cpu")
{use}
```

From the command line, {command}
```
"""


def _of_score(run: Run, file: str) -> tuple[str, str]:
    """The use of a loaded score network, in Python and as a command."""
    needs_path = "image" in run.conditions.kinds and run.config.data.path
    path = 'run.config.data.path = "photos/"  # of pictures, parts of which it is told\n'
    return (
        f"{path if needs_path else ''}images = run.draw(range(4))",
        f"""with a config of these options:

```sh
python main.py --config CONFIG --workdir RUN --mode sample --config.model.weights={file}""",
    )


def _of_classifier(run: Run, file: str) -> tuple[str, str]:
    """The same of a classifier, which draws no samples itself."""
    network = run.state["model"]
    told = "the time step" if getattr(network, "told_time_step", False) else "s(t)"
    low = -1 if run.config.data.centered else 0
    return (
        f"""classifier = run.state["model"].eval()
# x (B, {", ".join(map(str, run.shape))}), of data in [{low}, 1] with noise; labels (B,): {told}.
logits = classifier(x, labels)""",
        f"""for samples of a score network of the same process:

```sh
python main.py --config CONFIG --workdir RUN --mode control --config.control.task=class \\
    --config.control.classifier={file}""",
    )


_WRITERS = {"safetensors": _write_safetensors, "pth": _write_pth, "diffusers": _write_diffusers}
