"""Several processes give the results of one."""

import atexit
import datetime
import json
import multiprocessing
import os
import pathlib
import re
import signal
import time
import types
import warnings
import weakref

import numpy as np
import pytest
import torch
from processes import free_port, together
from small_runs import few_digits, logged, small_config
from torch.distributed.fsdp import fully_shard

import losses
import main
import run_lib
from evaluation import load_statistics
from losses import get_sde_loss_fn, get_step_fn, optimization_manager
from models.ema import ExponentialMovingAverage
from score_lib.base import distributed, preemption
from score_lib.base.preemption import Preempted
from score_lib.disk.checkpoints import read_checkpoint
from score_lib.runs.evaluate import Job
from score_lib.scores import get_model_fn
from sde_lib import VPSDE

pytestmark = pytest.mark.slow  # whole runs

NO_DROPOUT = {"model__dropout": 0.0}


def weights(folder, name="checkpoints-meta/checkpoint.pth"):
    checkpoint = read_checkpoint(folder / name)
    averages = enumerate(checkpoint["ema"]["shadow_params"])
    return checkpoint["model"] | {f"average {k}": average for k, average in averages}


def assert_same_weights(folder, expected, **tolerance):
    torch.testing.assert_close(weights(folder), weights(expected), **tolerance)


LONG = {
    **NO_DROPOUT,
    "training__n_iters": 50,
    "training__batch_size": 32,
    "training__snapshot_freq": 50,
    "training__snapshot_freq_for_preemption": 50,
    "optim__warmup": 10,
}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The folder of a run of one process, in 50 steps."""
    folder = tmp_path_factory.mktemp("alone")
    run_lib.train(small_config(**LONG), folder)
    return folder


@pytest.mark.parametrize("world, parts", ((2, 4),))
def test_training_gives_the_weights_and_the_log_of_one_process(world, parts, alone, tmp_path):
    config = small_config(**LONG, training__grad_accumulation=parts)
    assert together(world, run_lib.train, config, tmp_path) == [None] * world
    assert_same_weights(tmp_path, alone, rtol=0, atol=1e-4)
    ours, theirs = logged(tmp_path), logged(alone)
    assert [r.keys() for r in ours] == [r.keys() for r in theirs]
    for one, other in zip(ours, theirs, strict=True):
        assert list(one.values()) == pytest.approx(list(other.values()), rel=1e-3)
    samples = [np.load(f / "samples/iter_50/sample.np").astype(int) for f in (tmp_path, alone)]
    assert abs(samples[0] - samples[1]).max() <= 16  # a grey level of seventeen
    assert json.loads((tmp_path / "config.json").read_text())["model"]["nf"] == 8


def test_the_number_of_processes_may_change_between_runs(alone, tmp_path):
    for world, until in ((4, 10), (1, 20), (2, 50)):
        config = small_config(**{**LONG, "training__n_iters": until})
        assert together(world, run_lib.train, config, tmp_path) == [None] * world
    assert read_checkpoint(tmp_path / "checkpoints-meta/checkpoint.pth")["position"] == 50 * 32
    assert_same_weights(tmp_path, alone, rtol=0, atol=1e-4)


@pytest.mark.parametrize("experiment", ("vp/digits_classifier", "vp/digits_conditional"))
def test_labels_are_shared_out_with_their_images(experiment, tmp_path):
    changes = {**NO_DROPOUT, "training__n_iters": 6, "training__snapshot_sampling": False}
    run_lib.train(small_config(experiment, **changes), tmp_path / "one")
    config = small_config(experiment, **changes)
    assert together(2, run_lib.train, config, tmp_path / "two") == [None, None]
    assert_same_weights(tmp_path / "two", tmp_path / "one", rtol=0, atol=1e-4)


def test_a_network_with_idle_parameters_is_trained_by_several(tmp_path):
    """Those of the layers for the noise level, in a network that is not told it."""
    changes = {**NO_DROPOUT, "model__conditional": False, "optim__warmup": 100}
    for folder, until in (("one", 12), ("two", 12), ("resumed", 6), ("resumed", 12)):
        config = small_config(**changes, training__n_iters=until, training__snapshot_sampling=False)
        if folder == "two":
            assert together(2, run_lib.train, config, tmp_path / folder) == [None, None]
        else:
            run_lib.train(config, tmp_path / folder)
    assert_same_weights(tmp_path / "two", tmp_path / "one", rtol=0, atol=1e-4)
    assert_same_weights(tmp_path / "resumed", tmp_path / "one", rtol=0, atol=0)
    start = run_lib.setup(config).state["model"]
    for folder in ("one", "two", "resumed"):
        file = read_checkpoint(tmp_path / folder / "checkpoints-meta/checkpoint.pth")
        idle = [n for n, (key, _) in enumerate(start.named_parameters()) if "Dense_0" in key]
        assert idle and not file["optimizer"]["state"].keys() & set(idle)
        for key, value in start.named_parameters():
            changed = not torch.equal(file["model"][f"module.{key}"], value)
            assert changed is ("Dense_0" not in key), key


class _Spare(torch.nn.Module):
    """A user's own network, with parameters that have no effect."""

    def __init__(self, told):
        super().__init__()
        self.layer, self.spare = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)
        if told:
            self.has_idle_parameters = True

    def forward(self, x, labels):
        return self.layer(x)


def with_a_search(model):
    """A user's own way to share gradients, which finds idle parameters itself."""
    return torch.nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)


def steps_of_spare(told, parts, prepare=distributed.replicated):
    """Weights after two steps, and how many parameters the optimiser has moved."""
    torch.manual_seed(0)
    model = _Spare(told)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    manager = optimization_manager(small_config(optim__lr=0.1, optim__warmup=0))
    step = get_step_fn(VPSDE(), True, manager, accumulation=parts, prepare=prepare)
    state = {"model": model, "optimizer": optimizer, "step": 0, "ema": _NoAverage()}
    for seed in range(2):
        torch.manual_seed(seed)
        step(state, distributed.share(torch.ones(8, 3)))
    return model.layer.weight.tolist(), len(optimizer.state)


def test_a_network_of_ones_own_tells_of_idle_parameters():
    weight, moved = steps_of_spare(False, 1)
    assert moved == 2
    results = together(2, steps_of_spare, True, 2)
    for found, others_moved in results + together(2, steps_of_spare, False, 1, with_a_search):
        assert others_moved == 2 and found == [pytest.approx(row, abs=1e-5) for row in weight]
    for error in together(2, steps_of_spare, False, 2):
        with pytest.raises(ValueError, match=r"2 parameters .* 'spare\.weight', .* = True in the"):
            raise error


def step_of(layer, parts, prepare=distributed.replicated):
    """A training step of a network with a layer, on this process's share of a batch."""
    model = _Scores(torch.nn.Sequential(torch.nn.Linear(3, 3), layer))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    manager = optimization_manager(small_config())
    step = get_step_fn(VPSDE(), True, manager, accumulation=parts, prepare=prepare)
    state = {"model": model, "optimizer": optimizer, "step": 0, "ema": _NoAverage()}
    step(state, distributed.share(torch.ones(8, 3)))


class _Frozen(torch.nn.BatchNorm1d):
    """As it is in a network that others have trained."""

    def train(self, mode=True):
        return super().train(False)


def without_statistics(model):
    model.layer[1] = torch.nn.Identity()
    return model


def test_statistics_of_a_part_of_a_batch_are_refused():
    seen = torch.nn.BatchNorm1d(3)
    step_of(seen, 1)
    step_of(seen, 2, without_statistics)
    for error in together(2, step_of, seen, 1):
        with pytest.raises(ValueError, match=r"BatchNorm1d 'layer\.1' .*processes: 2, .*: take"):
            raise error
    for layer in (seen, torch.nn.SyncBatchNorm(3)):
        with pytest.raises(ValueError, match=r"BatchNorm.* training\.grad_accumulation = 2\)"):
            step_of(layer, 2)
    assert together(2, step_of, _Frozen(3), 2) == [None, None]


def clipped_step():
    """Weights and gradient norm after a step from a gradient that must be clipped as a whole."""
    config = small_config(optim__grad_clip=1e-3, optim__warmup=0)
    model = torch.nn.Linear(3, 3)
    torch.nn.init.ones_(model.weight)
    torch.nn.init.zeros_(model.bias)
    scores = _Scores(model)
    optimizer = torch.optim.SGD(scores.parameters(), lr=1.0)
    step = get_step_fn(VPSDE(), True, optimization_manager(config), reduce_mean=True)
    state = {"model": scores, "optimizer": optimizer, "step": 1, "ema": _NoAverage()}
    torch.manual_seed(0)
    batch = torch.arange(24.0).reshape(8, 3)
    step(state, distributed.share(batch))
    return step.grad_norm.item(), model.weight.tolist()


class _Scores(torch.nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x, labels):
        return self.layer(x)


class _NoAverage:
    def update(self, parameters):
        pass


def test_the_gradient_of_all_is_clipped():
    (norm, weight), *others = [clipped_step(), *together(2, clipped_step)]
    assert norm > 1
    for other_norm, other_weight in others:
        assert other_norm == pytest.approx(norm, rel=1e-5)
        assert other_weight == [pytest.approx(row, rel=1e-5) for row in weight]


WRAPPERS = {
    "": lambda network: network,
    "ddp": torch.nn.parallel.DistributedDataParallel,
    "compiled": lambda network: torch.compile(
        torch.nn.parallel.DistributedDataParallel(network), backend="eager"
    ),
    "fsdp": fully_shard,
}


def steps_of_a_wrapped_network(wrapper):
    """Weights after steps of a network that the caller has wrapped, and rank 0's loss."""
    network = _Scores(torch.nn.Linear(3, 3))
    torch.nn.init.eye_(network.layer.weight)
    torch.nn.init.zeros_(network.layer.bias)
    model = WRAPPERS[wrapper](network)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ema = ExponentialMovingAverage(model.parameters(), decay=0.9)
    state = {"model": model, "optimizer": optimizer, "step": 0, "ema": ema}
    step = get_step_fn(VPSDE(), True, lambda optimizer, params, step: optimizer.step())
    batch = torch.arange(24.0).reshape(8, 3)
    for number in range(3):
        torch.manual_seed(number)
        step(state, distributed.share(batch))
    loss = None
    if wrapper != "fsdp" and distributed.is_main():  # the others wait for nothing
        loss = get_step_fn(VPSDE(), False)(state, batch).item()
    weight = network.layer.weight.detach()
    return (weight.full_tensor() if wrapper == "fsdp" else weight).tolist(), loss


@pytest.mark.parametrize("wrapper", ("ddp", "compiled", "fsdp"))
def test_a_network_that_its_caller_has_wrapped_is_not_wrapped_again(wrapper):
    """Twice averaged, its gradients were others in each process."""
    expected, _ = steps_of_a_wrapped_network("")
    for weight, loss in together(2, steps_of_a_wrapped_network, wrapper):
        torch.testing.assert_close(torch.tensor(weight), torch.tensor(expected))
        assert loss is None or loss > 0


def step_of_a_network_wrapped_in_a_part():
    wrapped = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(3, 3))
    model = _Scores(torch.nn.Sequential(wrapped, torch.nn.Linear(3, 3)))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    state = {"model": model, "optimizer": optimizer, "step": 1, "ema": _NoAverage()}
    step = get_step_fn(VPSDE(), True, lambda optimizer, params, step: optimizer.step())
    step(state, torch.zeros(2, 3))


def test_a_network_that_is_wrapped_in_a_part_is_refused():
    """The rest was trained apart in each process."""
    for error in together(2, step_of_a_network_wrapped_in_a_part):
        assert isinstance(error, ValueError)
        assert re.search(r"without 2 trained .* 'layer\.1\.weight': wrap all", str(error))


def dropout_masks():
    torch.manual_seed(7)
    drawn = losses.get_sde_loss_fn(VPSDE(), True).draw(torch.zeros(2, 3))
    distributed.draw_apart()
    return drawn.level.numpy(), drawn.z.numpy(), torch.rand(4).numpy()


def test_noise_is_shared_out_and_dropout_is_not():
    whole = get_sde_loss_fn(VPSDE(), True)
    torch.manual_seed(7)
    level, z, _ = whole.draw(torch.zeros(6, 3))
    after = torch.rand(4)
    levels, noise, masks = zip(*together(3, dropout_masks), strict=True)
    assert np.array_equal(np.concatenate(levels), level)
    assert np.array_equal(np.concatenate(noise), z)
    assert np.array_equal(masks[0], after)
    assert not any(np.array_equal(masks[i], masks[j]) for i, j in ((0, 1), (0, 2), (1, 2)))


def test_parts_make_up_the_whole():
    """Also where there is less than one piece for each process."""
    for count in (0, 1, 2, 7):
        parts = together(3, distributed.share, range(count))
        assert [k for part in parts for k in part] == list(range(count))
        dealt_out = together(3, distributed.dealt_out, range(count), str)
        assert dealt_out == [[str(k) for k in range(count)]] * 3


def count_up():
    """The answers to (False, False, True in process 1 only, False, False)."""
    any_process = distributed.AnyProcess()
    flags = [False, False, distributed.rank() == 1, False, False]
    return [any_process(flag) for flag in flags] + [any_process.last()]


def test_one_flag_is_known_to_all_at_the_next_call():
    assert together(3, count_up) == [[False, False, False, True, False, False]] * 3
    assert [distributed.AnyProcess()(flag) for flag in (False, True)] == [False, True]


def fails_in_main():
    def compute():
        raise ValueError("mistake")

    distributed.on_main(compute)


def test_a_mistake_found_by_the_main_process_ends_all():
    main, *others = together(3, fails_in_main)
    assert str(main) == "mistake" and others == [1, 1]


def started_apart(*changes):
    config = small_config(**changes[distributed.rank()])
    main.FLAGS = types.SimpleNamespace(config=config, mode="check", eval_folder="eval")
    main.run_mode()


def test_processes_with_different_options_are_refused():
    """They trained on other batches, or waited for steps that the others did not make."""
    of_machines = {"data__path": "/a", "data__num_workers": 1}, {"data__path": "/b"}
    changes = [{"seed": seed, **own} for seed, own in zip((1, 2), of_machines, strict=True)]
    for refused in together(2, started_apart, *changes):
        assert str(refused).endswith("(seed is 1 or 2): start all of them by the same command")


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    """Evaluation data, in batches of 16."""
    return few_digits(
        tmp_path_factory.mktemp("data"),
        optim__lr=1e-3,
        eval__batch_size=16,
        eval__num_samples=40,
        eval__bpd_num_repeats=1,
    )


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory, options):
    """A run, trained and evaluated by one process."""
    folder = tmp_path_factory.mktemp("run")
    run_lib.fid_stats(small_config(**options))
    run_lib.train(small_config(**options), folder)
    run_lib.evaluate(small_config(**options), folder)
    return folder


@pytest.mark.parametrize("world", (3,))
def test_evaluation_gives_the_figures_of_one_process(world, evaluated, options):
    """Bit for bit, although three processes divide neither the batches nor the examples."""
    name = f"eval_{world}"
    found = together(world, run_lib.evaluate, small_config(**options), evaluated, name)
    expected = json.loads((evaluated / "eval/report.json").read_text())
    assert found == [expected] * world
    assert json.loads((evaluated / name / "report.json").read_text()) == expected
    ours, theirs = (
        sorted(path.relative_to(folder) for path in folder.rglob("*.npz"))
        for folder in (evaluated / name, evaluated / "eval")
    )
    assert ours == theirs and len(ours) == 1 + 3 + 3 + 3 + 1
    records = [(evaluated / folder / "examples.json").read_text() for folder in (name, "eval")]
    assert records[0] == records[1]


def make_rounds(folder):
    """Seven rounds, of which the third is there already; says which ones this process has made."""
    made = []

    def make(number):
        def compute():
            made.append(number)
            return {"number": np.array(number)}

        return job.round(f"{number}.npz", compute)

    job = Job(None, folder, "1", "fingerprint")
    found = job.rounds(7, make)
    assert [int(arrays["number"]) for arrays in found] == list(range(7))
    return made


def test_every_round_is_made_once(tmp_path):
    Job(None, tmp_path, "1", "fingerprint").round("2.npz", lambda: {"number": np.array(2)})
    made = together(3, make_rounds, tmp_path)
    assert sorted(number for part in made for number in part) == [0, 1, 3, 4, 5, 6]
    assert all(made)


def lose_a_process():
    if distributed.rank() == 1:
        os._exit(3)
    distributed.barrier()


def warnings_of_a_step():
    """Of a convolution of grey images with channels last, whose gradient has strides of its own."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        network = distributed.replicated(torch.nn.Conv2d(1, 8, 3))
        images = torch.ones(2, 1, 8, 8)
        network(images.to(memory_format=torch.channels_last)).mean().backward()
    return [str(warning.message) for warning in told]


def test_several_processes_do_not_warn_of_the_strides_of_one_channel():
    assert together(2, warnings_of_a_step) == [[], []]


def test_groups_are_freed_at_exit_after_the_networks_in_them(monkeypatch):
    """Left to the interpreter, their threads aborted two in five programs at their end."""
    at_exit = []
    monkeypatch.setattr(atexit, "register", at_exit.append)

    def leave():
        network = distributed.replicated(torch.nn.Linear(2, 2))
        network.itself, alive = [network], weakref.ref(network)
        del network
        for function in at_exit:
            function()
        return alive() is None and not distributed._groups

    assert together(2, leave) == [True, True]


def test_processes_that_share_a_cpu_need_no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert together(2, distributed.world) == [2, 2]


@pytest.mark.parametrize("device, number", [("cuda", 0), ("cuda:1", 1)])
def test_the_gpu_of_a_process_is_its_current_one(monkeypatch, device, number):
    """Whatever its rank: NCCL works on the current one."""
    chosen = []
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(distributed, "_meet", lambda backend: chosen.append(backend))
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: None)
    monkeypatch.setattr(distributed, "_groups", [])
    monkeypatch.setattr(atexit, "register", lambda function: None)
    with distributed.joined(torch.device(device)):
        assert chosen == [number, "cpu:gloo,cuda:nccl"]


def test_who_loses_another_process_says_so_in_a_sentence():
    error, code = together(2, lose_a_process)
    assert isinstance(error, OSError) and code == 3
    assert str(error).startswith("another process of this run is gone")
    assert "\n" not in str(error)


@pytest.fixture
def alone_of_two(monkeypatch):
    """Others of the run never come."""
    port = str(free_port())
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")


def meet():
    on_cpu = distributed.joined(torch.device("cpu"))
    with preemption.StopSignals() as stop, stop.at_once(), on_cpu:
        pass


def test_processes_that_never_come_are_told(alone_of_two, monkeypatch):
    monkeypatch.setattr(distributed, "ARRIVAL", datetime.timedelta(seconds=0.2))
    with pytest.raises(OSError, match=r"127.0.0.1:\d+; if it has no others, unset RANK \(") as told:
        meet()
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_wait_for_processes(number, alone_of_two, monkeypatch):
    """Python had no chance to handle it."""
    forked, rendezvous = multiprocessing.get_context("fork"), distributed.dist.rendezvous
    begun = forked.Event()

    def begin(*arguments, **options):
        begun.set()
        return rendezvous(*arguments, **options)

    monkeypatch.setattr(distributed.dist, "rendezvous", begin)
    process = forked.Process(target=meet)
    process.start()
    try:
        assert begun.wait(30)
        os.kill(process.pid, number)
        process.join(30)
        assert process.exitcode == -number
    finally:
        process.kill()


def test_statistics_are_those_of_one_process(evaluated, options, tmp_path):
    changed = {**options, "eval__stats": str(tmp_path / "stats.npz")}
    paths = together(3, run_lib.fid_stats, small_config(**changed))
    assert paths == [pathlib.Path(tmp_path / "stats.npz")] * 3
    assert load_statistics(paths[0]).hash() == load_statistics(options["eval__stats"]).hash()


def test_samples_are_those_of_one_process(evaluated, options, tmp_path):
    config = small_config(**options, sampling__num_samples=20, training__batch_size=6)
    one = np.load(run_lib.sample(config, evaluated) / "sample.np")
    found = together(2, run_lib.sample, config, evaluated)
    assert found[0] == found[1] and np.array_equal(np.load(found[0] / "sample.np"), one)


MISTAKES = {
    "batch": (run_lib.train, {"training__batch_size": 16}, "= 16 .*3 processes.* 18 can"),
    "parts": (
        run_lib.train,
        {"training__batch_size": 6, "training__grad_accumulation": 4},
        "batch_size = 6 .*grad_accumulation = 4 parts each: 12 can",
    ),
    "control": (run_lib.control, {}, "one process"),
    "check": (run_lib.check, {}, "--mode check runs in one process"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_what_cannot_be_shared_is_refused(case, tmp_path):
    mode, changes, said = MISTAKES[case]
    for error in together(3, mode, small_config(**changes), tmp_path / "run"):
        assert isinstance(error, ValueError)
        with pytest.raises(ValueError, match=said):
            raise error
    assert not (tmp_path / "run").exists()


def on_its_own_machine(mode, folder, *arguments):
    """A mode in a current folder that has one name, and is another one for each process."""
    own = folder / str(distributed.rank())
    own.mkdir(exist_ok=True)
    os.chdir(own)
    return mode(*arguments, "run")


def test_processes_that_see_other_checkpoints_are_refused(tmp_path):
    """The second would begin anew, and its gradients would be of other steps."""
    config = small_config(training__n_iters=2, training__snapshot_sampling=False)
    assert together(2, on_its_own_machine, run_lib.train, tmp_path, config) == [None, None]
    config.training.n_iters = 4
    for error in together(2, on_its_own_machine, run_lib.train, tmp_path, config):
        with pytest.raises(
            ValueError, match=r"different steps of the state .*\(2, 0\).*see the same"
        ):
            raise error


@pytest.mark.parametrize("mode", (run_lib.train, run_lib.fid_stats))
def test_processes_that_see_other_data_are_refused(mode, tmp_path):
    """They would share the numbers of images among them, and read other images by these."""
    for rank in range(2):
        (tmp_path / str(rank)).mkdir()
        images = np.random.default_rng(0).integers(0, 256, (40 + rank, 8, 8), dtype=np.uint8)
        np.save(tmp_path / str(rank) / "a.npy", images)
    options = {"data__dataset": "IMAGES", "data__path": "a.npy", "data__levels": 0}
    config = small_config(**options, eval__extractor="digits")
    for error in together(2, on_its_own_machine, mode, tmp_path, config):
        with pytest.raises(ValueError, match=r"different train\w* data \(\d+ examples.*, \d+ ex"):
            raise error


def train_and_be_stopped(config, folder, signal_number, step):
    """Training in which the last process is sent a signal during a step."""
    original = ExponentialMovingAverage.update

    def stopped(self, parameters):
        if self.num_updates == step and distributed.rank() == distributed.world() - 1:
            os.kill(os.getpid(), signal_number)
        original(self, parameters)

    ExponentialMovingAverage.update = stopped
    try:
        run_lib.train(config, folder)
    finally:
        ExponentialMovingAverage.update = original


@pytest.mark.parametrize(("number", "world"), ((signal.SIGTERM, 1), (signal.SIGUSR1, 2)))
def test_a_signal_to_one_process_stops_all_after_the_same_step(world, number, alone, tmp_path):
    config = small_config(**LONG)
    codes = together(world, train_and_be_stopped, config, tmp_path, number, 20)
    assert codes == [preemption.EXIT_CODE] * world
    checkpoint = read_checkpoint(tmp_path / "checkpoints-meta/checkpoint.pth")
    # The others learn of a signal one step later.
    assert checkpoint["step"] == 20 + world and checkpoint["position"] == 32 * checkpoint["step"]
    assert together(world, run_lib.train, config, tmp_path) == [None] * world
    assert_same_weights(tmp_path, alone, rtol=0, atol=1e-4 if world > 1 else 0)
    assert [r["step"] for r in logged(tmp_path)] == [r["step"] for r in logged(alone)]


def test_a_signal_while_samples_are_drawn(alone, tmp_path, monkeypatch):
    """The run stops at once, and draws them when it goes on."""

    def stop(self):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)

    profile = {"training__posthoc_profiles": (0.1,), "training__posthoc_freq": 25}
    config = small_config(**{**LONG, **profile, "training__snapshot_freq": 25})
    monkeypatch.setattr(run_lib.Run, "first_samples", stop)
    start = time.monotonic()
    with pytest.raises(Preempted) as stopped:
        run_lib.train(config, tmp_path)
    assert stopped.value.code == 75 and time.monotonic() - start < 50
    assert read_checkpoint(tmp_path / "checkpoints-meta/checkpoint.pth")["step"] == 25
    assert not (tmp_path / "samples").exists()
    assert (tmp_path / "posthoc/step_25_0.1.pth").exists()
    monkeypatch.undo()
    run_lib.train(config, tmp_path)
    assert (tmp_path / "samples/iter_25/sample.png").exists()
    assert not read_checkpoint(tmp_path / "checkpoints-meta/checkpoint.pth")["snapshot_due"]
    assert_same_weights(tmp_path, alone, rtol=0, atol=0)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_wrapper_whose_mode_is_out_of_date_misleads_nobody():
    """Sampling puts the network itself into evaluation mode; training then has dropout again."""
    network = _Scores(torch.nn.Dropout(0.5))
    wrapper = torch.nn.Module()
    wrapper.module, wrapper.forward = network, lambda x, labels: network(x, labels)
    network.eval()
    assert wrapper.training
    dropped = get_model_fn(wrapper, train=True)(torch.ones(1000), None)
    assert 400 < (dropped == 0).sum() < 600
    network.train()
    wrapper.training = False
    assert torch.equal(get_model_fn(wrapper)(torch.ones(9), None), torch.ones(9))
