"""The table of options: configs are completed and checked by it, and every option is used."""

from __future__ import annotations

import argparse
import ast
import fractions
import functools
import json
import re
import sys
import types

import numpy as np
import pytest
from ml_collections import ConfigDict, FieldReference, FrozenConfigDict, config_dict
from small_runs import ROOT

import run_lib
from configs import defaults
from models.utils import get_model, register_model
from score_lib.base.registry import Registry
from score_lib.metrics.configured import extractor_name
from score_lib.option_table import NEEDED, SECTIONS, TABLE, NoDefault
from score_lib.options import checked, complete, flatten, page
from score_lib.samplers.configured import follows_flow

PUBLISHED = json.loads((ROOT / "tests/data/published_configs.json").read_text())
DEFAULTS = {
    key: option.default
    for key, option in TABLE.items()
    if not isinstance(option.default, NoDefault)
}


def digits(**changes) -> dict:
    """A config with changes by dotted names, __ for the dot."""
    config = defaults.load("vp/digits").to_dict()
    config["sampling"].update(method="pc", num_steps=500)
    for key, value in changes.items():
        *section, name = key.split("__")
        (config.setdefault(section[0], {}) if section else config)[name] = value
    return config


# --- The table ---------------------------------------------------------------------------------


def test_every_option_has_a_meaning_and_a_default_that_it_takes():
    for key, option in TABLE.items():
        assert 0 < len(option.meaning) < 90 and option.meaning[-1] != ".", key
        assert option.check.allowed, key
        assert key not in DEFAULTS or option.check.accepts(option.default), key


def test_base_is_all_defaults():
    assert flatten(defaults.base()) == DEFAULTS


def test_the_page_shows_the_table():
    text = (ROOT / "docs/options.md").read_text()
    assert text == page(), "python -m score_lib.options > docs/options.md writes it anew"
    assert all(text.count(f"| `{key}` |") == 1 for key in TABLE)


def test_known_names_are_those_of_the_registries():
    """Those of our own entries: other tests register more."""
    rooms = ("score_lib.", "models.")
    registries = [
        {name for name in value if value.get(name).__module__.startswith(rooms)}
        for module in list(sys.modules.values())
        if module.__name__.startswith(rooms)
        for value in vars(module).values()
        if isinstance(value, Registry)
    ]
    ours = {frozenset(option.check.names) for option in TABLE.values()}
    assert run_lib and len(registries) > 8
    assert [sorted(names) for names in registries if names not in ours] == []


# --- Completing --------------------------------------------------------------------------------


def test_complete_adds_what_is_missing_and_keeps_the_rest():
    older = ConfigDict(PUBLISHED["vp/cifar10_ddpmpp"])
    older.eval.begin_ckpt = 3
    older.mine = ConfigDict({"snr2": 1.0})
    before = older.to_dict()
    full = complete(older)
    assert older.to_dict() == before
    given, flat = flatten(older), flatten(full)
    assert flat.items() >= given.items()
    assert {key: flat[key] for key in flat.keys() - given.keys()}.items() <= DEFAULTS.items()
    assert flat.keys() >= DEFAULTS.keys()
    assert complete(full) == full


SMALL = {"model": {"nf": 16, "dropout": 0.3}, "data": {"image_size": (8, 4)}, "seed": 7}


class Settings:
    """A config that is a class of classes."""

    seed = 7

    class model:
        nf, dropout = 16, 0.3

    class data:
        image_size = (8, 4)

    def describe(self):
        """A method is no option."""


CONFIGS = {
    "ConfigDict": ConfigDict(SMALL),
    "FrozenConfigDict": FrozenConfigDict(SMALL),
    "dict": SMALL,
    "mapping": types.MappingProxyType(SMALL),
    "Namespace": argparse.Namespace(
        model=argparse.Namespace(**SMALL["model"]), data=SMALL["data"], seed=7
    ),
    "object": Settings(),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_configs_of_any_kind_are_completed(kind):
    full = complete(CONFIGS[kind])
    given = {"model.nf": 16, "model.dropout": 0.3, "data.image_size": (8, 4), "seed": 7}
    assert flatten(full) == {**DEFAULTS, **given}
    assert isinstance(full.eval, ConfigDict)


def test_numbers_of_other_libraries_become_plain_ones():
    """JSON knows no others; a checkpoint's config is JSON."""
    given = {"data": {"image_size": (np.int64(8), 4)}, "seed": np.int16(7), "model": {}}
    given["model"] |= {"nf": np.int32(16), "dropout": np.float32(0.5), "ch_mult": [np.int64(2)]}
    full = complete({**given, "optim": {"lr": fractions.Fraction(1, 4), "beta1": np.float64(0)}})
    found = flatten(full)
    expected = {"data.image_size": (8, 4), "seed": 7, "model.nf": 16, "model.dropout": 0.5}
    expected |= {"model.ch_mult": [2], "optim.lr": 0.25, "optim.beta1": 0.0}
    for key, value in expected.items():
        assert found[key] == value and type(found[key]) is type(value), key
    assert type(found["data.image_size"][0]) is int
    assert json.loads(full.to_json())["model"]["nf"] == 16


def test_names_in_any_case_are_the_known_ones():
    """The classifier of digits is the extractor of data.dataset = 'digits', too."""
    others = {"data__dataset": "digits", "training__sde": "VPSDE", "sampling__method": "DDIM"}
    full = complete(digits(**others, sampling__predictor="mine", control__name="Pigdm"))
    assert (full.data.dataset, full.training.sde) == ("DIGITS", "vpsde")
    assert (full.sampling.predictor, full.control.name) == ("mine", "Pigdm")
    assert extractor_name(full) == "digits" and follows_flow(digits(**others))


def test_files_may_lie_in_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    config = complete(digits(eval__stats="~/a.npz", model__weights="~/b.pth", eval__ema="none"))
    assert (config.eval.stats, config.model.weights) == ("/home/me/a.npz", "/home/me/b.pth")
    assert (config.eval.ema, config.export.folder) == ("none", "")


@pytest.mark.parametrize("name", ("mlp", "MLP"))
def test_a_name_that_published_code_does_not_have_is_free_for_others(name, caplog):
    """Several projects register a network `mlp`; published names stay taken."""
    known = Registry("model")
    known.register(int, name="mlp", yields=True)
    known.register(int, name="mlp", yields=True)  # a module that is loaded twice
    assert known.get("mlp") is int and not caplog.records
    known.register(float, name=name)
    assert known.get("mlp") is float and "is now <class 'float'>, not <class 'int'>" in caplog.text
    with pytest.raises(ValueError, match=r"already registered|differs only in case"):
        known.register(str, name="mlp")


@pytest.mark.parametrize("name", ("ncsnpp", "ddpm", "ncsn", "ncsnv2_64"))
def test_published_names_of_networks_stay_taken(name):
    own = get_model(name)
    with pytest.raises(ValueError, match="already registered"):
        register_model(int, name=name)
    assert get_model(name) is own


def test_names_that_differ_only_in_case_are_refused():
    known = Registry("solver")
    known.register(dict, name="mine")
    known.register(dict, name="mine")
    with pytest.raises(ValueError, match="solver 'Mine' differs only in case from 'mine'"):
        known.register(dict, name="Mine")


def test_references_are_read_and_required_placeholders_named():
    config = defaults.load("vp/digits")
    with config.unlocked():
        config.device = FieldReference("cpu")
        config.optim.lr = config_dict.required_placeholder(float)
        config.mine = {"order": config_dict.required_placeholder(int)}
    assert config.device == "cpu"
    with pytest.raises(ValueError, match=r"^mine\.order, optim\.lr: a required placeholder"):
        complete(config)
    config.optim.lr = 0.5
    config.mine.order = 3
    assert complete(config).optim.lr == 0.5


def test_complete_keeps_the_lock():
    config = ConfigDict(SMALL)
    assert not complete(config).is_locked
    locked = complete(config.lock())
    assert locked.is_locked and locked.model.is_locked and locked.eval.is_locked


@pytest.mark.parametrize("config", ({"model": "ncsnpp"}, {"eval": None}, None, "vp/digits"))
def test_a_section_holds_options(config):
    with pytest.raises(ValueError, match="should be a section of options"):
        complete(config)


# --- Checking ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("slip", "meant"),
    [
        ("training__continuouse", "training.continuous"),
        ("optim__warmpu", "optim.warmup"),
        ("model__num_res_block", "model.num_res_blocks"),
        ("trainnig__batch_size", "training.batch_size"),
        ("sed", "seed"),
        ("training__lr", "optim.lr"),
        ("eval__num_steps", "sampling.num_steps"),
        ("data__seed", "seed"),
        ("dropout", "model.dropout"),
    ],
)
def test_slips_are_named_with_what_was_meant(slip, meant):
    with pytest.raises(ValueError, match=f"'{slip.replace('__', '.')}'.*'{meant}'"):
        checked(digits(**{slip: 1}))


def test_names_that_resemble_no_other_are_returned():
    _, unknown = checked(digits(mine__snr2=1, model__sigma_begin=1, note=1))
    assert unknown == ["mine.snr2", "model.sigma_begin", "note"]


def test_only_options_that_nothing_reads_are_told(monkeypatch, caplog):
    """An option of one's own that feeds a process, a solver or another entry is read."""
    monkeypatch.setattr(Registry, "fed_by", set())
    Registry("process").register(int, name="mine", options={"end": "model.sigma_end"})
    run_lib.setup(digits(model__sigma_end=1, model__sigma_begin=1))
    assert [r.getMessage().split()[-1] for r in caplog.records] == ["model.sigma_begin"]


@pytest.mark.parametrize(
    ("method", "told"), [("ode", ["num_steps = 20"]), ("pc", ["respacing = '50'"]), ("heun", [])]
)
def test_steps_that_count_for_nothing_are_told(method, told, caplog):
    """Experiments set them for their own method; another one may have been chosen since."""
    steps = {"sampling__num_steps": 20} | ({"sampling__respacing": "50"} if method == "pc" else {})
    run_lib.setup(digits(sampling__method=method, **steps))
    said = [r.getMessage() for r in caplog.records if "counts for nothing" in r.getMessage()]
    assert said == [f"sampling.{one} counts for nothing in samples by {method!r}" for one in told]


@pytest.mark.parametrize("key", [key for key, option in TABLE.items() if option.default is NEEDED])
def test_needed_options_are_missed(key):
    config = digits()
    section, name = key.split(".")
    del config[section][name]
    with pytest.raises(ValueError, match=f"no {key}"):
        checked(config)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"training__batch_size": 0}, "training.batch_size = 0 .*at least 1"),
        ({"training__batch_size": True}, "a whole number"),
        ({"training__batch_size": 1.5}, "a whole number"),
        ({"training__continuous": 1}, "True or False"),
        ({"optim__lr": "fast"}, "'fast' .*a number above 0"),
        ({"optim__lr": float("nan")}, "nan .*above 0"),
        ({"optim__lr": {}}, r"optim.lr = \{\} should be a number"),
        (
            {"optim__lr": {"rate": 0.1}, "training__batch_size": {}},
            r"batch_size = \{\} .*; optim.lr = \{'rate': 0.1\} s",
        ),
        ({"eval__hutchinson_type": "uniform"}, "'uniform' should be 'Rademacher', 'Gaussian' or"),
        ({"optim__lr": float("inf")}, "inf .*above 0"),
        ({"optim__grad_clip": float("nan")}, "grad_clip = nan"),
        ({"optim__beta1": 1}, "from 0 to below 1"),
        ({"optim__grad_clip": 10**400}, "a number other than 0"),
        ({"optim__warmup": 10**30}, "a whole number"),
        ({"seed": 2**64}, "a whole number"),
        ({"model__ch_mult": ()}, "one or more"),
        ({"model__ch_mult": (1, 0)}, "above 0"),
        ({"model__ch_mult": (0.5, 1)}, r"model.ch_mult = \(0.5, 1\) should be whole numbers"),
        ({"model__ch_mult": 3}, "3 .*one or more"),
        ({"data__image_size": (8, 8, 3)}, "or two of them"),
        ({"data__path": 3}, "a text"),
        ({"eval__bpd_dataset": "val"}, "'train' or 'test'"),
        ({"control__box": (0.5, 0, 2, 2)}, "several whole numbers"),
        ({"model__init_scale": -1}, "init_scale = -1 should be a number, at least 0"),
        ({"control__temperatures": ()}, "one or more numbers, at least 0"),
        ({"control__temperatures": (-1,)}, "one or more numbers, at least 0"),
        ({"sampling__method": None}, "None .*'pc', .*'heun'"),
        ({"training__n_iters": 0, "training__log_freq": 0}, "n_iters = 0.*; .*log_freq = 0"),
    ],
)
def test_wrong_values_are_named_with_the_allowed_ones(changes, words):
    with pytest.raises(ValueError, match=words):
        checked(digits(**changes))


OUT_OF_RANGE = {
    "at least 1": [
        ("training.batch_size", -8),
        ("training.n_iters", 0),
        ("training.log_freq", 0),
        ("training.eval_freq", 0),
        ("training.snapshot_freq", 0),
        ("training.snapshot_freq_for_preemption", -1),
        ("training.grad_accumulation", 0),
        ("sampling.num_samples", 0),
        ("eval.num_samples", 0),
        ("model.nf", 0),
        ("model.num_scales", 0),
    ],
    "at least 0": [("data.num_workers", -1), ("optim.warmup", -1)],
    "other than 0": [("optim.grad_clip", 0), ("optim.grad_clip", 0.0)],
    "above 0": [("optim.lr", -1), ("optim.eps", 0.0), ("sampling.adaptive_rtol", 0.0)],
    "from 0 to": [
        ("optim.beta1", 1.0),
        ("model.ema_rate", 1.5),
        ("model.dropout", -0.1),
        ("training.keep_meta_checkpoints", 10),
    ],
    "'bfloat16'": [("training.precision", "half"), ("sampling.precision", "")],
    "'reduce-overhead'": [("sampling.compile", "yes")],
    "'train'": [("eval.bpd_dataset", ""), ("eval.dataset", "val")],
}


@pytest.mark.parametrize("allowed", OUT_OF_RANGE)
def test_ranges(allowed):
    for key, value in OUT_OF_RANGE[allowed]:
        with pytest.raises(ValueError, match=f"{key} = .*{allowed}"):
            checked(digits(**{key.replace(".", "__"): value}))


@pytest.mark.parametrize(
    "changes",
    [
        {"data__image_size": (8, 4)},
        {"optim__lr": 1},
        {"model__ch_mult": [1, 2]},
        {"training__sde": "my_process"},
        {"sampling__time_grid": "edm", "sampling__method": "pc"},
        {"sampling__predictor": "reverse_diffusion", "sampling__num_steps": 20},
        {
            "training__continuous": False,
            "model__parametrization": "v",
            "training__weighting": "min_snr",
        },
    ],
)
def test_values_that_are_allowed(changes):
    checked(digits(**changes))


FEW_STEPS = {"model__num_scales": 20, "sampling__num_steps": 0}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"training__objective": "classifier"}, "num_classes.*snapshot_sampling"),
        ({"sampling__predictor": "none"}, "'pc' with .* leave the noise as it is"),
        ({"model__scale_by_sigma": True}, "noise level of the VE process.*'vpsde'"),
        ({"eval__enable_accuracy": True}, "needs training.objective = 'classifier', not 'score'"),
        ({"training__grad_accumulation": 200}, "at most training.batch_size"),
        ({"training__n_jitted_steps": 3}, "log_freq.*multiple of"),
        (
            {"training__continuous": False, "training__noise_levels": "lognormal"},
            "noise_levels = 'lognormal' needs training.continuous = True",
        ),
        (
            {"model__name": "ncsn", "model__parametrization": "edm"},
            "'ncsn' looks its noise level up by an index",
        ),
        ({"training__weighting": "output"}, "needs a model.parametrization"),
        (
            {"training__weighting": "min_snr", "training__likelihood_weighting": True},
            "excludes training.likelihood_weighting",
        ),
        (
            {"model__parametrization": "v", "model__scale_by_sigma": True},
            "scale_by_sigma = True divides",
        ),
        (
            {"model__parametrization": "edm", "model__embedding_type": "fourier"},
            "fourier_log = False, or model.embedding_type = 'positional'",
        ),
        (
            {"training__continuous": False, "model__embedding_type": "fourier"},
            "is 0 at the first level .* model.fourier_log = False",
        ),
        (
            {
                "training__objective": "classifier",
                "data__num_classes": 10,
                "training__snapshot_sampling": False,
                "eval__enable_bpd": False,
                "eval__enable_sampling": False,
                "model__parametrization": "v",
            },
            "should be '' for a classifier",
        ),
        (
            {
                "training__objective": "classifier",
                "data__num_classes": 10,
                "training__likelihood_weighting": True,
            },
            "likelihood_weighting = True should be False for a classifier",
        ),
        (
            {"training__sde": "vesde", "model__name": "ncsnv2_64"},
            "'ncsnv2_64' looks its noise level up .* is told sigma",
        ),
        (
            {"training__sde": "vesde", "model__scale_by_sigma": True},
            "reads its label as an index, .* it is sigma",
        ),
        (
            {
                "training__sde": "vesde",
                "model__scale_by_sigma": True,
                "model__embedding_type": "fourier",
                "model__fourier_log": False,
                "training__continuous": False,
            },
            "reads its label as sigma, .* it is an index",
        ),
        (
            {
                "training__condition": "features",
                "training__condition_dropout": 0.1,
                "data__augment": 0.1,
            },
            "has nothing to drop",
        ),
        ({"sampling__classes": (3,)}, r"sampling.classes = \(3,\) needs a network that is told"),
        (
            {
                "sampling__classes": ("cat", 10),
                "training__condition": "classes",
                "data__num_classes": 10,
            },
            r"sampling.classes = \('cat', 10\) should be classes .* from 0 to 9",
        ),
        ({**FEW_STEPS, "training__continuous": False}, "20 steps are too few"),
        ({**FEW_STEPS, "sampling__predictor": "reverse_diffusion"}, "20 steps are too few"),
        (
            {**FEW_STEPS, "sampling__num_steps": 50, "sampling__corrector": "langevin"},
            "20 steps are too few",
        ),
    ],
)
def test_options_that_exclude_each_other(changes, words):
    with pytest.raises(ValueError, match=words):
        checked(digits(**changes))


# --- Options in the source ---------------------------------------------------------------------


@functools.cache
def source_nodes() -> list[ast.AST]:
    """The source of everything that may read a config, without the table itself."""
    folders = ("score_lib", "models", "op", "examples", "benchmarks")
    files = [*ROOT.glob("*.py"), *(f for name in folders for f in (ROOT / name).rglob("*.py"))]
    trees = [ast.parse(file.read_text()) for file in files if file.name != "option_table.py"]
    return [node for tree in trees for node in ast.walk(tree)]


def option_of(node: ast.AST) -> str | None:
    """The dotted name in `config.section.name` and `self.config.section.name`."""
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Attribute):
        source = ast.unparse(node.value.value)
        if source == "config" or source.endswith(".config"):
            return f"{node.value.attr}.{node.attr}"
    return None


def test_every_option_is_used():
    nodes = source_nodes()
    reads = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    texts = {node.value for node in nodes if isinstance(node, ast.Constant)}
    unused = [key for key in TABLE if key not in texts and key.split(".")[-1] not in reads | texts]
    assert not unused


def test_every_option_that_is_used_is_in_the_table():
    sections = {section for section, _, _ in SECTIONS if section}
    dotted = re.compile(rf"({'|'.join(sections)})\.(?!np[yz]$|png$)[a-z_0-9]+")  # no file names
    nodes = source_nodes()
    used = {option_of(node) for node in nodes}
    used |= {
        node.value
        for node in nodes
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and dotted.fullmatch(node.value)
    }
    methods = set(dir(ConfigDict))
    used = {k for k in used if k and k.split(".")[0] in sections and k.split(".")[1] not in methods}
    assert len(used) > 60
    assert sorted(used - TABLE.keys()) == []


def test_no_option_is_read_with_a_default():
    names = {key.split(".")[-1] for key in TABLE}
    reads = [
        ast.unparse(node)
        for node in source_nodes()
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == "get"
        and re.search(r"(config|options)(\.\w+)?$", ast.unparse(node.func.value))
        and isinstance(node.args[0], ast.Constant)
        and node.args[0].value in names
    ]
    assert reads == []
