"""Model cards: the facts that a user of exported weights needs, as a page."""

import json
import pathlib
import platform

import torch

from score_lib.base.version import VERSION
from score_lib.base.weights import weights_digest
from score_lib.data.loading import get_streams
from score_lib.data.public import only_prepared
from score_lib.data.sources import named
from score_lib.disk.logs import kept_messages
from score_lib.disk.reports import markdown_table
from score_lib.runs.nearest import Nearest, named_config
from score_lib.runs.setup import Run
from score_lib.runs.start import is_own
from score_lib.samplers.configured import sampler_text


def model_card(run: Run, average: str, nearest: Nearest, figures: str, usage: str) -> str:
    """The page in Markdown.

    Args:
        run: with the weights that are exported, as they were trained.
        average: the name of their average, as in `eval.ema`.
        nearest: the experiment that the config is nearest to.
        figures: of the weights, see `figures_of`.
        usage: how the files are used.
    """
    config, state = run.config, run.state
    parameters = sum(p.numel() for p in state["model"].parameters())
    facts = {
        "network": f"{config.model.name}, {parameters:,} parameters",
        "process": repr(run.sde),
        "objective": config.training.objective,
        "condition": config.training.condition or "none",
        "step": state["step"],
        "average": average or "the main one (model.ema_rate)",
        "seed": config.seed,
        "versions": f"score-sde {VERSION}, PyTorch {torch.__version__}, Python "
        f"{platform.python_version()}",
        "licence": "not stated",
    }
    if start := state.get("start"):
        facts["started from"] = f"weights with the digest {start['digest']}"
    changed = [{"option": k, "here": repr(a), "there": repr(b)} for k, a, b in nearest.differences]
    parts = [
        f"# {config.model.name} on {config.data.dataset}\n",
        "".join(f"- {name}: {value}\n" for name, value in facts.items()),
        f"## Config\n\nNearest shipped experiment: `{nearest.name}`.\n",
        markdown_table(changed) if changed else "No option differs.\n",
        f"## Data\n\n{_data(run)}",
        f"## Figures\n\n{figures}",
        f"## Use\n\n{usage}",
    ]
    return "\n".join(parts)


def _data(run: Run) -> str:
    """Facts of the config and, if the data are on this machine, their numbers."""
    data, classes = run.config.data, run.state["class_to_idx"]
    known = f"{-1 if data.centered else 0} to 1"
    if run.continuous:
        known = f"standardised (data.standardize = {data.standardize!r})"
    facts = {
        "data set": " ".join(filter(None, [data.dataset, data.category])),
        "shape": run.shape,
        "range in the network": known,
        "held out from training": _counts(run.config),
        "classes": named(classes) if classes else data.num_classes or "none",
    }
    return "".join(f"- {name}: {value}\n" for name, value in facts.items())


def _counts(config) -> str:
    try:
        with only_prepared(), kept_messages():
            info = get_streams(config, evaluation=True, num_workers=0)[2]
    except (ValueError, OSError, ImportError):
        return "not known, as the data were not at hand"
    counts = info.num_examples
    return f"{counts['test']} of {sum(counts.values())}"


def figures_of(run: Run, average: str, workdir: pathlib.Path) -> str:
    """The rows of the evaluation in a run's folder that measured the averaged weights.

    Rows of older versions do not tell the weights: by the step and the average, they count for
    checkpoints in the folder of the run.

    Raises:
        ValueError: the report is damaged.
    """
    path, model = workdir / "eval" / "report.json", run.state["model"]
    with run.state["ema"].applied(model.parameters()):
        digest = weights_digest(model)
    step, own = run.state["step"], is_own(run.config, workdir)

    def measured(record: dict) -> bool:
        if "weights" in record:
            return record["weights"]["digest"] == digest
        return own and record["step"] == step and record.get("ema", "") == average

    try:
        records = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
        rows = [record for record in records if measured(record)]
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise ValueError(f"{path} is damaged: evaluate again, or remove it") from error
    if not rows:
        return "Not measured.\n"
    made = _made_by(path.parent, rows)
    return f"Mean ± standard error, by `--mode eval`{made}.\n\n{markdown_table(rows)}"


def _made_by(folder: pathlib.Path, rows: list[dict]) -> str:
    """The sampler and the steps that figures in a folder are of, where its config tells."""
    path = folder / "config.json"
    if not path.is_file():
        return ""
    config, shown = named_config(str(path)), []
    if any("num_samples" in row for row in rows):
        shown.append(f"samples by {sampler_text(config)}")
    if any("bpd" in row for row in rows) and config.eval.bpd_steps:
        shown.append(f"bits/dim in {config.eval.bpd_steps} steps")
    return f": {', '.join(shown)}" if shown else ""
