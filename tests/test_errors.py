"""Mistakes in the input: each ends the command with one message, and no file is lost."""

import os
import pathlib
import pickle
import re
import resource
import shutil

import numpy as np
import pytest
import torch
from small_runs import (
    ROOT,
    SMALL,
    contents,
    dotted,
    run_forked,
    run_module_forked,
    small_config,
)

import run_lib
from score_lib.base.mistakes import is_out_of_memory
from score_lib.data import public
from score_lib.disk.checkpoints import read_checkpoint, save_checkpoint

FEW = {
    "training__n_iters": 4,
    "training__snapshot_freq": 2,
    "training__snapshot_freq_for_preemption": 4,
    "eval__begin_ckpt": 1,
    "eval__end_ckpt": 2,
    "eval__enable_bpd": False,
    "eval__enable_sampling": False,
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a run that was trained and evaluated."""
    folder = tmp_path_factory.mktemp("run")
    run_lib.train(small_config(**FEW), folder)
    run_lib.evaluate(small_config(**FEW), folder)
    return folder


@pytest.fixture
def workdir(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "run")


def command(workdir, *options, config=ROOT / "configs/vp/digits.py", mode="train"):
    """The command line of a small run; None leaves an option out."""
    given = {"config": config, "workdir": workdir, "mode": mode}
    small = SMALL | dotted(FEW)
    arguments = [f"--{name}={value}" for name, value in given.items() if value is not None]
    return [*arguments, *(f"--config.{key}={value}" for key, value in small.items()), *options]


def message(arguments, **options):
    """The error of a command that fails: one message, without a traceback."""
    code, output = run_forked(arguments, **options)
    assert code == 1, output
    assert "Traceback" not in output
    (said,) = re.findall(r"^(?:\S+ E |FATAL )(.*)$", output, flags=re.MULTILINE)
    return said


@pytest.mark.slow
def test_grey_levels_of_samples_are_those_of_the_data(workdir):
    """0 are those of the data set, where they are 256: of a sample alone nothing else is known."""
    config = small_config(**FEW, data__levels=0, training__eval_freq=2)
    kept = contents(workdir)
    for mode in (run_lib.train, run_lib.fid_stats, lambda *where: run_lib.evaluate(*where, "new")):
        with pytest.raises(ValueError, match=r"DIGITS has 17: set data.levels = 17$"):
            mode(config, workdir)
    config.eval.update(enable_loss=False, enable_sampling=True)
    with pytest.raises(ValueError, match=r"set data.levels = 17$"):
        run_lib.evaluate(config, workdir, "new")
    (wrong,) = [f for f in run_lib.check(config, workdir) if f.subject == "data"]
    assert wrong.state == "wrong" and "set data.levels = 17" in wrong.text
    assert kept.items() <= contents(workdir).items()


# Options of a training run, and words that the message has to have.
OPTIONS = {
    "training.continuouse=True": ("continuouse", "continuous"),
    "trainnig.batch_size=8": ("trainnig", "training"),
    "model.ch_mult[0]=2": ("model.ch_mult[0]",),
    "training.batch_size=many": ("training.batch_size=many", "int"),
    "training.continuous=perhaps": ("training.continuous=perhaps", "oolean"),
    "optim.lr=fast": ("optim.lr=fast", "float"),
    # The other options of a section that is replaced would be at their defaults.
    'optim={"lr":1e-3}': ("config.optim=", "--config.optim.lr=0.0002"),
    "model.ch_mult=x": ("model.ch_mult", "numbers above 0"),
    "training.batch_size=0": ("training.batch_size = 0", "at least 1"),
    "training.n_jitted_steps=3": ("training.eval_freq = 4", "multiple", "n_jitted_steps = 3"),
    "training.precision=half": ("training.precision = 'half'", "'bfloat16'"),
    "training.sde=vpsd": ("'vpsd'", "'vpsde'?"),
    "sampling.method=pcs": ("sampling.method", "'pcs'", "heun", "'pc'?"),
    "sampling.predictor=euler": ("predictor 'euler'", "euler_maruyama"),
    "sampling.corrector=langvin": ("corrector 'langvin'", "'langevin'?"),
    "optim.optimizer=SGD": ("optim.optimizer 'SGD'", "'Adam'"),
    "model.name=ncsnp": ("model 'ncsnp'", "'ncsnpp'?"),
    "model.normalization=BatchNorm": ("model.normalization", "'BatchNorm'", "'GroupNorm'"),
    "model.nonlinearity=gelu": ("model.nonlinearity", "'gelu'", "'swish'"),
    "model.resblock_type=resnet": ("model.resblock_type", "'resnet'", "'biggan'"),
    "model.embedding_type=sine": ("model.embedding_type", "'sine'", "'positional'"),
    "model.progressive=skip": ("model.progressive", "'skip'", "'output_skip'"),
    "model.progressive_input=skip": ("model.progressive_input", "'skip'", "'input_skip'"),
    "model.ch_mult=(1,1,1,1,1)": ("data.image_size", "8x8", "4 times", "multiples of 16"),
    "model.beta_min=30.": ("beta_min = 30", "beta_max = 20"),
    "model.nf=16": ("checkpoints-meta/checkpoint.pth", "nf = 16 instead of 8", "--workdir"),
    "model.num_res_blocks=2": ("checkpoints-meta/checkpoint.pth", "2 instead of 1", "--workdir"),
    "data.dataset=DIGIT": ("dataset 'DIGIT'", "'DIGITS'?"),
    "data.dataset=IMAGES": ("data.path", "a folder"),
    "device=gpu": ("'gpu'", "'cpu'"),
    # Mistakes that take several options.
    "training.sde=vesde sampling.predictor=euler_maruyama model.sigma_min=9.": (
        "sigma_min = 9",
        "sigma_max = 5",
    ),
    "training.likelihood_weighting=True training.continuous=False model.num_scales=30": (
        "training.likelihood_weighting",
        "training.continuous = True",
    ),
    "training.sde=subvpsde training.continuous=False model.num_scales=30": (
        "subVPSDE",
        "discrete",
        "training.continuous = True",
    ),
    "training.sde=subvpsde sampling.predictor=ancestral_sampling model.num_scales=30": (
        "subVPSDE",
        "ancestral",
        "reverse_diffusion",
    ),
    "sampling.predictor=ancestral_sampling sampling.probability_flow=True model.num_scales=30": (
        "probability-flow",
        "reverse_diffusion",
    ),
    "training.continuous=False model.num_scales=30 sampling.num_steps=25": (
        "25 steps",
        "training.continuous = True",
    ),
}


@pytest.mark.parametrize("options", OPTIONS)
def test_options(options, workdir):
    before = contents(workdir)
    said = message(command(workdir, *(f"--config.{option}" for option in options.split())))
    assert all(words in said for words in OPTIONS[options]), said
    assert contents(workdir) == before


def test_no_gpu(tmp_path):
    said = message(command(tmp_path / "new", "--config.device=cuda"))
    assert "'cuda'" in said and "'cpu'" in said
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"config": None}, ("--config",)),
        ({"mode": None}, ("--mode",)),
        ({"mode": "trian"}, ("--mode=trian", "train|eval|reproduce|sample|control|fid_stats")),
        ({"workdir": None}, ("--workdir",)),
        ({"workdir": ""}, ("--workdir",)),
    ],
)
def test_needed_flags(given, words, tmp_path):
    arguments = [a for a in command(**{"workdir": tmp_path / "new", **given}) if "config." not in a]
    said = message(arguments)
    assert all(word in said for word in words), said
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("extra", ("stray", "--wokrdir=x", "-config.nf=8"))
def test_unknown_arguments(extra, tmp_path):
    assert extra.strip("-").split("=")[0].removeprefix("config.") in message(
        command(tmp_path / "new", extra)
    )


CONFIG = """from configs.vp.digits import get_config as digits


def get_config():
    config = digits()
"""
FILES = {
    "def get_config(:\n": ("SyntaxError", "line 1"),
    "import nothing_of_this_name\n": ("line 1", "nothing_of_this_name"),
    "config = None\n": ("get_config()",),
    "def get_config():\n    pass\n": ("get_config()", "ConfigDict"),
    CONFIG + "    config.model.nff.x = 3\n": ("line 6", "nff"),
    CONFIG + "    return config + 1\n": ("line 6", "TypeError"),
    CONFIG + "    config.training.continuouse = True\n    return config\n": (
        "'training.continuouse'",
        "'training.continuous'",
    ),
    CONFIG + "    config.unlock().training.batch_size = '64'\n    return config\n": ("line 6",),
    CONFIG + "    del config.training.sde\n    return config\n": ("training.sde",),
    CONFIG + "    config.model = 'ncsnpp'\n    return config\n": ("model",),
}


@pytest.mark.parametrize("text", FILES)
def test_config_files(text, tmp_path):
    (tmp_path / "mine.py").write_text(text)
    said = message(["--config=mine.py", "--mode=train", "--workdir=new"], cwd=tmp_path)
    assert all(words in said for words in FILES[text]), said
    assert os.listdir(tmp_path) == ["mine.py"]


@pytest.mark.parametrize("text", ('{"model": {', "[1, 2]", '{"model": 3}', "{}"))
def test_config_files_in_json(text, tmp_path):
    (tmp_path / "mine.json").write_text(text)
    said = message(["--config=mine.json", "--mode=train", "--workdir=new"], cwd=tmp_path)
    assert re.search(r"mine\.json: .*(line 1|options)|has no model\.name", said), said
    assert os.listdir(tmp_path) == ["mine.json"]


def test_a_config_in_json_takes_no_argument(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    said = message(["--config=config.json:8", "--mode=train", "--workdir=new"], cwd=tmp_path)
    assert "config.json:8" in said and "':8'" in said, said


@pytest.mark.parametrize("path", ("missing.py", "configs/vp/digits.py", "."))
def test_no_config_file(path, tmp_path):
    """A path is taken from the current folder, which the message names."""
    said = message([f"--config={path}", "--mode=train", "--workdir=new"], cwd=tmp_path)
    assert f"--config={path}" in said and f"no such file in {tmp_path}" in said
    assert not os.listdir(tmp_path)


# --- Data -----------------------------------------------------------------------------------------


def save(folder, shape, dtype=np.uint8, fill=0):
    np.save(folder / "images.npy", np.full(shape, fill, dtype))
    return "--config.data.dataset=IMAGES", f"--config.data.path={folder / 'images.npy'}"


def empty(folder):
    (folder / "images").mkdir()
    return "--config.data.dataset=IMAGES", f"--config.data.path={folder / 'images'}"


DATA = {
    "another size": (
        lambda _: ["--config.data.image_size=16"],
        ("DIGITS", "8 x 8", "data.image_size=8"),
    ),
    "another number of channels": (
        lambda _: ["--config.data.num_channels=3"],
        ("DIGITS", "(3, 8, 8)", "data.num_channels=1"),
    ),
    "no path": (
        lambda _: ["--config.data.dataset=IMAGES"],
        ("data.path", "a folder, a .zip, .npy or .npz"),
    ),
    "nothing there": (
        lambda folder: ["--config.data.dataset=IMAGES", f"--config.data.path={folder / 'none'}"],
        ("data.path", "none", "no file or folder"),
    ),
    "empty folder": (empty, ("no image in", "images", ".png")),
    "whole numbers": (
        lambda folder: save(folder, (4, 8, 8), np.int64),
        ("int64", "data.range=0,1"),
    ),
    "colour": (lambda folder: save(folder, (4, 8, 8, 3)), ("3 channels", "data.num_channels=1")),
    "no images": (lambda folder: save(folder, (0, 8, 8)), ("no images",)),
    "one long list": (lambda folder: save(folder, (64,)), ("(64,)", "(N, H, W)")),
    "nan": (
        lambda folder: save(folder, (4, 8, 8), np.float32, np.nan),
        ("row 0", "images.npy", "nan", "outside [0, 1]", "data.range"),
    ),
}


@pytest.mark.parametrize("case", DATA)
def test_data(case, tmp_path):
    make, words = DATA[case]
    said = message(command(tmp_path / "new", *make(tmp_path)))
    assert all(word in said for word in words), said
    assert not list(tmp_path.rglob("*.pth"))


def test_data_that_cannot_be_downloaded(tmp_path, monkeypatch):
    pytest.importorskip("tensorflow_datasets")
    monkeypatch.setattr(public, "_reachable", lambda page: False)
    options = ["--config.model.nf=8", f"--config.data.data_dir={tmp_path / 'data'}"]
    config = ROOT / "configs/vp/cifar10_ddpmpp.py"
    run = [f"--config={config}", f"--workdir={tmp_path / 'new'}", "--mode=train", *options]
    said = message(run)
    assert "cifar10" in said and str(tmp_path / "data") in said
    assert "python -m score_lib.data.prepare cifar10" in said and "data.data_dir" in said
    assert not (tmp_path / "new").exists()


# --- Programs besides main.py ---------------------------------------------------------------------

# Module and options, and words that the message has to have; FILE is a file, and NONE nothing.
PROGRAMS = {
    "examples.digits --workdir FILE": ("FILE", "cannot be written"),
    "examples.series --workdir FILE": ("FILE", "Not a directory"),
    "examples.volume --workdir FILE": ("FILE",),
    "examples.point_cloud --workdir FILE": ("FILE",),
    "benchmarks.guidance --unconditional NONE --conditional NONE --classifier NONE": ("NONE",),
    "benchmarks.samplers --workdir NONE": ("no checkpoint at NONE/",),
    "benchmarks.objectives NONE": ("no checkpoint at NONE/",),
    "benchmarks.train --config vp/digit": ("configs.vp.digit",),
    "score_lib.data.export CIFAR NONE": ("'CIFAR'", "CIFAR10, CIFAR100", "SVHN"),
    "notebooks.run none": ("none.ipynb",),
}


@pytest.mark.parametrize("line", PROGRAMS)
def test_programs(line, tmp_path):
    (tmp_path / "FILE").touch()
    code, output = run_module_forked(*line.split(), cwd=tmp_path)
    *logged, said = output.splitlines()
    assert code == 1 and all(" I " in line for line in logged), output
    assert all(words in said for words in PROGRAMS[line]), said
    assert os.listdir(tmp_path) == ["FILE"]


@pytest.mark.parametrize("name", ("nosuch", "lsun/nosuch", "cifar10:1.0.0", "CIFAR-10"))
def test_unknown_names_of_tensorflow_datasets(name, tmp_path):
    pytest.importorskip("tensorflow_datasets")
    code, output = run_module_forked("score_lib.data.prepare", name, tmp_path / "new")
    assert code == 1 and len(output.splitlines()) == 1, output
    assert f"no {name!r}: known here are cifar10, cifar100, svhn_cropped, mnist" in output
    assert not os.listdir(tmp_path)


def test_every_program_tells_mistakes_in_one_message():
    folders = ("assets", "benchmarks", "examples", "notebooks", "score_lib/data")
    texts = {p: p.read_text() for folder in folders for p in (ROOT / folder).rglob("*.py")}
    programs = {p: text for p, text in texts.items() if '\nif __name__ == "__main__":\n' in text}
    assert len(programs) > 30
    assert not [path for path, text in programs.items() if "brief_mistakes(" not in text]


# --- Files of a run -------------------------------------------------------------------------------


def damaged(path):
    path.write_bytes(path.read_bytes()[:-1000])


def text(path):
    path.write_text("step 1: training loss 0.5")


def foreign(path):
    path.write_bytes(pickle.dumps({"model": print, "ema": None, "step": 0}))


def incomplete(path):
    torch.save({"state_dict": {}}, path)


def without_average(path):
    save_checkpoint(path, {**read_checkpoint(path), "ema": {"decay": 0.9, "shadow_params": []}})


@pytest.mark.parametrize("mode", ("train", "sample"))
@pytest.mark.parametrize("change", (damaged, text, foreign, incomplete, without_average))
def test_checkpoints(change, mode, workdir):
    change(workdir / "checkpoints-meta" / "checkpoint.pth")
    before = contents(workdir)
    said = message(command(workdir, mode=mode))
    assert "checkpoints-meta/checkpoint.pth" in said
    assert contents(workdir) == before


@pytest.mark.parametrize("mode", ("train", "eval"))
def test_a_folder_that_cannot_be_written(mode, workdir):
    file = workdir / "file"
    file.touch()
    places = {
        "train": command(file / "run"),
        "eval": [*command(workdir, mode="eval"), "--eval_folder=file"],
    }
    before = contents(workdir)
    said = message(places[mode])
    assert "cannot be written" in said and str(file) in said
    assert contents(workdir) == before


def test_full_disk(workdir):
    """Files that exist stay intact, and the run resumes once there is space."""
    before = {path: data for path, data in contents(workdir).items() if path.suffix == ".pth"}
    longer = command(workdir, "--config.training.n_iters=8")
    limit = min(len(data) for data in before.values()) // 2
    said = message(
        longer, prepare=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    )
    assert "File too large" in said and "checkpoints/checkpoint_3.pth" in said
    after = contents(workdir)
    assert {path: after[path] for path in before} == before
    assert not [path for path in after if path.suffix == ".tmp"]
    code, output = run_forked(longer)
    assert code == 0 and "from step 4 to 8" in output
    assert (workdir / "checkpoints" / "checkpoint_4.pth").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "option", "advice"),
    (
        ("train", "--config.training.n_iters=8", "a larger training.grad_accumulation"),
        ("sample", "--config.sampling.num_samples=100000", "a smaller training.batch_size, in"),
    ),
)
def test_too_little_memory(mode, option, advice, workdir):
    before = {path: data for path, data in contents(workdir).items() if path.suffix == ".pth"}
    large = "--config.training.batch_size=100000"

    def limit():
        used = int(pathlib.Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + 200_000_000,) * 2)

    said = message(command(workdir, option, large, mode=mode), prepare=limit)
    assert "memory is not enough" in said and advice in said
    after = contents(workdir)
    assert {path: data for path, data in after.items() if path.suffix == ".pth"} == before


@pytest.mark.parametrize(
    ("error", "is_memory"),
    (
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("std::bad_alloc"), True),
        (MemoryError(), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (KeyError("out of memory"), False),
    ),
    ids=repr,
)
def test_errors_of_too_little_memory_are_told_from_others(error, is_memory):
    assert is_out_of_memory(error) == is_memory


def test_loss_that_is_not_finite(workdir):
    before = {path: data for path, data in contents(workdir).items() if path.suffix == ".pth"}
    said = message(command(workdir, "--config.training.n_iters=8", "--config.optim.lr=1e30"))
    assert "not finite at step 6" in said and "optim.lr" in said
    after = contents(workdir)
    assert {path: data for path, data in after.items() if path.suffix == ".pth"} == before


@pytest.mark.parametrize("train", (run_lib.train, run_lib.train_dequantizer))
def test_weights_of_the_last_step_that_are_not_finite(train, workdir):
    """Its loss is that of the weights before; the update is larger than any number."""
    before = {path: data for path, data in contents(workdir).items() if path.suffix == ".pth"}
    few = {**FEW, "training__n_iters": 5, "dequantizer__n_iters": 1, "dequantizer__nf": 4}
    config = small_config(**few, optim__lr=1e39, optim__warmup=0, dequantizer__lr=1e39)
    with pytest.raises(FloatingPointError, match="a weight is not finite at step"):
        train(config, workdir)
    after = contents(workdir)
    assert {path: data for path, data in after.items() if path.suffix == ".pth"} == before


# --- Evaluation and sampling ----------------------------------------------------------------------

EVALUATIONS = {
    "--config.eval.end_ckpt=4": ("checkpoint_3.pth", "checkpoint_4.pth", "eval.end_ckpt"),
    "--config.eval.begin_ckpt=3": ("eval.begin_ckpt = 3", "eval.end_ckpt = 2"),
    "--config.eval.checkpoint=none.pth": ("none.pth", "eval.checkpoint", os.getcwd()),
    "--config.seed=7": ("another seed", "--eval_folder"),
    "--config.eval.batch_size=0": ("eval.batch_size = 0", "at least 1"),
}


@pytest.mark.parametrize("option", EVALUATIONS)
def test_evaluations(option, workdir):
    before = contents(workdir)
    said = message(command(workdir, option, mode="eval"))
    assert all(words in said for words in EVALUATIONS[option]), said
    assert contents(workdir) == before


def test_an_evaluation_of_another_checkpoint(workdir, tmp_path):
    """Not even the config beside the figures changes, which names the file."""
    other = tmp_path / "checkpoint_1.pth"
    shutil.copy(workdir / "checkpoints" / "checkpoint_2.pth", other)
    before = contents(workdir / "eval")
    said = message(command(workdir, f"--config.eval.checkpoint={other}", mode="eval"))
    assert "ckpt_1_loss.npz" in said and "another checkpoint" in said
    after = contents(workdir / "eval")
    del before[workdir / "eval" / "stdout.txt"], after[workdir / "eval" / "stdout.txt"]
    assert after == before


def test_extractors(workdir):
    options = "--config.eval.enable_sampling", "--config.eval.extractor=inceptoin"
    said = message([*command(workdir, *options, mode="eval"), "--eval_folder=other"])
    assert "'inceptoin'" in said and "inception" in said


def test_samples_of_nothing(tmp_path):
    said = message(command(tmp_path / "none", mode="sample"))
    assert "checkpoints-meta/checkpoint.pth" in said and "eval.checkpoint" in said
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize(
    ("option", "value"), (("data__centered", False), ("model__beta_max", 10.0))
)
def test_a_checkpoint_is_not_read_by_options_of_another_meaning(option, value, tmp_path):
    """Both give samples without an error, and wrong ones."""
    run_lib.train(small_config(training__n_iters=1, training__snapshot_freq=1), tmp_path)
    config = small_config(**{option: value})
    with pytest.raises(ValueError, match=f"read wrongly with {option.replace('__', '.')} = "):
        run_lib.sample(config, tmp_path)
    assert not (tmp_path / "samples" / "step_1").exists()
