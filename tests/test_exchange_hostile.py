"""Hostile folders of Diffusers are refused in one sentence; nothing in them is run."""

from __future__ import annotations

import json
import math
import os
import pathlib
import pickle
import re
import shutil
import struct

import pytest
import torch
from diffusers_helpers import DDPM, VE, a_folder, drawn_for

from models.foreign import load_diffusers
from models.utils import create_model
from score_lib.disk.safetensors_files import read_safetensors, write_safetensors
from score_lib.exchange import diffusers

HUGE = 10**9
TINY = {
    "sample_size": 4,
    "block_out_channels": [4, 4],
    "layers_per_block": 1,
    "down_block_types": ["DownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "UpBlock2D"],
    "norm_num_groups": 2,
    "attention_head_dim": 2,
}
# Options of the network, each alone in place of a right one.
CONFIGS = [
    {"block_out_channels": [HUGE, HUGE]},
    {"block_out_channels": [65536, 65536]},
    {"block_out_channels": [4, 4 * 16000]},
    {"block_out_channels": [4] * 10**5, "down_block_types": ["DownBlock2D"] * 10**5},
    {"block_out_channels": []},
    {"block_out_channels": 4},
    {"block_out_channels": "44"},
    {"block_out_channels": [4, None]},
    {"block_out_channels": [4, -4]},
    {"block_out_channels": [4, 0]},
    {"block_out_channels": [4, 4.0]},
    {"block_out_channels": [4, [4]]},
    {"block_out_channels": [4, True]},
    {"block_out_channels": {"0": 4}},
    {"block_out_channels": [4, 6]},
    {"block_out_channels": [4, 4, 4]},
    {"layers_per_block": HUGE},
    {"layers_per_block": 64},
    {"layers_per_block": 0},
    {"layers_per_block": -1},
    {"layers_per_block": "1"},
    {"layers_per_block": None},
    {"sample_size": None},
    {"sample_size": HUGE},
    {"sample_size": 0},
    {"sample_size": 5},
    {"sample_size": [4]},
    {"sample_size": [4, 4, 4]},
    {"sample_size": [4, -4]},
    {"sample_size": True},
    {"in_channels": HUGE, "out_channels": HUGE},
    {"in_channels": 65536, "out_channels": 65536},
    {"in_channels": 1},
    {"out_channels": 6},
    {"norm_num_groups": 3},
    {"norm_num_groups": 0},
    {"norm_num_groups": None},
    {"norm_num_groups": HUGE},
    {"norm_eps": 0},
    {"norm_eps": -1},
    {"norm_eps": "1e-5"},
    {"norm_eps": 10**400},
    {"attention_head_dim": 3},
    {"attention_head_dim": 0},
    {"attention_head_dim": -8},
    {"dropout": 2},
    {"dropout": []},
    {"freq_shift": 7},
    {"flip_sin_to_cos": "yes"},
    {"center_input_sample": 1},
    {"time_embedding_type": "learned"},
    {"time_embedding_type": ["positional"]},
    {"time_embedding_dim": HUGE},
    {"down_block_types": ["../../evil", "DownBlock2D"]},
    {"down_block_types": ["DownBlock2D"]},
    {"down_block_types": [["DownBlock2D"], {}]},
    {"down_block_types": ["SkipDownBlock2D", "DownBlock2D"]},
    {"up_block_types": ["AttnUpBlock2D", "UpBlock2D"]},
    {"up_block_types": None},
    {"downsample_padding": 2},
    {"mid_block_scale_factor": 2},
    {"mid_block_type": None},
    {"mid_block_scale_factor": None},
    {"act_fn": "os.system"},
    {"act_fn": {"silu": 1}},
    {"class_embed_type": "timestep"},
    {"num_class_embeds": HUGE},
    {"num_class_embeds": 65536},
    {"num_class_embeds": [10]},
    {"add_attention": 1},
    {"resnet_time_scale_shift": "scale_shift"},
    {"attn_norm_num_groups": 4},
    {"code": "import os"},
    {"_class_name": "UNet2DConditionModel"},
    {"_class_name": ["UNet2DModel"]},
]
SCHEDULERS = [
    {**VE, "_class_name": "PNDMScheduler"},
    {**VE, "_class_name": ["ScoreSdeVeScheduler"]},
    {**VE, "num_train_timesteps": HUGE},
    {**VE, "num_train_timesteps": 0},
    {**VE, "sigma_max": 1e-3},
    {**VE, "sigma_min": 0},
    {**VE, "sigma_min": "0.01"},
    {**VE, "sampling_eps": 1},
    {**VE, "correct_steps": HUGE},
    {**VE, "snr": None},
    {**DDPM, "beta_schedule": "scaled_linear"},
    {**DDPM, "trained_betas": [0.1] * 1000},
    {**DDPM, "beta_end": 1e-9},
    {**DDPM, "beta_end": 2},
    {**DDPM, "variance_type": "learned"},
    {**DDPM, "prediction_type": "flow"},
    {**DDPM, "rescale_betas_zero_snr": True},
]
INDICES = [
    {"_class_name": "StableDiffusionPipeline"},
    {"_class_name": ["DDPMPipeline"]},
    {"_class_name": "DDPMPipeline", "unet": ["../../evil", "UNet2DModel"]},
    {"_class_name": "DDPMPipeline", "../../evil": ["diffusers", "UNet2DModel"]},
    {"_class_name": "DDPMPipeline", "unet": "UNet2DModel"},
    {"unet": ["diffusers", "UNet2DModel"]},
]
FILES = ("model_index.json", "unet/config.json", "scheduler/scheduler_config.json")
TABLES = dict(zip(FILES, (INDICES, [TINY | change for change in CONFIGS], SCHEDULERS), strict=True))
# Whole files.
TEXTS = [b"", b"[]", b"{", b"[" * 10**5, b"{" * 10**5, b"\xff\xfe", b"null", b'"unet"']
TEXTS += [b'{"x": NaN}', b'{"x": 1e999}', b'{"x": ' + b"9" * 10**5 + b"}", b" " * (1 << 20) + b"{}"]
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


def encoded(table):
    return json.dumps(table).encode()


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A right folder."""
    folder = tmp_path_factory.mktemp("folders") / "good"
    a_folder(folder, TINY, drawn_for(TINY), VE, "ScoreSdeVePipeline")
    return folder


@pytest.fixture
def folder(good, tmp_path):
    return pathlib.Path(shutil.copytree(good, tmp_path / "folder"))


def refused(folder):
    """The sentence that refuses a folder."""
    with pytest.raises(ValueError) as caught:
        load_diffusers(folder, "cpu")
    message = str(caught.value)
    assert str(folder) in message and len(message) <= 1000 and message.isprintable()
    return message


@pytest.mark.parametrize("name", FILES)
def test_descriptions(name, folder, monkeypatch):
    """Of the index, the network and the scheduler: 134 variants, and none makes a large network."""

    def build(config, device):
        assert sum(config.model.ch_mult) * config.model.nf * config.model.num_res_blocks < 100
        return create_model(config, device)

    monkeypatch.setattr(diffusers, "create_model", build)
    right = (folder / name).read_bytes()
    for contents in [*map(encoded, TABLES[name]), *TEXTS]:
        (folder / name).write_bytes(contents)
        refused(folder)
    (folder / name).write_bytes(right)
    load_diffusers(folder, "cpu")


def test_another_scheduler_is_refused_for_its_class(folder):
    """Not for an infinity, which files of DPM-Solver hold."""
    text = b'{"_class_name": "DPMSolverMultistepScheduler", "lambda_min_clipped": -Infinity}'
    (folder / FILES[2]).write_bytes(text)
    assert 'describes a "DPMSolverMultistepScheduler", and only ScoreSde' in refused(folder)


@pytest.mark.parametrize("name", FILES[1:])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_options_are_finite(name, value, folder):
    right = json.loads((folder / name).read_bytes())
    for option, known in right.items():
        if isinstance(known, int | float):
            (folder / name).write_text(json.dumps({**right, option: value}))
            assert f"has {option} = {json.dumps(value)}" in refused(folder)


# --- Weights -----------------------------------------------------------------------------------


class Shout:
    """Runs code where it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return pathlib.Path.touch, (pathlib.Path(self.path),)


def replaced(folder, contents):
    """Put a pickled file of weights in place of the right one."""
    weights = folder / WEIGHTS
    weights.unlink()
    torch.save(contents, weights.with_suffix(".bin"))


def test_pickles_run_nothing(folder, tmp_path):
    stored, _ = read_safetensors(folder / WEIGHTS)
    name, first = next(iter(stored.items()))
    replaced(folder, stored)
    load_diffusers(folder, "cpu")
    wide = torch.zeros(1).expand(2**40)
    evil = Shout(tmp_path / "run")
    for contents in (
        *({**stored, name: value} for value in (evil, wide, first.tolist(), first[None], None)),
        *(evil, [], [stored], {}, {"state_dict": stored}, stored | {7: first}, first),
    ):
        torch.save(contents, folder / "unet/diffusion_pytorch_model.bin")
        refused(folder)
    for protocol in (0, 4):
        pickled = pickle.dumps({name: evil}, protocol)
        (folder / "unet/diffusion_pytorch_model.bin").write_bytes(pickled)
        refused(folder)
    assert not (tmp_path / "run").exists()
    pickle.loads(pickled)
    assert (tmp_path / "run").exists()


def test_tensors(folder):
    stored, _ = read_safetensors(folder / WEIGHTS)
    name = "mid_block.attentions.0.to_q.weight"
    right = stored[name]
    old = name.replace("to_q", "query")
    hole = right.clone()
    hole[0, 0] = math.nan
    for changes, reason in (
        ({name: None}, "1 are missing"),
        ({name: None, "../" + name: right}, "1 are missing .* 1 are not in the network"),
        ({"more": right}, "1 are not in the network"),
        ({old: right}, "1 are twice"),
        ({name: right[:, :2]}, "1 are of another shape"),
        ({name: hole}, "other than finite numbers"),
        ({name: right.long()}, "other than finite numbers"),
    ):
        tensors = {k: v for k, v in {**stored, **changes}.items() if v is not None}
        write_safetensors(folder / WEIGHTS, tensors)
        assert re.search(reason, refused(folder)), changes
    write_safetensors(folder / WEIGHTS, {k: v.half() for k, v in stored.items()})
    model, _, facts = load_diffusers(folder, "cpu")
    assert facts["dtype"] == "float16" and next(model.parameters()).dtype == torch.float32


def test_headers_whose_places_overlap(folder):
    whole = (folder / WEIGHTS).read_bytes()
    size = int.from_bytes(whole[:8], "little")
    table = json.loads(whole[8 : 8 + size])
    name = "conv_in.bias"
    start, end = table[name]["data_offsets"]
    for places in ([start - 16, end - 16], [start + 2**40, end + 2**40], [0, 2**60], [end, start]):
        table[name]["data_offsets"] = places
        header = json.dumps(table).encode()
        (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(header)) + header + whole[8 + size :])
        assert refused(folder)
    for damaged in (b"", whole[:-1], whole + b"0", b"\xff" * 8 + whole[8:], bytes(len(whole))):
        (folder / WEIGHTS).write_bytes(damaged)
        refused(folder)


# --- Files -------------------------------------------------------------------------------------


def test_files_that_are_none(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        load_diffusers(tmp_path / "nowhere", "cpu")
    path = folder / "unet/config.json"
    right = path.read_bytes()
    path.unlink()
    for make, undo in (
        (lambda: None, lambda: None),
        (path.mkdir, path.rmdir),
        (lambda: os.mkfifo(path), path.unlink),
        (lambda: path.symlink_to(path), path.unlink),
        (lambda: path.symlink_to("/dev/zero"), path.unlink),
        (lambda: path.symlink_to("../unet"), path.unlink),
    ):
        make()
        refused(folder)
        undo()
    elsewhere = tmp_path / "blob"
    elsewhere.write_bytes(right)
    path.symlink_to(elsewhere)  # as in a cache of downloads
    load_diffusers(folder, "cpu")
    shutil.rmtree(folder / "unet")
    (folder / "unet").symlink_to(folder / "unet")
    assert "cannot be opened" in refused(folder)
