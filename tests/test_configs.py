"""Experiments: published values, what the command line can change, and that every option counts."""

from __future__ import annotations

import ast
import functools
import json
import pathlib
import subprocess
import sys

import pytest
from absl import flags
from ml_collections import ConfigDict, FrozenConfigDict, config_flags
from source_code import ROOT, ConfigReads, project_files

from configs import defaults

# From config_flags, which still loads files in an older way.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")

PUBLISHED = json.loads((ROOT / "tests/data/published_configs.json").read_text())
OWN = [
    "subvp/digits",
    "subvp/digits_classifier",
    "ve/cifar10_classifier",
    "ve/digits",
    "ve/digits_classifier",
    "vp/color_digits",
    "vp/digits",
    "vp/digits_classifier",
    "vp/images",
]

ABSENT = "absent"
# Where an experiment departs from the published table: our value, and why.
EXCEPTIONS = {
    ("ve/ncsn/celeba", "training.loss"): (ABSENT, "published under this name for training.sde"),
    ("ve/ncsn/celeba", "training.sde"): ("vesde", "the value published as training.loss"),
    ("ve/ncsnv2/bedroom", "training.continuouse"): (ABSENT, "a slip for training.continuous"),
    ("ve/ncsnv2/bedroom", "training.continuous"): (False, "what the slip was to set"),
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
    return defaults.flatten(ConfigDict(PUBLISHED[name]))


def plain(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value


@functools.cache
def all_reads() -> list[ConfigReads]:
    return [ConfigReads(file) for file in project_files(leave_out=("tests", "configs"))]


# --- Values ------------------------------------------------------------------------------------


def test_every_published_experiment_is_there_and_no_unknown_one():
    assert defaults.experiments() == sorted([*PUBLISHED, *OWN])
    assert len(PUBLISHED) == 39


@pytest.mark.parametrize("name", PUBLISHED)
def test_experiment_has_the_published_values(name):
    ours, theirs = defaults.flatten(defaults.load(name)), published(name)
    extra = defaults.flatten(defaults.base()) | SET_EVERYWHERE
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
    flat = defaults.flatten(defaults.load(name))
    assert not defaults.flatten(defaults.base()).keys() - flat.keys()
    for key, value in flat.items():
        # Lists and None could not be overridden on the command line.
        assert type(value) in (bool, int, float, str, tuple), f"{key} = {value!r}"
        assert not str(value).startswith(("/", "~")), f"{key} belongs to one machine: {value}"


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
    experiment = defaults.flatten(defaults.load(name))
    for key, value in defaults.flatten(config).items():
        assert key in changed or value == experiment[key], key


# --- Every option counts -----------------------------------------------------------------------


def test_every_option_is_read_somewhere():
    modules = all_reads()
    read = set().union(*(module.reads for module in modules))
    texts = set().union(*(module.texts for module in modules))
    for section in set().union(*(module.computed for module in modules)):
        read |= {f"{section}.{text}" for text in texts}
    unread = sorted(defaults.known_keys() - read)
    assert not unread, f"nothing reads {unread}"


def test_every_option_that_is_read_is_known():
    unknown = {
        key: places
        for module in all_reads()
        for key, places in module.reads.items()
        if key not in defaults.known_keys()
    }
    assert not unknown, f"no experiment has {unknown}: add them to configs/defaults.py"


def test_defaults_in_the_code_are_those_of_the_configs():
    values: dict[str, set[object]] = {key: {v} for key, v in _flat_base().items()}
    for name in PUBLISHED:
        for key, value in defaults.flatten(defaults.load(name)).items():
            if key not in _flat_base():
                values.setdefault(key, set()).add(value)
    wrong = []
    for key, node, place in (entry for module in all_reads() for entry in module.defaults):
        try:
            default = ast.literal_eval(node)
        except (TypeError, ValueError):
            wrong.append(f"{place}: the default of {key} is not a literal")
            continue
        if values.get(key) != {default}:
            wrong.append(f"{place}: default {default!r} of {key}, configs {values.get(key)}")
    assert not wrong


@functools.cache
def _flat_base() -> dict[str, object]:
    return defaults.flatten(defaults.base())


def test_reads_are_found(tmp_path):
    source = """
import tensorflow as tf

def build(config, model):
    config = complete(config)
    model.unrelated, config.seed, tf.config.unrelated
    training, options = config.training, config.sampling
    def inner(training):
        return training.hidden
    return training.n_iters, options.get("snr", 0.16), config.model.name.lower()

class Run:
    def __init__(self, config):
        self.config, self.data = config, config.data
        config.model.written = 1

    def use(self):
        names = ["enable_loss"]
        self.config.eval["end_ckpt"], [self.config.eval[name] for name in names]
        return self.config.eval.batch_size, self.data.centered, self.data.items()
"""
    file = tmp_path / "module.py"
    file.write_text(source)
    found = ConfigReads(file)
    assert set(found.reads) == {
        "seed",
        "training.n_iters",
        "sampling.snr",
        "model.name",
        "eval.batch_size",
        "eval.end_ckpt",
        "data.centered",
    }
    assert found.computed == {"eval"} and "enable_loss" in found.texts
    assert [(key, ast.literal_eval(value)) for key, value, _ in found.defaults] == [
        ("sampling.snr", 0.16)
    ]


# --- Configs that users bring ------------------------------------------------------------------


def with_option(config: ConfigDict, key: str, value: object) -> ConfigDict:
    section, _, name = key.rpartition(".")
    if section and section not in config:
        config[section] = ConfigDict()
    (config[section] if section else config)[name] = value
    return config


def test_complete_adds_what_is_missing_and_keeps_the_rest():
    older = ConfigDict(PUBLISHED["vp/cifar10_ddpmpp"])
    older.eval.begin_ckpt = 3
    older.mine = ConfigDict({"snr2": 1.0})
    before = older.to_dict()
    full = defaults.complete(older)
    assert older.to_dict() == before
    flat = defaults.flatten(full)
    assert flat.items() >= defaults.flatten(older).items()
    added = {key: flat[key] for key in flat.keys() - defaults.flatten(older).keys()}
    assert added and added.items() <= defaults.flatten(defaults.base()).items()
    assert "training.grad_accumulation" in added


def test_complete_keeps_the_lock():
    config = ConfigDict({"model": {"nf": 16}})
    assert not defaults.complete(config).is_locked
    locked = defaults.complete(config.lock())
    assert locked.is_locked and locked.model.is_locked and locked.eval.is_locked
    assert defaults.complete(FrozenConfigDict(config)).model.nf == 16


def test_complete_refuses_a_section_that_is_a_value():
    with pytest.raises(ValueError, match="model must be a section"):
        defaults.complete(ConfigDict({"model": "ncsnpp"}))


@pytest.mark.parametrize("name", defaults.experiments())
def test_every_experiment_passes_its_own_checks(name):
    config = defaults.load(name)
    assert defaults.check_keys(config) == []
    assert defaults.complete(config).to_dict() == config.to_dict()


@pytest.mark.parametrize(
    ("slip", "meant"),
    [
        ("training.continuouse", "training.continuous"),
        ("optim.warmpu", "optim.warmup"),
        ("model.num_res_block", "model.num_res_blocks"),
        ("trainnig.batch_size", "training.batch_size"),
        ("sed", "seed"),
    ],
)
def test_slips_are_named_with_what_was_meant(slip, meant):
    config = with_option(defaults.load("vp/digits"), slip, 1)
    with pytest.raises(ValueError, match=f"'{slip}': did you mean '{meant}'"):
        defaults.check_keys(config)


def test_names_that_resemble_nothing_are_returned():
    config, own = defaults.load("vp/digits"), ["mine.snr2", "model.sigma_begin", "note"]
    for key in own:
        with_option(config, key, 1)
    assert defaults.check_keys(config) == own


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


def test_configs_need_no_torch_and_work_from_any_folder(tmp_path):
    code = f"""
import sys
sys.path[0] = {str(ROOT)!r}  # as for `python {ROOT.name}/main.py`
from configs import defaults
assert defaults.known_keys()
heavy = [m for m in ("torch", "numpy", "tensorflow") if m in sys.modules]
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
