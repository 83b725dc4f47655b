"""`pip install .`: the installed project works from any folder."""

import os
import shutil
import subprocess
import sys

import pytest
from small_runs import ROOT, run

CHECK = """
import importlib, pathlib, sys
import configs.vp.digits, run_lib
for name in sys.argv[2].split():
    module = importlib.import_module(name)
    assert pathlib.Path(module.__file__).is_relative_to(sys.argv[1]), module.__file__
from evaluation import get_extractor, load_dataset_stats
from op.build import SOURCE
config = run_lib.setup(configs.vp.digits.get_config()).config
assert len(load_dataset_stats(config)["pool_3"]) > 1000
get_extractor(config, "cpu")
assert SOURCE.is_file()
"""


@pytest.mark.slow
def test_installed_modules_and_their_files_are_found(tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    left_out = {".git", ".venv", "build", "docs", "runs", "score_sde.egg-info"}
    shutil.copytree(ROOT, source, ignore=lambda at, _: left_out if at == str(ROOT) else ())
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    result = run([*pip, "--no-build-isolation", "--target", str(target), str(source)])
    assert result.returncode == 0, result.stderr
    assert not {"tests", "benchmarks", "examples"} & {path.name for path in target.iterdir()}
    doors = [path.stem for path in ROOT.glob("*.py")]
    result = subprocess.run(
        [sys.executable, "-c", CHECK, str(target), " ".join(doors)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(target)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
