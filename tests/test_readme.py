"""The README's examples run, and what it names exists."""

import pathlib
import re

import pytest
import torch
from oracles import GaussianOracle
from small_runs import small_config

import run_lib
import sampling
from configs.defaults import experiments
from losses import get_sde_loss_fn
from score_lib.likelihood import get_log_likelihood_fn
from sde_lib import get_sde

ROOT = pathlib.Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)


def example(mark):
    """The names that the example holding a mark defines."""
    (code,) = [code for code in EXAMPLES if mark in code]
    names = {}
    exec(compile(code, "README.md", "exec"), names)
    return names


def test_every_experiment_is_in_the_table():
    rows = re.findall(r"^\| `((?:ve|vp|subvp)/[^`]*)` \|", TEXT, flags=re.MULTILINE)
    assert sorted(rows) == experiments()


def test_links_and_commands_exist():
    for path in re.findall(r"!?\[[^\]]*\]\((?!http)([^)]*)\)", TEXT):
        assert (ROOT / path).exists(), path
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", TEXT, flags=re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target
    for module in re.findall(r"python -m ([\w.]+)", TEXT):
        assert (ROOT / module.replace(".", "/")).with_suffix(".py").exists(), module


def test_own_process_works_everywhere():
    cls = example("class CosineVPSDE")["CosineVPSDE"]
    assert get_sde("cosine_vpsde") is cls
    sde = cls(N=200)
    t = torch.linspace(0.05, 0.95, 50, dtype=torch.float64)
    var, d_var = torch.func.jvp(
        lambda t: sde.marginal_coeffs(t)[1] ** 2, (t,), (torch.ones_like(t),)
    )
    torch.testing.assert_close(d_var, 2 * sde.drift_rate(t) * var + sde.diffusion(t) ** 2)
    oracle, shape = GaussianOracle(sde), (2000, 2)
    torch.manual_seed(0)
    samplers = [
        sampling.get_pc_sampler(
            sde,
            shape,
            sampling.get_predictor(predictor),
            corrector and sampling.get_corrector(corrector),
            lambda x: x,
            0.05,
            continuous=True,
        )
        for predictor in ("euler_maruyama", "reverse_diffusion")
        for corrector in (None, "langevin", "ald")
    ] + [sampling.get_ode_sampler(sde, shape, lambda x: x)]
    for sampler in samplers:
        x, _ = sampler(oracle)
        assert x.mean() == pytest.approx(oracle.mu, abs=0.05)
        assert x.std() == pytest.approx(oracle.s0, abs=0.05)
    x = oracle.mu + oracle.s0 * torch.randn(500, 2)
    expected = torch.distributions.Normal(oracle.mu, oracle.s0).log_prob(x).sum(1)
    found = get_log_likelihood_fn(sde)(oracle, x).total
    assert found.mean() == pytest.approx(float(expected.mean()), abs=0.02)
    assert get_sde_loss_fn(sde, train=False)(oracle, x).isfinite()


def test_own_process_predictor_and_corrector_train_by_config(tmp_path):
    example("class CosineVPSDE"), example("class ExponentialIntegrator")
    config = small_config(
        training__sde="cosine_vpsde",
        sampling__predictor="exponential_integrator",
        sampling__corrector="small_langevin",
        training__n_iters=2,
        training__snapshot_freq=2,
    )
    run_lib.train(config, tmp_path)
    assert (tmp_path / "samples" / "iter_2" / "sample.png").exists()


def test_own_predictor_and_corrector_keep_the_distribution():
    names = example("class ExponentialIntegrator")
    sde = get_sde("vpsde")(N=300)
    oracle = GaussianOracle(sde)
    torch.manual_seed(0)
    for corrector in (None, names["SmallLangevin"]):
        predictor = names["ExponentialIntegrator"]
        sampler = sampling.get_pc_sampler(
            sde, (4000, 2), predictor, corrector, lambda x: x, 0.05, continuous=True
        )
        x, _ = sampler(oracle)
        assert x.mean() == pytest.approx(oracle.mu, abs=0.03)
        assert x.std() == pytest.approx(oracle.s0, abs=0.03)


def test_library_example_runs():
    names = example("get_ode_sampler(sde, (4, 2)")
    assert names["samples"].shape == (4, 2) and names["evaluations"] > 10
    # Data N(0, I) in two dimensions cost log2(sqrt(2 pi e) 256) bits a dimension on average.
    assert names["bits_per_dim"].mean() == pytest.approx(10, abs=1.5)
    assert names["score"].shape == (4, 2)


def test_control_example_does_what_it_says():
    names = example("get_pc_inpainter(")
    left, images = slice(None, 4), names["images"]
    # The known half has the noise level at which sampling ends.
    torch.testing.assert_close(names["filled"][..., left], images[..., left], rtol=0, atol=1e-5)
    assert names["filled"][..., 4:].std() == pytest.approx(1, abs=0.4)
    again = names["operator"].apply(names["restored"])
    assert (again - names["y"]).std() < 0.3 < names["y"].std()
    torch.testing.assert_close(names["decoded"][::2], images[:2], rtol=0, atol=2e-3)


def test_own_constraints_hold():
    """A known mean leaves the rest of independent Gaussian entries as it is."""
    names = example("class KnownMean")
    sde = names["VPSDE"](N=300)
    target, oracle = torch.tensor(1.5), GaussianOracle(sde)
    torch.manual_seed(0)
    mean = names["KnownMean"](target)
    x, _ = names["make_sampler"](sde, (4000, 5), [mean])(oracle)
    torch.testing.assert_close(x.mean(1), torch.full((4000,), 1.5), rtol=1e-3, atol=0)
    spread = (x - x.mean(1, keepdim=True)).square().mean().sqrt()
    assert spread == pytest.approx(oracle.s0 * (4 / 5) ** 0.5, rel=0.05)
    towards = names["Towards"](torch.tensor([3.0, 0, 0, 0, 0]), 0.5)
    both, _ = names["make_sampler"](sde, (4000, 5), [towards, mean])(oracle)
    assert both[:, 0].mean() > x[:, 0].mean() + 0.1
    torch.testing.assert_close(both.mean(1), x.mean(1), rtol=1e-3, atol=0)


def test_published_checkpoint_example(tmp_path, monkeypatch):
    """The example with a small network in place of the large one."""
    from score_lib.disk.checkpoints import save_checkpoint

    monkeypatch.setattr(
        "configs.ve.cifar10_ncsnpp_continuous.get_config", lambda: small_config("ve/digits")
    )
    names = example("def load(path)")
    names["run"].state["step"] = 7
    save_checkpoint(tmp_path / "c.pth", names["run"].state)
    names["run"].state["step"] = 0
    assert names["load"](tmp_path / "c.pth")["step"] == 7
