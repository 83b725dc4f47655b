"""`--mode export`: files for others, and the page beside them."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from ml_collections import ConfigDict
from networks import fill_weights
from small_runs import dotted, small_config

import run_lib
from models.foreign import save_diffusers
from models.utils import create_model
from score_lib.disk.checkpoints import read_checkpoint, save_checkpoint
from score_lib.disk.safetensors_files import read_safetensors
from score_lib.options import flatten
from score_lib.runs import publish
from score_lib.runs.start import META

pytestmark = pytest.mark.slow  # whole runs

CHANGES = {"training__snapshot_sampling": False, "training__eval_freq": 50}
CHANGES |= {"training__n_iters": 2, "optim__lr": 0.05, "optim__warmup": 0}
CHANGES |= {"model__ema_rates": (0.5,), "sampling__method": "dpmpp_sde"}


def config(**changes):
    return small_config(**{**CHANGES, **changes})


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    run_lib.train(config(), folder)
    return folder


CASES = [
    ("safetensors", "0.5", "weights"),
    ("pth", "none", "checkpoint"),
]


@pytest.mark.parametrize("kind, average, stem", CASES)
def test_an_exported_file_gives_the_same_samples(kind, average, stem, workdir, tmp_path):
    options = config(eval__ema=average, export__format=kind)
    expected = run_lib.restored(options, workdir).draw(range(2))
    path = run_lib.export(options, workdir) / f"{stem}.{kind}"
    assert path.parent == workdir / "export" / "_".join(filter(None, ["step_2", average, kind]))
    given = run_lib.restored(config(model__weights=str(path)), tmp_path)
    assert torch.equal(given.draw(range(2)), expected)
    alone = run_lib.from_checkpoint(path, "cpu")
    assert torch.equal(alone.draw(range(2)), expected) and alone.state["step"] == 2
    assert alone.state["class_to_idx"] == {str(k): k for k in range(10)}


def test_half_precision_rounds_what_was_trained(workdir, tmp_path):
    run = run_lib.restored(config(), workdir)
    path = run_lib.export(config(export__precision="float16"), workdir) / "weights.safetensors"
    assert path.parent.name == "step_2_safetensors_float16"
    trained = {name for name, p in run.state["model"].named_parameters() if p.requires_grad}
    full = run_lib.export(config(), workdir) / "weights.safetensors"
    weights = read_safetensors(full)[0]
    for given in (
        run_lib.restored(config(model__weights=str(path)), tmp_path),
        run_lib.from_checkpoint(path, "cpu"),
    ):
        for name, value in given.state["model"].state_dict().items():
            rounded = weights[name].half().float() if name in trained else weights[name]
            assert value.dtype == weights[name].dtype and torch.equal(value, rounded)
        averages = given.state["ema"].shadow_params
        assert all(p.dtype == torch.float32 for p in averages)
        torch.testing.assert_close(given.draw(range(2)), run.draw(range(2)), rtol=2e-3, atol=2e-3)


def test_half_precision_is_refused_where_it_does_not_fit(workdir, tmp_path):
    with pytest.raises(ValueError, match=r"for export.format = 'safetensors', not 'pth'"):
        run_lib.export(config(export__precision="float16", export__format="pth"), workdir)
    run = run_lib.restored(config(), workdir)
    name, weights = next(iter(run.state["model"].named_parameters()))
    with pytest.raises(ValueError, match=f"cannot hold '{name}', which has values above 65504"):
        weights.data.fill_(1e5)
        publish._weights(run.state["model"], "float16")


def test_published_code_loads_the_layout(workdir):
    """It takes over four parts, with weights inside `DataParallel`, and the optimiser's state."""
    path = run_lib.export(config(export__format="pth"), workdir) / "checkpoint.pth"
    contents = torch.load(path, weights_only=True)
    network = torch.nn.DataParallel(create_model(config(), "cpu"))
    optimizer = torch.optim.Adam(network.parameters())
    assert list(contents["model"]) == ["module." + k for k in network.module.state_dict()]
    network.module.__class__ = type("Plain", (type(network.module),), {
        "load_state_dict": torch.nn.Module.load_state_dict,
    })  # fmt: skip
    network.load_state_dict(contents["model"], strict=True)
    optimizer.load_state_dict(contents["optimizer"])
    assert optimizer.param_groups[0]["lr"] == 0.05 and contents["step"] == 2
    trained = [p for p in network.parameters() if p.requires_grad]
    torch.testing.assert_close(contents["ema"]["shadow_params"], trained, rtol=0, atol=0)
    assert set(contents["ema"]) == {"decay", "num_updates", "shadow_params"}


def test_metadata_and_the_card_say_what_it_is(workdir):
    record = {"step": 2, "bpd": 2.5, "bpd_standard_error": 0.25, "checkpoint": "0"}
    record |= {"fid": 3.0, "num_samples": 16}
    (workdir / "eval").mkdir()
    report = workdir / "eval" / "report.json"
    report.write_text(json.dumps([record, {**record, "step": 1, "bpd": 7.0}]))
    evaluated = config(sampling__num_steps=9, eval__bpd_steps=12)
    (report.parent / "config.json").write_text(evaluated.to_json_best_effort())
    path = run_lib.export(config(export__folder=str(workdir / "shared")), workdir)
    _, metadata = read_safetensors(path / "weights.safetensors")
    stored = flatten(config(export__folder=""))
    assert json.loads(metadata["config"])["optim"]["lr"] == 0.05 == stored["optim.lr"]
    assert metadata["step"] == "2" and str(workdir) not in json.dumps(metadata)
    card = (path / "README.md").read_text()
    for line in (
        "- licence: not stated", "- seed: 42", "- step: 2", f"PyTorch {torch.__version__}",
        "experiment: `vp/digits`", "2.5000 ± 0.2500", "- held out from training: 296 of 1797",
        "by `--mode eval`: samples by dpmpp_sde (num_steps = 9), bits/dim in 12 steps",
    ):  # fmt: skip
        assert line in card, line
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in card.splitlines()]
    assert ["optim.lr", "0.05", "0.004"] in rows and ["model.nf", "8", "16"] in rows
    assert "7.0000" not in card and str(workdir) not in card
    report.write_text("[1")
    with pytest.raises(ValueError, match=r"report\.json is damaged"):
        run_lib.export(config(), workdir)
    report.unlink()


@pytest.mark.parametrize("told", (True, False), ids=("with digests", "of an older version"))
def test_the_card_has_no_figures_of_another_network(told, workdir, tmp_path):
    """Both runs have the same step; one evaluation is of each, and the card is of the other's."""
    options = {"eval__enable_bpd": False, "eval__enable_sampling": False, "eval__begin_ckpt": 0}
    options |= {"eval__end_ckpt": 0, "eval__batch_size": 300, "eval__loss_num_repeats": 1}
    own, other = tmp_path / "own", config(**options, seed=1)
    shutil.copytree(workdir / "checkpoints", own / "checkpoints")
    shutil.copytree(workdir / META.parent, own / META.parent)
    run_lib.train(other, tmp_path / "other")
    (ours,) = run_lib.evaluate(config(**options), own)
    (theirs,) = run_lib.evaluate(other, tmp_path / "other")
    assert f"{ours['loss']:.4f}" != f"{theirs['loss']:.4f}" and ours["weights"] != theirs["weights"]
    report = own / "eval" / "report.json"
    if not told:
        report.write_text(json.dumps([{k: v for k, v in ours.items() if k != "weights"}]))

    def card(**changes):
        return (run_lib.export(config(**options, **changes), own) / "README.md").read_text()

    assert f"{ours['loss']:.4f}" in card()
    assert f"{ours['loss']:.4f}" in card(eval__checkpoint=str(own / "checkpoints/checkpoint_0.pth"))
    shutil.rmtree(own / "export")
    theirs_file = str(tmp_path / "other/checkpoints/checkpoint_0.pth")
    assert "Not measured." in card(eval__checkpoint=theirs_file)
    # Of the same weights, whatever the file and the name of the average.
    report.write_text(json.dumps([ours, theirs]))
    found = card(eval__checkpoint=theirs_file, eval__ema="0.998")
    assert f"{theirs['loss']:.4f}" in found and f"{ours['loss']:.4f}" not in found


def test_only_an_export_of_the_same_run_is_replaced(workdir, tmp_path):
    folder = tmp_path / "shared"
    options = {"export__folder": str(folder)}
    run_lib.export(config(**options), workdir)
    (folder / "weights.safetensors").write_bytes(b"")
    run_lib.export(config(**options), workdir)
    assert (folder / "weights.safetensors").read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["shared"]
    # The options are those of the training, not those of the command.
    run_lib.export(config(**options, optim__lr=0.01), workdir)
    before = (folder / "weights.safetensors").read_bytes()
    run_lib.train(config(optim__lr=0.01, training__n_iters=1), tmp_path / "other")
    with pytest.raises(ValueError, match="holds the export of a run with other training"):
        run_lib.export(config(**options), tmp_path / "other")
    (folder / "exported.json").unlink()
    with pytest.raises(ValueError, match="holds other files: choose another folder"):
        run_lib.export(config(**options), workdir)
    assert (folder / "weights.safetensors").read_bytes() == before
    assert read_checkpoint(folder / "weights.safetensors")["step"] == 2


def test_files_state_how_their_weights_were_trained(tmp_path):
    """Whatever the command says; what another mode does with them is as the command says."""
    trained = {"optim__lr": 0.01, "training__batch_size": 32, "seed": 7}
    trained |= {"training__likelihood_weighting": True, "data__random_flip": False}
    trained |= {"model__dropout": 0.25}
    run_lib.train(config(**trained, training__n_iters=1), tmp_path)
    now = {"sampling__num_samples": 3, "eval__batch_size": 30, "model__dropout": 0.0}
    (average,) = run_lib.write_averages(config(**now), tmp_path)
    files = [average]
    for kind, name in (("pth", "checkpoint.pth"), ("safetensors", "weights.safetensors")):
        folder = run_lib.export(config(**now, export__format=kind), tmp_path)
        files.append(folder / name)
    expected = dotted(trained)
    expected |= {"sampling.num_samples": 3, "eval.batch_size": 30, "training.n_iters": 1}
    for file in files:
        found = flatten(ConfigDict(json.loads(read_checkpoint(file)["config"])))
        assert {key: found[key] for key in expected} == expected, file
    card = (folder / "README.md").read_text()
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in card.splitlines()]
    assert "- seed: 7\n" in card and ["optim.lr", "0.01", "0.004"] in rows
    assert ["training.batch_size", "32", "128"] in rows and "ch_mult" not in card
    weights = str(files[2])
    again = run_lib.export(config(**now, model__weights=weights), tmp_path / "b")
    found = json.loads(read_checkpoint(again / "weights.safetensors")["config"])
    assert found["optim"]["lr"] == 0.01


def test_a_folder_for_diffusers_is_a_start(tmp_path):
    """A network that Diffusers can express, whose folder holds no config of ours."""
    options = {"model__name": "ddpm", "model__nf": 32, "model__attn_resolutions": ()}
    options |= {"training__continuous": False, "model__num_scales": 30, "eval__enable_bpd": False}
    options |= {"eval__enable_sampling": False, "eval__enable_loss": False}
    run = run_lib.setup(config(**options))
    fill_weights(run.state["model"])
    save_checkpoint(tmp_path / "c.pth", run.state)
    stored = config(**options, eval__checkpoint=str(tmp_path / "c.pth"), eval__ema="none")
    stored.export.format = "diffusers"
    folder = run_lib.export(stored, tmp_path / "a")
    assert (folder / "model_index.json").exists() and (folder / "README.md").exists()
    start = {**options, "model__weights": str(folder)}
    found = run_lib.restored(config(**start), tmp_path / "b").state
    expected = run.state["model"].state_dict()
    torch.testing.assert_close(found["model"].state_dict(), expected, rtol=0, atol=0)
    (record,) = run_lib.evaluate(config(**start), tmp_path / "b")
    assert record["checkpoint"] == folder.stem
    with pytest.raises(ValueError, match=r"model.num_scales = 31 instead of 30"):
        run_lib.restored(config(**{**start, "model__num_scales": 31}), tmp_path / "b")


def test_the_card_asks_for_pictures_that_the_network_is_told(tmp_path, monkeypatch):
    """The names of files are left out of the config of an export."""
    pictures = np.random.default_rng(0).integers(0, 256, (20, 8, 8, 3), dtype=np.uint8)
    np.save(tmp_path / "pictures.npy", pictures)
    options = {"data__dataset": "IMAGES", "data__path": str(tmp_path / "pictures.npy")}
    options |= {"data__num_channels": 3, "data__levels": 256, "training__condition": "image"}
    options |= {"sampling__method": "heun", "sampling__num_steps": 2}
    save_checkpoint(tmp_path / "c.pth", run_lib.setup(small_config(**options)).state)
    stored = small_config(**options, eval__checkpoint=str(tmp_path / "c.pth"))
    folder = run_lib.export(stored, tmp_path / "a")
    code = (folder / "README.md").read_text().split("```python")[1].split("```")[0]
    monkeypatch.chdir(folder)
    used = {}
    exec(code.replace("photos/", stored.data.path), used)
    assert torch.equal(used["images"], run_lib.restored(stored, tmp_path).draw(range(4)))


@pytest.mark.parametrize("name", ["vp/digits_classifier", "vp/digits_adm_classifier"])
def test_the_card_of_a_classifier_calls_what_it_can(name, tmp_path, monkeypatch):
    """It draws no samples, and each kind is told another label."""
    nf = {"model__nf": 32} if "adm" in name else {}
    run = run_lib.setup(small_config(name, **nf))
    fill_weights(run.state["model"])
    save_checkpoint(tmp_path / "c.pth", run.state)
    stored = small_config(name, **nf, eval__checkpoint=str(tmp_path / "c.pth"), eval__ema="none")
    folder = run_lib.export(stored, tmp_path / "a")
    card = (folder / "README.md").read_text()
    assert ("the time step" in card) == ("adm" in name) and "run.draw" not in card
    assert "--config.control.classifier=weights.safetensors" in card
    monkeypatch.chdir(folder)
    used = {"x": torch.randn(2, *run.shape), "labels": torch.tensor([0.3, 0.9])}
    exec(card.split("```python")[1].split("```")[0], used)
    expected = run.state["model"].eval()(used["x"], used["labels"])
    assert torch.equal(used["logits"], expected)


@pytest.mark.parametrize("parametrization, sigma_data", [("v", 0.5), ("edm", 0.25)])
def test_a_network_alone_does_not_say_what_its_output_is(parametrization, sigma_data, tmp_path):
    """Of processes in continuous time, for which Diffusers has no scheduler."""
    options = {"model__name": "ddpm", "model__nf": 32, "model__attn_resolutions": ()}
    options |= {"model__parametrization": parametrization, "model__sigma_data": sigma_data}
    run = run_lib.setup(config(**options))
    network = fill_weights(run.state["model"])
    save_diffusers(tmp_path / "a", run.config, network)
    found = run_lib.restored(config(**options, model__weights=str(tmp_path / "a")), tmp_path / "b")
    expected = network.state_dict()
    torch.testing.assert_close(found.state["model"].state_dict(), expected, rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"model\.norm_eps = 0\.001 instead of 1e-06"):
        run_lib.restored(
            config(**options, model__norm_eps=1e-3, model__weights=str(tmp_path / "a")), tmp_path
        )


PLAIN_VE = {
    "model__name": "ncsnpp",
    "model__resblock_type": "ddpm",
    "model__progressive": "none",
    "model__progressive_input": "none",
    "model__fir": False,
    "model__skip_rescale": False,
    "model__norm_groups": 8,
    "model__embedding_type": "fourier",
    "model__scale_by_sigma": True,
    "training__sde": "vesde",
    "training__continuous": True,
    "sampling__predictor": "reverse_diffusion",
    "sampling__corrector": "langevin",
    "data__centered": False,
}
CHAIN = {"sampling__method": "chain"}
DDIM = {**CHAIN, "sampling__variance": "ddim"}
ETA = {**DDIM, "sampling__eta": 0.5, "sampling__clip_noise": False}
CLASSES = {"training__condition": "classes", "training__condition_dropout": 0.1}
CLASSES |= {"data__num_classes": 10}


@pytest.mark.parametrize(
    "options, N, said",
    [
        (CHAIN, 30, ["num_inference_steps=30)"]),
        (DDIM, 30, ["num_inference_steps=30)"]),
        (DDIM, 80, ["use_clipped_model_output=True, num_inference_steps=50)"]),
        ({**ETA, "sampling__respacing": "trailing6"}, 30, ["4, eta=0.5, num_inference_steps=6)"]),
        ({**CHAIN, "sampling__respacing": "7"}, 30, ["4, num_inference_steps=7)"]),
        ({**CHAIN, "sampling__respacing": "5,2"}, 30, ["other levels than", "steps=7)"]),
        (PLAIN_VE, 7, ["num_inference_steps=7)"]),
        (CLASSES, 30, ["class_labels=classes", "from 0 to 9, and 10 for none", "data in [-1, 1]"]),
    ],
)
def test_the_card_of_a_folder_calls_what_diffusers_can_run(options, N, said, tmp_path):
    """Its pipelines make 1000, 50 or 2000 steps by default, and tell no classes."""
    ddpm = {"model__name": "ddpm", "model__nf": 32, "model__attn_resolutions": ()}
    options = {**ddpm, "training__continuous": False, "model__num_scales": N, **options}
    run = run_lib.setup(config(**options))
    save_checkpoint(tmp_path / "c.pth", run.state)
    stored = config(**options, eval__checkpoint=str(tmp_path / "c.pth"))
    stored.export.format = "diffusers"
    card = (run_lib.export(stored, tmp_path / "a") / "README.md").read_text()
    for text in said:
        assert text in card, card
    assert ("DiffusionPipeline" in card) == ("classes" not in options.values())


PLAIN = {**PLAIN_VE, "model__embedding_type": "positional", "model__scale_by_sigma": False}
PLAIN |= {"training__sde": "vpsde", "training__continuous": False, "data__centered": True}
PLAIN |= {**CHAIN, "model__nf": 32, "model__attn_resolutions": (), "model__num_scales": 30}
ATTENTION = {"model__name": "ddpm", "model__norm_groups": 0, "model__attn_resolutions": (4,)}


@pytest.mark.parametrize(
    "options, needed",
    [
        ({"model__init_scale": 1.0}, {"model.name": "ddpm"}),
        ({**ATTENTION}, {"model.attn_every_block": True}),
        (
            {**ATTENTION, "model__num_heads": 2, "model__attn_every_block": True},
            {"model.num_head_channels": 32, "model.num_heads": 1},
        ),
        (
            {"model__name": "ddpm", "model__parametrization": "noise", "model__norm_groups": 8},
            {"model.parametrization": ""},
        ),
    ],
)
def test_the_card_of_a_folder_tells_how_to_start_from_it(options, needed, tmp_path):
    """Theirs are other descriptions of the same networks, which a run of the config refuses."""
    options = {**PLAIN, "model__ch_mult": (1, 2), **options}
    run = run_lib.setup(config(**options))
    network = fill_weights(run.state["model"]).eval()
    save_checkpoint(tmp_path / "c.pth", run.state)
    stored = config(**options, eval__checkpoint=str(tmp_path / "c.pth"), eval__ema="none")
    stored.export.format = "diffusers"
    folder = run_lib.export(stored, tmp_path / "a")
    flags = "".join(f" --config.{name}={value}" for name, value in needed.items())
    card = (folder / "README.md").read_text()
    assert f"--config.model.weights=FOLDER{flags}\n" in card, card
    start = config(**options, model__weights=str(folder))
    with pytest.raises(ValueError, match=re.escape(next(iter(needed)))):
        run_lib.restored(start, tmp_path / "b")
    start.update_from_flattened_dict(needed)
    again = run_lib.restored(start, tmp_path / "b").state["model"].eval()
    x, labels = torch.randn(2, *run.shape), torch.tensor([0.0, 3.0])
    assert torch.equal(again(x, labels), network(x, labels))


def test_continuous_data_keep_their_units(tmp_path):
    """Fine-tuning keeps those of the file, whatever the new data are."""
    for name, shift in (("a", 100.0), ("b", -7.0)):
        vectors = shift + 3 * torch.randn(64, 2, dtype=torch.float64).numpy()
        np.save(tmp_path / f"{name}.npy", vectors)
    options = {"data__path": str(tmp_path / "a.npy"), "sampling__num_steps": 3}
    options |= {"training__n_iters": 1, "training__snapshot_sampling": False}
    stored = small_config("vp/vectors", **options)
    run_lib.train(stored, tmp_path / "a")
    run = run_lib.restored(stored, tmp_path / "a")
    path = run_lib.export(stored, tmp_path / "a") / "weights.safetensors"
    alone = run_lib.from_checkpoint(path, "cpu")
    assert torch.equal(alone.draw(range(3)), run.draw(range(3)))
    options |= {"data__path": str(tmp_path / "b.npy"), "model__weights": str(path)}
    run_lib.train(small_config("vp/vectors", **options), tmp_path / "b")
    tuned = read_checkpoint(tmp_path / "b" / META)["standardization"]
    torch.testing.assert_close(tuned["mean"], run.scaler.mean, rtol=0, atol=0)
    assert float(tuned["mean"].mean()) > 90
    stored.export.format = "diffusers"
    with pytest.raises(ValueError, match="no place for the mean and deviation"):
        run_lib.export(stored, tmp_path / "a")
