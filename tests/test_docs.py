"""The pages name only things that exist, their commands parse, and their examples run."""

import ast
import importlib
import pathlib
import re
import shlex
import sys

import pytest
import torch
from absl import flags
from diffusers_helpers import DDPM, PIPELINES, recorded_folder
from ml_collections import config_flags
from networks import fill_weights
from oracles import GaussianOracle
from small_runs import small_config
from torch.distributed.run import get_args_parser

import controllable_generation
import main
import run_lib
import sampling
from configs.defaults import base, experiments, load
from datasets import get_data_inverse_scaler
from likelihood import get_log_likelihood_fn
from losses import get_sde_loss_fn
from models.adm import UNetModel
from models.foreign import load_diffusers
from models.utils import create_model, get_model
from score_lib.base.tensors import batch_mul
from score_lib.disk import snapshots
from score_lib.options import flatten
from score_lib.runs import reproduce
from score_lib.runs.dequantizer import DEQUANTIZER
from score_lib.runs.start import META
from sde_lib import VPSDE, CosineVPSDE, get_sde
from utils import save_checkpoint

ROOT = pathlib.Path(__file__).parents[1]
PAGES = {
    file.relative_to(ROOT).as_posix(): file.read_text(encoding="utf-8")
    for file in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
}
SECTIONS = [key for key, value in base().to_dict().items() if isinstance(value, dict)]
# Options of the examples' own classes.
OWN_OPTIONS = {"model.cosine_end", "sampling.place_in_step"}


def blocks(language):
    """(page, text) of each code block of a language."""
    pattern = rf"^```{language}\n(.*?)^```"
    return [
        (page, block)
        for page, text in PAGES.items()
        for block in re.findall(pattern, text, flags=re.DOTALL | re.MULTILINE)
    ]


def simple_commands():
    """(page, words) of each simple command in the shell blocks."""
    for page, block in blocks("sh"):
        lexer = shlex.shlex(block.replace("\\\n", " ").replace("\n", " ; "), punctuation_chars=";|")
        lexer.whitespace_split, lexer.commenters = True, ""
        words = []
        for word in [*lexer, ";"]:
            if set(word) <= set(";|"):
                if words:
                    yield page, words
                words = []
            else:
                words.append(word)


def commands_of(*program):
    """(page, words after it) of each command in which a program is called."""
    size = len(program)
    return [
        (page, words[i + size :])
        for page, words in COMMANDS
        for i in range(len(words))
        if tuple(words[i : i + size]) == program
    ]


COMMANDS = list(simple_commands())


def example(page, mark):
    """The names that the example holding a mark defines."""
    (code,) = [code for name, code in blocks("python") if name == page and mark in code]
    names = {"__name__": "example"}
    exec(compile(code, page, "exec"), names)
    return names


def test_readme_fits_a_skim():
    assert (ROOT / "README.md").stat().st_size <= 8192
    first_screen = "\n".join(PAGES["README.md"].splitlines()[:30])
    assert "Not measured" in first_screen and "GPU" in first_screen


def test_every_experiment_is_in_the_table():
    rows = re.findall(
        r"^\| `((?:ve|vp|subvp|edm|adm)/[^`]*)` \|",
        PAGES["docs/experiments.md"],
        flags=re.MULTILINE,
    )
    assert sorted(rows) == experiments()


def test_readme_leads_to_every_page():
    linked = {page for page in PAGES if f"]({page})" in PAGES["README.md"]}
    names = {page: pathlib.PurePosixPath(page).name for page in PAGES.keys() - linked}
    further = {p for p, name in names.items() if any(f"]({name})" in PAGES[q] for q in linked)}
    assert linked | further | {"README.md"} == set(PAGES)


@pytest.mark.parametrize("page", PAGES)
def test_links_exist(page):
    for link in re.findall(r"\]\((?!http)([^)]*)\)", PAGES[page]):
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.*)", target.read_text(), flags=re.MULTILINE)
            names = [re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings]
            assert anchor in names, link


@pytest.mark.parametrize("page", PAGES)
def test_files_in_the_text_exist(page):
    folders = "score_lib|models|op|configs|tests|benchmarks|examples|assets|docs"
    for path in re.findall(rf"`((?:{folders})/[\w/.]*)`", PAGES[page]):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("page", PAGES)
def test_options_in_the_text_exist(page):
    known = OWN_OPTIONS.union(*(flatten(load(name)) for name in experiments()), flatten(base()))
    pattern = rf"(?<![\w.])(?:config\.)?((?:{'|'.join(SECTIONS)})\.[a-z]\w*)\b(?!\()"
    for name in re.findall(pattern, PAGES[page]):
        section, _, attribute = name.partition(".")
        if name not in known and attribute not in ("py", "md", "json"):
            assert section == "sampling" and hasattr(sampling, attribute), name


def test_options_of_tables_exist():
    """Tables whose head says "options in `section`" name options without their section."""
    known = {"sampling": base().sampling, "control": base().control}
    known["sampling"].update(predictor="", corrector="")  # set by every experiment
    places = {"docs/samplers.md": "sampling", "docs/control.md": "control"}
    for page, section in places.items():
        (table,) = re.findall(
            rf"\| options in `{section}` \|\n((?:\|.*\n)+)", PAGES[page], flags=re.MULTILINE
        )
        names = re.findall(r"`([\w]+)`", " ".join(row.split("|")[3] for row in table.splitlines()))
        values = {"half", "box", "random_mask", "super_resolution", "blur", "projection"}
        assert set(names) <= set(known[section]) | values


def test_every_folder_of_a_run_is_in_the_table():
    rows = re.findall(r"^\| `([\w-]+)/.*", PAGES["docs/reliability.md"], flags=re.MULTILINE)
    own = {snapshots.FOLDER, DEQUANTIZER.parts[0], reproduce.FOLDER, META.parts[0]}
    of_modes = {"checkpoints", "control", "ema", "eval", "export", "samples", "stats"}
    assert set(rows) == own | of_modes


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    targets = [rest[0] for _, rest in commands_of("make")]
    targets += re.findall(r"`make ([\w-]+)", "".join(PAGES.values()))
    assert {"demo", "test", "faults"} <= set(targets)
    for target in targets:
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


def test_versions_of_python_are_those_of_the_requirements():
    core, makefile = ((ROOT / name).read_text() for name in ("requirements-core.txt", "Makefile"))
    words, first, last = re.search(r"Python 3\.(\d+) to 3\.(\d+)", core).group(0, 1, 2)
    assert words in PAGES["README.md"] and words in makefile
    assert f"(3, {first}) <= sys.version_info < (3, {int(last) + 1})" in makefile


def test_modules_and_their_options_exist():
    known = commands_of("python", "-m")
    assert len(known) > 8
    shared = (ROOT / "benchmarks/variants.py").read_text()
    for page, (module, *rest) in known:
        place = ROOT / module.replace(".", "/")
        file = place / "__main__.py" if place.is_dir() else place.with_suffix(".py")
        assert file.exists(), f"{page}: {module}"
        for option in re.findall(r"--\w+", " ".join(rest)):
            assert f'"{option}"' in file.read_text() + shared, f"{page}: {module} {option}"


def parsed(words, monkeypatch):
    """The flags that `main.py` reads from a command line."""
    assert all(word.startswith("--") or "=" not in word for word in words), words
    monkeypatch.setattr(sys, "argv", ["main.py", *words])
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=values)
    values["config"].parser = main.ConfigFile()
    flags.DEFINE_enum("mode", None, main.MODES, "", flag_values=values)
    for name in ("workdir", "eval_folder"):
        assert name in main.FLAGS
        flags.DEFINE_string(name, None, "", flag_values=values)
    assert values(sys.argv) == ["main.py"]
    return values


@pytest.mark.parametrize("page, words", commands_of("main.py"))
def test_commands_of_main_parse(page, words, monkeypatch):
    words = words[: words.index("]")] if "]" in words else words
    monkeypatch.chdir(ROOT)
    values = parsed(words, monkeypatch)
    assert values.mode and (values.workdir or values.mode in ("fid_stats", "check"))
    for option in re.findall(r"--config\.([\w.]+)", " ".join(words)):
        assert option in flatten(base()) or option in flatten(values.config), option


def test_unknown_options_are_found(monkeypatch):
    monkeypatch.chdir(ROOT)
    command = ["--config", "configs/vp/digits.py", "--mode", "train"]
    parsed(command, monkeypatch)
    for wrong in ("--config.model.nfs=3", "--config.model.nf=many", "--flder=a"):
        with pytest.raises((AttributeError, TypeError, ValueError, flags.Error)):
            parsed([*command, wrong], monkeypatch)


@pytest.mark.parametrize("page, words", commands_of("torchrun"))
def test_commands_of_torchrun_parse(page, words):
    words = [re.sub(r"\$\w+", "2", word) for word in words]
    given = get_args_parser().parse_args(words)
    assert given.training_script == "main.py"


def test_public_names_in_the_text_exist():
    for names, module in re.findall(
        r"^\| (.*?) \| `([a-z_.]+)` \|", PAGES["docs/extending.md"], flags=re.MULTILINE
    ):
        for name in re.findall(r"`(\w+)`", names):
            assert hasattr(importlib.import_module(module), name), name
    text = PAGES["docs/control.md"].split("## From Python")[1].split("```")[0]
    for name in set(re.findall(r"`(\w+)`", text)) - {"controllable_generation"}:
        assert hasattr(controllable_generation, name), name


def test_every_example_compiles():
    assert len(blocks("python")) >= 9
    for page, code in blocks("python"):
        ast.parse(code, page)


# Examples.


def test_config_example_is_the_published_experiment():
    config = example("docs/experiments.md", "def get_config")["get_config"]()
    assert flatten(config) == flatten(load("ve/cifar10_ncsnpp_continuous"))


def test_adm_config_example():
    config = example("docs/experiments.md", "adm(config")["config"]
    with torch.device("meta"):
        assert len(get_model(config.model.name)(config).output_blocks) == 16


@pytest.mark.slow
def test_adm_example_is_the_published_network():
    with torch.device("meta"):
        network = example("docs/experiments.md", "def adm_256")["adm_256"]()
    assert sum(parameter.numel() for parameter in network.parameters()) == 553_838_086


def test_adm_checkpoint_example(tmp_path):
    """The example with small networks in place of the large one."""
    names = example("docs/experiments.md", "def adm_256")
    ours, theirs = (
        UNetModel(8, 3, 32, 6, 1, (), channel_mult=(1,), num_classes=4) for _ in range(2)
    )
    torch.save(fill_weights(theirs).state_dict(), tmp_path / "a.pt")
    names["load"].__globals__["adm_256"] = lambda: ours
    loaded = names["load"](tmp_path / "a.pt")
    assert not loaded.training
    torch.testing.assert_close(dict(loaded.state_dict()), dict(theirs.state_dict()))


def test_adm_guidance_example():
    """The size of the published classifier, which is told steps of the chain."""
    names = example("docs/experiments.md", "def classifier_256")
    with torch.device("meta"):
        classifier = names["classifier_256"]()
    assert sum(parameter.numel() for parameter in classifier.parameters()) == 54_096_360
    told, sde, t = [], CosineVPSDE(1000, continuous=False), torch.tensor([0.5, 0.25])
    classifier.forward = lambda x, labels: told.append(labels) or x[:, :, 0, 0]
    guidance = names["guidance"](classifier, torch.tensor([1, 2]))
    guidance.guide(sde, lambda x, t: x)(torch.randn(2, 3, 4, 4), t)
    torch.testing.assert_close(told[0], torch.tensor([499.0, 249.0]), rtol=0, atol=0.03)


def test_adm_sampling_example():
    """With the noise of images of one grey level per class, those images come out."""
    sde, levels = VPSDE(N=200), torch.tensor([-0.5, 0.0, 0.5])

    class Network:
        image_size = 4

        def __call__(self, x, labels, y):
            scale, std = sde.discrete_coeffs(labels.long())
            noise = batch_mul(1 / std, x - batch_mul(scale, batch_mul(levels[y], x**0)))
            return torch.cat([noise, torch.full_like(noise, -1.0)], dim=1)

    images = example("docs/experiments.md", "def adm_256")["draw"](
        Network(), torch.tensor([2, 0, 1]), sde, "20"
    )
    assert images.shape == (3, 3, 4, 4)
    expected = torch.tensor([0.75, 0.25, 0.5])
    torch.testing.assert_close(images.mean((1, 2, 3)), expected, atol=0.02, rtol=0)


def test_published_checkpoint_example(tmp_path, monkeypatch):
    """The example with a small network in place of the large one."""
    monkeypatch.setattr(
        "configs.ve.cifar10_ncsnpp_continuous.get_config", lambda: small_config("ve/digits")
    )
    names = example("README.md", "def load(path)")
    names["run"].state["step"] = 7
    save_checkpoint(tmp_path / "c.pth", names["run"].state)
    names["run"].state["step"] = 0
    assert names["load"](tmp_path / "c.pth")["step"] == 7
    images = names["draw"](3)
    assert images.shape == (3, 1, 8, 8) and torch.equal(names["draw"](3), images)


def test_library_example():
    names = example("README.md", "get_ode_sampler(sde, (4, 2)")
    assert names["samples"].shape == (4, 2) and names["evaluations"] > 10
    # Data N(0, I) in two dimensions cost log2(sqrt(2 pi e) 256) bits a dimension on average.
    assert names["bits_per_dim"].mean() == pytest.approx(10, abs=1.5)


def test_time_grid_example():
    names = example("docs/samplers.md", "callback=")
    times, means = zip(*names["path"], strict=True)
    assert len(times) == 60 and times[0] == 1 and list(times) == sorted(times, reverse=True)
    assert torch.equal(means[-1], names["samples"]) and names["evaluations"] == 120
    assert names["samples"].std() == pytest.approx(1, abs=0.3)


def test_control_example():
    names = example("docs/control.md", "get_pc_inpainter(")
    left, images = slice(None, 4), names["images"]
    # The known half has the noise level at which sampling ends.
    torch.testing.assert_close(names["filled"][..., left], images[..., left], rtol=0, atol=1e-5)
    assert names["filled"][..., 4:].std() == pytest.approx(1, abs=0.4)
    again = names["operator"].apply(names["restored"])
    assert (again - names["y"]).std() < 0.3 < names["y"].std()
    torch.testing.assert_close(names["decoded"][::2], images[:2], rtol=0, atol=2e-3)


def samplers_for(sde, shape):
    """Predictor-corrector samplers of every kind, and the ODE's."""
    for predictor in ("euler_maruyama", "reverse_diffusion"):
        for corrector in (None, "langevin", "ald"):
            classes = sampling.get_predictor(predictor), corrector
            if corrector:
                classes = classes[0], sampling.get_corrector(corrector)
            yield sampling.get_pc_sampler(sde, shape, *classes, lambda x: x, 0.05, continuous=True)
    yield sampling.get_ode_sampler(sde, shape, lambda x: x)


def test_process_example_works_everywhere():
    cls = example("docs/extending.md", "class PlainCosineSDE")["PlainCosineSDE"]
    assert get_sde("plain_cosine") is cls
    sde = cls(N=200)
    t = torch.linspace(0.05, 0.95, 50, dtype=torch.float64)
    var, d_var = torch.func.jvp(
        lambda t: sde.marginal_coeffs(t)[1] ** 2, (t,), (torch.ones_like(t),)
    )
    torch.testing.assert_close(d_var, 2 * sde.drift_rate(t) * var + sde.diffusion(t) ** 2)
    oracle = GaussianOracle(sde)
    torch.manual_seed(0)
    for sampler in samplers_for(sde, (2000, 2)):
        x, _ = sampler(oracle)
        assert x.mean() == pytest.approx(oracle.mu, abs=0.05)
        assert x.std() == pytest.approx(oracle.s0, abs=0.05)
    x = oracle.mu + oracle.s0 * torch.randn(500, 2)
    expected = torch.distributions.Normal(oracle.mu, oracle.s0).log_prob(x).sum(1)
    found = get_log_likelihood_fn(sde)(oracle, x).total
    assert found.mean() == pytest.approx(float(expected.mean()), abs=0.02)
    assert get_sde_loss_fn(sde, train=False)(oracle, x).isfinite()


def test_process_predictor_and_corrector_examples_train_by_config(tmp_path):
    example("docs/extending.md", "class PlainCosineSDE")
    example("docs/extending.md", "class ExponentialIntegrator")
    config = small_config(
        training__sde="plain_cosine",
        model__cosine_end=0.98,
        sampling__predictor="exponential_integrator",
        sampling__corrector="small_langevin",
        training__n_iters=2,
        training__snapshot_freq=2,
    )
    assert run_lib.setup(config).sde.T == 0.98
    run_lib.train(config, tmp_path)
    assert (tmp_path / "samples" / "iter_2" / "sample.png").exists()


@pytest.mark.parametrize("grid", [{}, {"steps": 150, "grid": "log_snr"}], ids=["chain", "log_snr"])
def test_predictor_and_corrector_examples_keep_the_distribution(grid):
    names = example("docs/extending.md", "class ExponentialIntegrator")
    sde = VPSDE(N=300)
    oracle = GaussianOracle(sde)
    torch.manual_seed(0)
    for corrector in (None, names["SmallLangevin"]):
        classes = names["ExponentialIntegrator"], corrector
        sampler = sampling.get_pc_sampler(
            sde, (4000, 2), *classes, lambda x: x, 0.05, continuous=True, **grid
        )
        x, _ = sampler(oracle)
        assert x.mean() == pytest.approx(oracle.mu, abs=0.03)
        assert x.std() == pytest.approx(oracle.s0, abs=0.03)


def test_solver_example_is_of_second_order():
    example("docs/extending.md", "class Midpoint")
    sde = VPSDE()
    oracle, z = GaussianOracle(sde), torch.randn(500, 3, generator=torch.manual_seed(0))

    def draw(method, steps, **options):
        config = small_config(
            sampling__method=method, sampling__num_steps=steps, sampling__noise_removal=False
        )
        for key, value in options.items():
            config.sampling[key] = value
        scaler = get_data_inverse_scaler(config)
        return sampling.get_sampling_fn(config, sde, z.shape, scaler, 1e-3)(oracle, z)

    exact, _ = draw("heun", 400, time_grid="log_snr")
    errors = [
        (draw("midpoint", n, time_grid="log_snr", place_in_step=0.5)[0] - exact).abs().mean()
        for n in (20, 40)
    ]
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.25)
    _, evaluations = draw("midpoint", 20, place_in_step=0.5)
    assert evaluations == 40


def test_grid_example_is_an_option():
    grid = example("docs/extending.md", "def quadratic")["quadratic"]
    sde = VPSDE()
    found = []
    for options in ({"sampling__time_grid": "quadratic"}, {}):
        config = small_config(sampling__method="ddim", sampling__num_steps=3, **options)
        sampler = sampling.get_sampling_fn(config, sde, (2, 3), lambda x: x, 0.04)
        found.append(sampler(GaussianOracle(sde), torch.ones(2, 3))[0])
    assert not torch.allclose(*found, atol=0.01)
    torch.testing.assert_close(
        grid(sde, 1.0, 0.04, 2), torch.tensor([1.0, 0.36, 0.04], dtype=torch.float64)
    )


def test_constraint_examples_hold():
    """A known mean leaves the rest of independent Gaussian entries as it is."""
    names = example("docs/extending.md", "class KnownMean")
    sde = VPSDE(N=300)
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


def test_conditional_network_example():
    example("docs/conditions.md", "taken_by(config)")
    config = load("vp/digits_conditional")
    config.model.name = "mine"
    assert create_model(config).takes.null == {"classes": 10}


def test_measurement_example():
    operator = example("docs/extending.md", "class EveryOther")["EveryOther"]((1, 2, 4))
    x = torch.arange(8.0).reshape(1, 1, 2, 4)
    y = controllable_generation.measure(operator, x, noise_std=0.0)
    assert operator.pinv(y).flatten().tolist() == [0, 0, 2, 0, 4, 0, 6, 0]


@pytest.fixture
def pipelines(tmp_path):
    """Tiny folders of Diffusers: of NCSN++ in the two layouts, and of DDPM."""
    layouts = [PIPELINES / layout for layout in ("subfolders", "flat_legacy")]
    scheduler = {**DDPM, "clip_sample": False}
    return [*layouts, recorded_folder(tmp_path / "ddpm", "ddpm_a", scheduler)]


def test_diffusers_examples(pipelines, tmp_path):
    names = example("docs/exchange.md", "def give_back")
    ncsnpp, flat, ddpm = pipelines
    for folder, changes in ((ncsnpp, names["FEW_NCSNPP"]), (ddpm, names["FEW_DDPM"])):
        images, evaluations = names["sample"](folder, 2, changes, device="cpu")
        assert images.shape == (2, 3, 8, 8) and evaluations == 20
    images = torch.full((2, 3, 8, 8), 0.5)
    loose = {"device": "cpu", "rtol": 10.0, "atol": 10.0}
    assert names["bits_per_dim"](ncsnpp, images[:1], **loose).shape == (1,)
    mask = torch.ones(1, 1, 8, 8)
    mask[..., 4:] = 0
    filled = names["inpaint"](ncsnpp, images, mask, steps=3, device="cpu")
    torch.testing.assert_close(filled[..., :4], images[..., :4], rtol=0, atol=0.05)
    for folder in (flat, ddpm):
        names["give_back"](folder, tmp_path / "back")
        (_, sde, facts), (_, again, found) = (
            load_diffusers(at, "cpu") for at in (folder, tmp_path / "back")
        )
        assert repr(again) == repr(sde) and found["sampling"] == facts["sampling"]
