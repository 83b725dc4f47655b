"""`config.device` is a device that every PyTorch call takes, however it was set and copied."""

import argparse
import copy
import json
import pickle

import pytest
import torch
from ml_collections import ConfigDict, FrozenConfigDict
from small_runs import command, run, small_config

import run_lib
import utils
from configs.defaults import base, load
from models.utils import create_model
from sampling import get_pc_sampler
from score_lib.base.devices import resolve_device
from score_lib.options import checked, complete
from sde_lib import VPSDE

pytestmark = pytest.mark.gpu

HERE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

COPIES = {
    "itself": lambda config: config,
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda config: pickle.loads(pickle.dumps(config)),
    "lock": lambda config: config.lock(),
    "resolved": lambda config: config.copy_and_resolve_references(),
    "frozen": FrozenConfigDict,
    "another type": ConfigDict,
    "dict": lambda config: ConfigDict(config.to_dict()),
    "namespace": lambda config: argparse.Namespace(**dict(config.items())),
    "complete": complete,
    "checked": lambda config: checked(config)[0],
    "of a namespace": lambda config: complete(argparse.Namespace(**config.to_dict())),
}


@pytest.mark.parametrize("how", COPIES)
def test_every_copy_has_a_device(how):
    config = COPIES[how](load("vp/digits"))
    x = torch.zeros(2).to(config.device)
    assert x.device.type == HERE.type
    assert torch.zeros(1, device=config.device).device == x.device
    assert resolve_device(config.device) == HERE


@pytest.mark.parametrize("device", ("meta", torch.device("meta"), "cuda:1", torch.device("cuda:1")))
def test_names_and_devices_can_be_set(device):
    for config in (base(), base().lock(), complete({"device": device})):
        config.device = device
        assert config.device == config["device"] == config.get("device") == str(device)
        read = torch.device(device)
        assert torch.device(config.device) == read
        assert (config.device.type, config.device.index) == (read.type, read.index)
        assert json.loads(config.to_json_best_effort())["device"] == str(device)
        assert complete(config).device == str(device)
    config = base()
    config.update_from_flattened_dict({"device": device})
    assert config.device == str(device)
    config = base()
    config.update({"device": device})
    assert config.device == str(device)


def test_more_processes_than_gpus_are_told(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    for device in ("auto", "cuda"):
        with pytest.raises(ValueError, match=r"2 processes on a machine of 1 GPUs.*=cpu"):
            resolve_device(device)
    with pytest.raises(ValueError, match="'cuda:1' does not exist"):
        resolve_device("cuda:1")


def test_configs_merge():
    config, other = base(), base()
    other.update(device="meta", seed=3)
    config.update(other)
    assert config.device == "meta" and config.seed == 3


def test_files_keep_the_choice_of_a_machine():
    config = complete(complete(load("vp/digits")))
    assert json.loads(config.to_json_best_effort())["device"] == "auto"
    assert json.loads(config.to_json())["device"] == "auto"


def test_published_calls_take_it(tmp_path):
    config = small_config()
    state = run_lib.setup(config).state
    utils.save_checkpoint(tmp_path / "c.pth", state)
    for device in (config.device, "auto"):
        assert utils.restore_checkpoint(tmp_path / "c.pth", state, device)["step"] == 0
        assert next(create_model(config, device).parameters()).device.type == HERE.type
        settings = VPSDE(N=2), (1, 1, 8, 8), None, None, lambda x: x, 0.1
        sampler = get_pc_sampler(*settings, continuous=True, device=device)
        assert sampler(state["model"])[0].device.type == HERE.type


def test_a_wrong_name_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"unknown device 'gpu': try 'auto', 'cpu'"):
        create_model(small_config(device="gpu"))


def test_a_device_that_holds_no_numbers_is_refused():
    with pytest.raises(ValueError, match=r"device 'meta' cannot compute here: try 'auto', 'cpu'"):
        create_model(small_config(device="meta"))


def test_a_device_without_float64_is_refused(monkeypatch):
    def zeros(*shape, dtype=torch.float32, device):
        if dtype == torch.float64:
            raise TypeError("no float64 on this device")
        return torch.ones(1)

    monkeypatch.setattr(torch, "zeros", zeros)
    with pytest.raises(ValueError, match=r"device 'mps' cannot compute here.*no float64"):
        resolve_device("mps")


def test_a_cpu_has_no_number(tmp_path):
    """PyTorch writes it into files, and does not know it when it reads them."""
    state = run_lib.setup(small_config(device="cpu:0")).state
    utils.save_checkpoint(tmp_path / "c.pth", state)
    assert utils.restore_checkpoint(tmp_path / "c.pth", state, "cpu:0")["step"] == 0


@pytest.mark.slow
def test_it_is_set_on_the_command_line(tmp_path):
    done = run(command(workdir=tmp_path, device="cpu", training__n_iters=1))
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "config.json").read_text())["device"] == "cpu"
