"""Experiments: their published values, the command line, and configs of users beside ours."""

from __future__ import annotations

import ast
import json
import os
import pathlib
import subprocess
import sys

import pytest
from absl import flags
from ml_collections import ConfigDict, config_flags
from small_runs import ROOT, run_forked, small_config

from configs import defaults
from score_lib.disk.files import open_folder
from score_lib.options import checked, complete, flatten, from_json

# From config_flags, which still loads files in an older way.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")

PUBLISHED = json.loads((ROOT / "tests/data/published_configs.json").read_text())
# Karras et al. 2022: tables 1 and 2, and appendix F.
PUBLISHED_EDM = json.loads((ROOT / "tests/data/edm_configs.json").read_text())
OWN = [
    "adm/imagenet128",
    "adm/imagenet128_classifier",
    "adm/imagenet128_to_512",
    "adm/imagenet256",
    "adm/imagenet256_classifier",
    "adm/imagenet256_uncond",
    "adm/imagenet512",
    "adm/imagenet512_classifier",
    "adm/imagenet64",
    "adm/imagenet64_classifier",
    "adm/imagenet64_to_256",
    "adm/improved_cifar10",
    "adm/improved_imagenet64",
    "adm/improved_imagenet64_classes",
    "adm/improved_lsun_bedroom",
    "adm/lsun_bedroom",
    "adm/lsun_cat",
    "adm/lsun_horse",
    "edm/digits",
    "subvp/digits",
    "subvp/digits_classifier",
    "subvp/fashion_mnist",
    "subvp/fashion_mnist_large",
    "ve/cifar10_classifier",
    "ve/digits",
    "ve/digits_classifier",
    "ve/fashion_mnist",
    "ve/fashion_mnist_large",
    "vp/color_digits",
    "vp/digits",
    "vp/digits_adm",
    "vp/digits_adm_classifier",
    "vp/digits_classifier",
    "vp/digits_conditional",
    "vp/digits_superres",
    "vp/fashion_mnist",
    "vp/fashion_mnist_classifier",
    "vp/fashion_mnist_conditional",
    "vp/fashion_mnist_conditional_large",
    "vp/fashion_mnist_large",
    "vp/fields",
    "vp/images",
    "vp/points",
    "vp/series",
    "vp/vectors",
    "vp/volumes",
]

ABSENT = "absent"
# Where an experiment departs from the published table: our value, and why.
EXCEPTIONS = {
    ("ve/ncsn/celeba", "training.loss"): (ABSENT, "published under this name for training.sde"),
    ("ve/ncsn/celeba", "training.sde"): ("vesde", "the value published as training.loss"),
    ("ve/ncsnv2/bedroom", "training.continuouse"): (ABSENT, "a slip for training.continuous"),
    ("ve/ncsnv2/bedroom", "training.continuous"): (False, "meant by the misspelt key"),
    ("ve/celeba_ncsnpp", "model.sigma_begin"): (ABSENT, "read by nothing"),
} | {
    (name, key): (value, "missing there; as in the experiments at 256 px")
    for name in ("ve/celebahq_ncsnpp_continuous", "ve/ffhq_ncsnpp_continuous")
    for key, value in {
        "eval.enable_loss": True,
        "eval.enable_bpd": False,
        "eval.enable_sampling": True,
        "eval.bpd_dataset": "test",
        "model.beta_min": 0.1,
        "model.beta_max": 20.0,
    }.items()
}
# A part sets its options in every experiment; the published files leave some out where they have
# no effect.
SET_EVERYWHERE = {"model.conv_size": 3, "model.fourier_scale": 16}


def published(name: str) -> dict[str, object]:
    return flatten(ConfigDict((PUBLISHED | PUBLISHED_EDM)[name]))


def plain(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value


# --- Values ------------------------------------------------------------------------------------


def test_every_published_experiment_is_there_and_no_unknown_one():
    assert defaults.experiments() == sorted([*PUBLISHED, *PUBLISHED_EDM, *OWN])
    assert len(PUBLISHED) == 39


@pytest.mark.parametrize("page", ("README.md", "docs/experiments.md"))
def test_the_pages_count_the_experiments(page):
    text = " ".join((ROOT / page).read_text().split())
    of_adm = sum(name.startswith("adm/") for name in OWN)
    assert f"All {len(PUBLISHED)} published experiments" in text
    assert len(PUBLISHED_EDM) == 2 and "two of EDM" in text
    assert of_adm == 18 and "eighteen " in text
    assert f"and {len(OWN) - of_adm} of our own" in text


@pytest.mark.parametrize("name", [*PUBLISHED, *PUBLISHED_EDM])
def test_experiment_has_the_published_values(name):
    ours, theirs = flatten(defaults.load(name)), published(name)
    extra = flatten(defaults.base()) | SET_EVERYWHERE
    differing = {}
    for key in ours.keys() | theirs.keys():
        value, expected = (
            plain(ours.get(key, ABSENT)),
            plain(theirs.get(key, extra.get(key, ABSENT))),
        )
        if (name, key) in EXCEPTIONS:
            expected, _ = EXCEPTIONS[name, key]
        elif key == "data.tfrecords_path" and key in theirs:
            expected = "data/" + pathlib.PurePosixPath(expected).name  # no machine's folders
        if value != expected or isinstance(value, bool) != isinstance(expected, bool):
            differing[key] = (value, expected)
    assert not differing


@pytest.mark.parametrize(("name", "key"), EXCEPTIONS)
def test_no_exception_is_out_of_date(name, key):
    value, _ = EXCEPTIONS[name, key]
    assert published(name).get(key, ABSENT) != value


@pytest.mark.parametrize("name", defaults.experiments())
def test_experiment_is_complete_and_plain(name):
    flat = flatten(defaults.load(name))
    assert not flatten(defaults.base()).keys() - flat.keys()
    for key, value in flat.items():
        # Lists and None could not be overridden on the command line.
        assert type(value) in (bool, int, float, str, tuple), f"{key} = {value!r}"
        assert not str(value).startswith(("/", "~")), f"{key} belongs to one machine: {value}"


@pytest.mark.parametrize("name", defaults.experiments())
def test_experiment_passes_the_checks(name):
    config, unknown = checked(defaults.load(name))
    assert not unknown and config.to_dict() == defaults.load(name).to_dict()


@pytest.mark.parametrize("name", defaults.experiments())
def test_experiment_says_what_it_is(name):
    file = ROOT / "configs" / f"{name}.py"
    assert ast.get_docstring(ast.parse(file.read_text()))


def test_each_call_gives_a_config_of_its_own():
    first, second = defaults.load("vp/digits"), defaults.load("vp/digits")
    first.model.nf += 1
    assert first.model.nf != second.model.nf


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("default_cifar10_configs", "ve/cifar10_ncsnpp"),
        ("default_celeba_configs", "ve/celeba_ncsnpp"),
        ("default_lsun_configs", "ve/church_ncsnpp_continuous"),
    ],
)
def test_experiment_files_written_elsewhere_find_their_defaults(module, name):
    config = __import__(f"configs.{module}", fromlist=[module]).get_default_configs()
    changed = {"data.category", "model.sigma_max", "model.embedding_type"}
    experiment = flatten(defaults.load(name))
    for key, value in flatten(config).items():
        assert key in changed or value == experiment[key], key


# --- Command line ------------------------------------------------------------------------------


def load_by_path(*arguments: str) -> ConfigDict:
    values = flags.FlagValues()
    command = ["main.py", *arguments]
    holder = config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=command)
    values(command)
    return holder.value


@pytest.mark.parametrize("name", defaults.experiments())
def test_experiment_loads_by_path(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = load_by_path(f"--config={ROOT}/configs/{name}.py")
    assert config.to_dict() == defaults.load(name).to_dict()


def test_options_are_overridden_with_their_types():
    config = load_by_path(
        f"--config={ROOT}/configs/ve/cifar10_ncsnpp_continuous.py",
        "--config.model.sigma_max=48.5",
        "--config.model.ch_mult=(1, 2)",
        "--config.training.continuous=False",
        "--config.data.path=pictures",
        "--config.optim.weight_decay=0.1",
    )
    assert (config.model.sigma_max, config.model.ch_mult) == (48.5, (1, 2))
    assert config.training.continuous is False
    assert (config.data.path, config.optim.weight_decay) == ("pictures", 0.1)


def test_an_override_of_an_unknown_option_fails():
    with pytest.raises((AttributeError, KeyError), match="continuous"):
        load_by_path(f"--config={ROOT}/configs/vp/digits.py", "--config.training.continuouse=False")


def test_options_set_on_the_command_line_reach_the_run(tmp_path):
    """A config may lie anywhere, with modules of its own beside it."""
    (tmp_path / "my_process.py").write_text("SIGMA_MAX = 3.0\n")
    (tmp_path / "mine.py").write_text(
        "from configs.ve.digits import get_config as digits\n"
        "from my_process import SIGMA_MAX\n\n"
        "def get_config():\n"
        "    config = digits()\n"
        "    config.model.sigma_max = SIGMA_MAX\n"
        "    return config\n"
    )
    command = ["--config=mine.py", "--mode=train", "--workdir=run", "--config.model.sigma_min=4.0"]
    code, output = run_forked(command, cwd=tmp_path)
    assert code == 1 and "sigma_min = 4" in output and "sigma_max = 3" in output, output


@pytest.mark.parametrize("name", defaults.experiments())
def test_the_config_that_a_run_writes_is_read_as_it_was(name, tmp_path):
    config = complete(defaults.load(name))
    open_folder(tmp_path, config)
    read = from_json((tmp_path / "config.json").read_text())
    assert read.to_dict() == config.to_dict() and read.device_name == "auto"
    assert all(type(v) is type(flatten(config)[key]) for key, v in flatten(read).items())


def test_the_config_that_a_run_writes_repeats_it(tmp_path):
    """With other options on top of it, of which those of another method are refused."""
    changes = {"model__sigma_max": 3.0, "sampling__method": "ode"}
    open_folder(tmp_path, complete(small_config("ve/digits", sampling__churn=40.0, **changes)))
    command = ["--config=config.json", "--mode=train", "--workdir=run"]
    code, output = run_forked([*command, "--config.model.sigma_min=4.0"], cwd=tmp_path)
    assert code == 1 and "sigma_min = 4" in output and "sigma_max = 3" in output, output
    code, output = run_forked([*command, "--config.sampling.eta=0.3"], cwd=tmp_path)
    assert code == 1 and "W sampling.churn = 40.0 is left out" in output, output
    assert "E sampling.eta = 0.3 should be 0.0" in output and "E sampling.churn" not in output


def test_options_that_a_config_lacks_are_set_on_the_command_line(tmp_path):
    """Also those of sections that it lacks; options that follow from others still do."""
    (tmp_path / "mine.py").write_text(
        "from configs.vp.digits import get_config as digits\n\n"
        "def get_config():\n"
        "    config = digits()\n"
        "    del config.eval, config.training.metrics_freq\n"
        "    config.optim.warmup = 3 * config.training.get_ref('batch_size')\n"
        "    return config\n"
    )
    options = ("eval.batch_size=7", "training.metrics_freq=5", "training.batch_size=2")
    code = (
        "import sys, main\n"
        "main.parse_flags(sys.argv)\n"
        "config = main.FLAGS.config\n"
        "print(config.eval.batch_size, config.training.metrics_freq, config.optim.warmup)"
    )
    command = [sys.executable, "-c", code, f"--config={tmp_path}/mine.py"]
    command += [f"--config.{option}" for option in options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split() == ["7", "5", "6"], done.stderr


def test_the_folder_of_a_run_may_lie_in_the_home_folder(tmp_path):
    """As shells pass it: bash expands `--workdir ~/run`, and not `--workdir=~/run`."""
    command = [f"--config={ROOT}/configs/vp/digits.py", "--mode=sample", "--workdir=~/run"]
    code, output = run_forked(command, tmp_path, lambda: os.environ.update(HOME=str(tmp_path)))
    assert code == 1 and f"there is no checkpoint at {tmp_path}/run/" in output, output


# --- Configs of users beside ours --------------------------------------------------------------


@pytest.mark.parametrize("first", ("ours", "theirs"))
@pytest.mark.parametrize("packages", ("folders", "packages"))
def test_experiments_in_another_folder_are_found(first, packages, tmp_path):
    """Without `__init__.py` wherever they are; a package of theirs where it comes second."""
    folder = tmp_path / "configs" / "ve"
    folder.mkdir(parents=True)
    (folder / "mine.py").write_text("mine = True\n")
    if packages == "packages":
        for init in (folder / "__init__.py", folder.parent / "__init__.py"):
            text = (ROOT / "configs" / "subvp" / "__init__.py").read_text()
            init.write_text(text if first == "theirs" else "")
    path = [str(tmp_path), str(ROOT)] if first == "theirs" else [str(ROOT), str(tmp_path)]
    code = (
        "import configs.ve.mine, configs.ve.cifar10_ncsnpp_continuous, configs.data\n"
        "assert configs.ve.mine.mine and configs.ve.cifar10_ncsnpp_continuous.get_config()"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path)}
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment)
    assert done.returncode == 0


# --- Slips of published files ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "slip", "meant"),
    [("ve/ncsnv2/bedroom", "continuouse", "continuous"), ("ve/ncsn/celeba", "loss", "sde")],
)
def test_slips_of_published_files_are_read_with_a_warning(name, slip, meant, caplog):
    """A copy of such a file, which users have; also with the default `continuous = True`."""
    ours = defaults.load(name)
    copied = ConfigDict(ours.to_dict())
    copied.training[slip] = copied.training[meant]
    if slip == "continuouse":
        copied.training.continuous = True
    else:
        del copied.training[meant]
    read, unknown = checked(copied.lock())
    assert flatten(read) == {**flatten(complete(ours)), "device": str(ours.device)}
    assert read.is_locked and not unknown
    assert f"training.{slip} is read as training.{meant}" in caplog.text


def test_other_slips_stay_refused():
    for name, value in {"continuouse": True, "continous": False, "continuousee": False}.items():
        config = defaults.load("ve/ncsnv2/bedroom")
        config.training[name] = value
        with pytest.raises(ValueError, match=rf"training\.{name}.*training\.continuous"):
            checked(config)
    config = defaults.load("ve/ncsn/celeba")
    config.training.loss = "l2"  # an option of the user's own
    assert checked(config)[1] == ["training.loss"]
