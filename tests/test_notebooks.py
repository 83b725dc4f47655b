"""The notebooks: what is stored was executed in order, and they run from a fresh kernel."""

import getpass
import json
import logging
import re
import socket

import pytest
from small_runs import ROOT

import run_lib
from configs.defaults import load
from utils import save_checkpoint

FOLDER = ROOT / "notebooks"
NAMES = sorted(path.stem for path in FOLDER.glob("*.ipynb"))
PATHS = re.compile(r"""(?<![\w.:/])/(home|root|tmp|usr|opt|mnt|work|var|Users)\b|[A-Z]:\\\w""")


def stored(name):
    return json.loads((FOLDER / f"{name}.ipynb").read_text(encoding="utf-8"))


def code_cells(name):
    return [cell for cell in stored(name)["cells"] if cell["cell_type"] == "code"]


def text_of(output):
    """Everything in an output but pictures."""
    data = output.get("data", {})
    kept = {kind: value for kind, value in data.items() if not kind.startswith("image/")}
    return json.dumps({**output, "data": kept})


@pytest.mark.parametrize("name", NAMES)
def test_stored_notebooks_were_executed_in_order(name):
    cells = code_cells(name)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} <= {"stream", "display_data"}
    assert all(output.get("name", "stdout") == "stdout" for output in outputs)
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 5
    assert (FOLDER / f"{name}.ipynb").stat().st_size < 700_000


@pytest.mark.parametrize("name", NAMES)
def test_stored_notebooks_tell_nothing_of_a_machine(name):
    notebook = stored(name)
    assert set(notebook["metadata"]) == {"kernelspec", "language_info"}
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    assert notebook["metadata"]["language_info"] == {"name": "python"}
    assert all(set(cell["metadata"]) <= {"tags"} for cell in notebook["cells"])
    text = " ".join(text_of(output) for cell in code_cells(name) for output in cell["outputs"])
    assert not PATHS.search(text) and "site-packages" not in text
    names = {socket.gethostname(), getpass.getuser()} - {"", "localhost", "root", "user"}
    assert not [word for word in names if re.search(rf"\b{re.escape(word)}\b", text)]


def test_paths_are_found():
    assert PATHS.search('File "/home/someone/run.py"') and PATHS.search(r"at C:\Users")
    assert not PATHS.search("https://arxiv.org/abs/2011.13456 ../assets/weights 3/4")


def test_pins_are_those_of_the_other_requirements():
    def pins(kind):
        lines = (ROOT / f"requirements{kind}.txt").read_text().splitlines()
        return [line for line in lines if line.startswith("matplotlib")]

    assert pins("-notebooks") == pins("")


def values_of(name, parameters, names):
    """Values of a notebook that was executed with other parameters; tensors are lists."""
    for package in ("nbformat", "nbclient", "ipykernel"):
        pytest.importorskip(package, reason="pip install -r requirements-notebooks.txt")
    from notebooks.run import executed

    told = ", ".join(f"{key!r}: {expression}" for key, expression in names.items())
    last = f"import json; print(json.dumps({{{told}}}, default=lambda x: x.tolist()))"
    notebook = executed(FOLDER / f"{name}.ipynb", parameters, last)
    return json.loads(notebook.cells[-1].outputs[0].text)


@pytest.mark.slow
def test_tour_loads_files_in_the_published_layout(tmp_path, monkeypatch, capsys, caplog):
    """The last one, which holds no config, for the run and for colorization."""
    name = "vp/color_digits"
    trained = run_lib.setup(load(name))
    trained.add_optimizer()
    for number in (9, 10):
        trained.state["step"] = number
        published = {key: trained.state[key] for key in ("optimizer", "model", "ema", "step")}
        save_checkpoint(tmp_path / f"checkpoint_{number}.pth", published)
    monkeypatch.chdir(FOLDER)
    monkeypatch.syspath_prepend(ROOT)
    cells = {cell["id"]: "".join(cell["source"]) for cell in stored("tour")["cells"]}
    names = {}
    exec(cells["setup"] + "\n" + cells["parameters"], names)
    names.update(CHECKPOINTS=str(tmp_path), EXPERIMENT=name)
    exec(cells["load-code"], names)
    assert names["run"] is names["color"] and names["run"].state["step"] == 10
    assert names["digits"].shape == (1, 8, 8)
    assert "checkpoint_10.pth as vp/color_digits" in capsys.readouterr().out
    # All three files that come along are complete.
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.slow
def test_tour():
    expressions = {
        "samples": "samples",
        "bits": "bits.mean()",
        "known": "kept.abs().max()",
        "open": "(inpainted - few[:, None]).abs().max()",
        "gray": "gray_error.abs().max()",
        "colors": "(colored - few_in_color[:, None]).abs().max()",
        "reconstruction": "rebuilt.error.max()",
        "ends": "(between.unflatten(0, (4, 8))[:, 0] - images[:4]).abs().max()",
        "recognised": "recognised",
    }
    found = values_of("tour", {"COUNT": 8, "STEPS": 25, "TOLERANCE": 1e-3}, expressions)
    assert len(found["samples"]) == 8
    # All 296 held-out digits have 1.90; their standard deviation is 0.25.
    assert found["bits"] == pytest.approx(1.9, abs=0.35)
    assert found["known"] < 0.01 < 0.3 < found["open"]
    assert found["gray"] < 0.01 < 0.3 < found["colors"]
    assert found["reconstruction"] < 0.02 and found["ends"] < 0.03
    assert found["recognised"] >= 0.6


@pytest.mark.slow
def test_tutorial():
    parameters = {"TRAIN_STEPS": 200, "MLP_STEPS": 200, "REVERSE_STEPS": 100, "FLOW_STEPS": 25}
    parameters |= {"POINTS": 150, "DIGIT_STEPS": 8, "DIGITS": 4}
    expressions = {
        "floor": "floor",
        "score": "score_errors[0.7]",
        "library_score": "library_errors[0.7]",
        "flow": "flow_error",
        "likelihood": "(exact_log_p - closed_form).abs().mean()",
        "kl": "kl",
        "library_kl": "library_kl",
        "shares": "component_shares(reverse_paths(exact_score, noise, 100)[-1])",
        "digits": "[list(reverse_digits.shape), list(flow_digits.shape)]",
        "finite": "bool(bits.isfinite().all())",
    }
    found = values_of("tutorial", parameters, expressions)
    assert found["score"] < 0.1 and found["library_score"] < 0.02
    assert found["flow"] < 2e-3
    # It is that of the data with a little noise, as of the time EPS.
    assert found["likelihood"] < 0.01
    assert 0 < found["kl"] < 1.5 and -0.05 < found["library_kl"] < 0.8
    assert found["shares"] == pytest.approx([0.5, 0.3, 0.2], abs=0.12)
    assert found["digits"] == [[4, 1, 8, 8]] * 2 and found["finite"]
