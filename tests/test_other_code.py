"""Programs of other code bases run on our modules as they are."""

import os
import pathlib
import subprocess
import sys

import pytest
from small_runs import ROOT, command, run

HERE = pathlib.Path(__file__).parent


def program(code, *path, arguments=()):
    """The output of a program with these folders first on its path."""
    folders = os.pathsep.join(map(str, [*path, ROOT]))
    done = subprocess.run(
        [sys.executable, *code, *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": folders},
        cwd=path[0],
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.mark.slow
def test_a_project_with_modules_of_its_own(tmp_path):
    said = program(["main.py"], HERE / "other_code", HERE, arguments=[tmp_path])
    assert said.endswith("done\n"), said


@pytest.mark.slow
def test_a_package_that_holds_the_project(tmp_path):
    """Its modules are loaded under two names in one process."""
    (tmp_path / "pkg").symlink_to(ROOT)
    code = """
import torch
import pkg.models.ncsnpp, models.ncsnpp
import pkg.op, op, pkg.sampling, sampling, pkg.sde_lib, sde_lib
from pkg.configs.vp.digits import get_config

config = get_config()
config.model.nf = 8
networks = [m.utils.create_model(config, "cpu").eval() for m in (pkg.models, models)]
networks[0].load_state_dict(networks[1].state_dict())
x, t = torch.rand(1, 1, 8, 8), torch.ones(1)
assert torch.equal(networks[0](x, t), networks[1](x, t))
sde = pkg.sde_lib.VPSDE(N=25)
scores = [m.utils.get_score_fn(sde, n, continuous=True) for m, n in
          zip((pkg.models, models), networks)]
assert torch.equal(scores[0](x, t), scores[1](x, t))
"""
    assert program(["-c", code], tmp_path) == ""


@pytest.mark.slow
def test_a_config_of_the_users_own_beside_ours(tmp_path):
    """In a folder of the names of ours, with a module beside it."""
    folder = tmp_path / "configs" / "ve"
    folder.mkdir(parents=True)
    (folder / "my_sizes.py").write_text("nf = 8\n")
    (folder / "mine.py").write_text(
        "from configs.default_cifar10_configs import get_default_configs\n"
        "from configs.vp import digits\n"
        "import my_sizes\n\n"
        "def get_config():\n"
        "    assert get_default_configs().data.dataset == 'CIFAR10'\n"
        "    config = digits.get_config()\n"
        "    config.model.nf = my_sizes.nf\n"
        "    return config\n"
    )
    work = tmp_path / "run"
    once = {"training__n_iters": 1, "training__snapshot_sampling": False}
    done = run(command(folder / "mine.py", workdir=work, **once), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (work / "checkpoints-meta/checkpoint.pth").exists()
