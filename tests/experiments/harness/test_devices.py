"""Any number of devices and processes gives the same study; a lost process ends the run, and it can be resumed."""

import contextlib
import dataclasses
import functools
import os
import signal
import socket
import subprocess
import sys
import time
import traceback

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rollax.agents import TransformerConfig, named_shardings, state_shardings, transformer
from rollax.experiments import bandpo, ppo_cartpole
from rollax.experiments.harness import devices, on_ray, processes
from rollax.experiments.harness.command_line import Options
from rollax.experiments.harness.loop import Train, compiled, load_results, run, single, vectorize
from rollax.experiments.harness.run_folder import RunFolder
from rollax.tests.experiments.harness import toy_study as toy

eight = pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")


@functools.cache
def toy_program(mesh, **sizes):
    """(program, executables) of the toy, compiled once for all tests."""
    config = toy.Config(mesh=mesh, **sizes)
    build = toy.build(config)
    program = vectorize(build.train, build.rows, range(config.seeds), mesh)
    return program, compiled(program, config)


def train(tmp_path, study, config, program=None, *, name, mesh="", stop_at=None, executables=None, **options):
    """The results of a study in process; an error at the update `stop_at` stands for a crash."""
    options = {"save_every": float("inf"), "resume": True, **options}
    config = dataclasses.replace(config, runs=str(tmp_path), name=name, mesh=mesh, **options)
    if program is None and study is toy:
        program, executables = toy_program(mesh, seeds=config.seeds, width=config.width)
    elif program is None:
        build = study.build(config)
        program = vectorize(build.train, build.rows, range(config.seeds), mesh)

    def watch(update, train, held_out):
        if update == stop_at:
            raise InterruptedError("crash")
        return False

    with contextlib.closing(RunFolder("study", config, {"x": config})) as folder:
        return run(program, "x", config.updates, folder, config, executables=executables, watch=watch)


def flat(results):
    sides = {"train": results.train, "held_out": results.held_out}
    return {
        (side, row, name): values
        for side, rows in sides.items()
        for row, metrics in rows.items()
        for name, values in metrics.items()
    }


def assert_close(one, other, rtol=0.0, atol=0.0):
    one, other = flat(one), flat(other)
    assert one.keys() == other.keys()
    for name, values in one.items():
        np.testing.assert_allclose(values, other[name], rtol, atol, err_msg=str(name))


# --- Devices ---------------------------------------------------------------------------------------------------------


@eight
def test_meshes():
    assert dict(devices.parse_mesh("data=4,tensor=2").shape) == {"data": 4, "tensor": 2}
    assert dict(devices.parse_mesh("").shape) == {"fsdp": 8}
    for text in ("data", "data=x", "rows=2", "data=0", "data=16"):
        with pytest.raises(ValueError, match="mesh: "):
            devices.parse_mesh(text)
    cases = [(("", 3, 16), 8, 1), (("", 3, 4), 4, 1), (("", 16, 5), 8, 0), (("data=2", 3, 4), 2, 1)]
    for arguments, count, axis in cases:
        mesh, split = devices.runs_mesh(*arguments)
        assert (mesh.size, split) == (count, axis)
    with pytest.raises(ValueError, match=r"divides 5 seeds or 3 rows, got 8"):
        devices.runs_mesh("data=8", 3, 5)
    with pytest.raises(ValueError, match=r"data alone, got 'fsdp=2'"):
        devices.runs_mesh("fsdp=2", 2, 2)


# Rounding depends on whether XLA computes a number in a vector register or among the rest that does not fill one, and
# so on how many runs a device has. A multiple of every register's width makes all numbers alike.
TOY = toy.Config(seeds=8, width=32)


@eight
def test_the_toy_is_bitwise_the_same_on_any_number_of_devices(tmp_path):
    one, state = train(tmp_path, toy, TOY, name="1", mesh="data=1")
    for count in (2, 8):
        results, last = train(tmp_path, toy, TOY, name=str(count), mesh=f"data={count}")
        assert_close(one, results)
        assert len(last.place.sharding.device_set) == count
        assert last.place.addressable_shards[0].data.shape == (2, 8 // count, 32)  # each device has its own seeds
        np.testing.assert_array_equal(state.place, last.place)


@pytest.fixture
def quick_programs():
    """Without LLVM's expensive passes, as most other tests: programs that are large and run for a moment."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


PPO = ppo_cartpole.Config(seeds=8, updates=4, chunk=2, num_envs=8, steps=16, mini_batches=2, passes=2)
BAND = dataclasses.replace(
    bandpo.Config(), model="tabular", arms=("band_kl",), seeds=8, updates=4, chunk=2, staleness=0, mini_batches=2,
    passes=1, eval_prompts=4, eval_samples=4,
)  # fmt: skip


@eight
@pytest.mark.parametrize(
    ("study", "config", "counts"),
    [
        pytest.param(ppo_cartpole, PPO, (8,), marks=pytest.mark.slow),  # the toy above is compared by default
        pytest.param(ppo_cartpole, PPO, (2, 4), marks=pytest.mark.slow),
        pytest.param(bandpo, BAND, (2, 8), marks=pytest.mark.slow),
    ],
)
def test_studies_are_the_same_on_any_number_of_devices(tmp_path, quick_programs, study, config, counts):
    """Up to rounding, see above; and near a tie of its logits PPO's greedy policy may balance one step longer."""
    one, _ = train(tmp_path, study, config, name="1", mesh="data=1")
    for count in counts:
        results, _ = train(tmp_path, study, config, name=str(count), mesh=f"data={count}")
        for name, values in flat(one).items():
            greedy = name == ("held_out", "ppo", "reward")
            steps = 2 / config.num_envs if greedy else 1e-8
            np.testing.assert_allclose(values, flat(results)[name], rtol=2e-6, atol=steps, err_msg=str(name))


@eight
def test_a_run_moves_between_numbers_of_devices(tmp_path):
    whole, _ = train(tmp_path, toy, TOY, name="whole", mesh="data=1")
    for count, stop in ((8, 6), (2, 8), (1, 10)):
        with pytest.raises(InterruptedError):
            train(tmp_path, toy, TOY, name="moved", mesh=f"data={count}", stop_at=stop, save_every=0.0)
    moved, state = train(tmp_path, toy, TOY, name="moved", mesh="data=8")
    assert_close(whole, moved)
    assert len(state.place.sharding.device_set) == 8


def language_model_program(mesh):
    """A transformer learns a fixed text, in the study's own shardings on the mesh."""
    model = transformer(TransformerConfig(16, width=16, num_layers=1, num_heads=2))
    mesh = devices.parse_mesh(mesh)
    optimizer = optax.adam(1e-2)
    tokens = jax.random.randint(jax.random.key(1), (8, 9), 0, 16)
    positions = jnp.broadcast_to(jnp.arange(8), (8, 8))

    def start(key):
        params = model.init(key)
        return {"params": params, "opt_state": optimizer.init(params), "key": key}

    def loss(params):
        logits = model.apply(params, tokens[:, :-1], positions)[0]
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    def update(state, numbers):
        value, grads = jax.value_and_grad(loss)(state["params"])
        updates, opt_state = optimizer.update(grads, state["opt_state"])
        params = optax.apply_updates(state["params"], jax.tree.map(lambda x: numbers["scale"] * x, updates))
        return {"params": params, "opt_state": opt_state, "key": state["key"]}, {"loss": value}

    shapes = jax.eval_shape(start, jax.random.key(0))
    places = named_shardings(model.axes, shapes["params"], mesh)
    places = state_shardings(shapes, shapes["params"], places, mesh)
    state = jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes, places)
    functions = Train(
        jax.jit(start, out_shardings=places),
        lambda state, numbers: jax.lax.scan(lambda s, _: update(s, numbers), state, length=2),
        lambda state, numbers: {"loss": loss(state["params"])},
    )
    return single(functions, "row", {"scale": 1.0}, 0, state)


@eight
def test_a_model_moves_between_meshes(tmp_path, quick_programs):
    """Restored bitwise (the checkpoint's fingerprint says so) into the shardings of the new mesh."""
    programs = {count: language_model_program(mesh) for count, mesh in ((8, "data=2,fsdp=2,tensor=2"), (1, "data=1"))}
    config = toy.Config(updates=6)
    executables = {count: compiled(program, config) for count, program in programs.items()}
    on = lambda count: dict(program=programs[count], executables=executables[count])  # noqa: E731
    whole, _ = train(tmp_path, None, config, **on(1), name="whole")
    for count, stop in ((8, 2), (1, 4)):
        with pytest.raises(InterruptedError):
            train(tmp_path, None, config, **on(count), name="moved", stop_at=stop, save_every=0.0)
    moved, state = train(tmp_path, None, config, **on(8), name="moved")
    assert_close(whole, moved, rtol=1e-5)
    for leaf, wanted in zip(jax.tree.leaves(state), jax.tree.leaves(programs[8].state), strict=True):
        assert leaf.sharding.is_equivalent_to(wanted.sharding, leaf.ndim)
    assert state["params"]["embed"]["embedding"].addressable_shards[0].data.shape == (8, 8)  # of [16, 16]


# --- Switches --------------------------------------------------------------------------------------------------------


def test_switches_of_a_process(monkeypatch, tmp_path):
    jax.devices()
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    with pytest.raises(ValueError, match=r"deterministic: expected before JAX has started.*XLA_FLAGS"):
        devices.begin(Options(deterministic=True))
    assert "XLA_FLAGS" not in os.environ
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_deterministic_ops=true")
    devices.begin(Options(deterministic=True))
    assert jax.process_count() == 1
    assert jax.config.jax_compilation_cache_dir
    sets = "from rollax.experiments.harness import devices; from rollax.experiments.harness.command_line import Options"
    sets += "\ndevices.begin(Options(deterministic=True))"
    sets += "\nimport os, jax; jax.devices(); print(os.environ['XLA_FLAGS'])"
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    fresh = subprocess.run([sys.executable, "-c", sets], env=environment, capture_output=True, text=True, timeout=60)
    assert fresh.stdout.split() == ["--xla_gpu_deterministic_ops=true"], fresh.stderr


def test_the_first_nan_stops_the_run(tmp_path):
    def a_line_of_the_study(x):
        return jnp.log(x)

    build = toy.build(toy.Config())

    def advance(state, numbers):
        place = state.place + 0.0 * a_line_of_the_study(jnp.where(state.step == 4, -1.0, 1.0))
        return build.train.advance(state._replace(place=place), numbers)

    program = vectorize(build.train._replace(advance=advance), build.rows, range(2), "data=2")
    with pytest.raises(FloatingPointError, match=r"debug_nans: .*nan generated by primitive: log") as stop:
        train(tmp_path, None, toy.Config(), program, name="debugged", debug_nans=True)
    where = "".join(traceback.format_exception(stop.value))
    assert "in a_line_of_the_study" in where
    saved = sorted(path.name for path in (tmp_path / "study" / "debugged" / "history" / "x").iterdir())
    assert saved == ["00000000.npz", "00000002.npz", "00000004.npz"]  # the good chunks are kept
    results, _ = train(tmp_path, None, toy.Config(), program, name="as ever")
    np.testing.assert_array_equal(np.isnan(results.train["plain"]["reward"][0]), np.arange(12) >= 4)


def test_profile(tmp_path, capsys):
    train(tmp_path, toy, toy.Config(), name="traced", profile=2)
    (trace,) = (tmp_path / "study" / "traced" / "profile" / "x").glob("plugins/profile/*/*.xplane.pb")
    names = [
        event.name
        for plane in jax.profiler.ProfileData.from_file(str(trace)).planes
        for line in plane.lines
        for event in line.events
    ]
    assert sum(name.endswith(" fetch") for name in names) == 2  # of Python: one after each traced chunk
    assert any("fusion" in name for name in names)  # of the devices
    train(tmp_path, toy, toy.Config(updates=2), name="short", profile=2)
    assert "profile: nothing traced" in capsys.readouterr().err


# --- Processes -------------------------------------------------------------------------------------------------------

# What each process runs: the toy, by the command line of studies. Then it says which of the seeds it has computed.
PROGRAM = """
from rollax.experiments.harness import study
from rollax.tests.experiments.harness import toy_study as toy

def run(*arguments, run=study.run, **options):
    results, state = run(*arguments, **options)
    print("seeds", *sorted(shard.index[1].start for shard in state.place.addressable_shards))
    return results, state

study.run = run
study.main(toy.STUDY)
"""
SECONDS = 60  # for the processes of a test


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def plain_variables(index, port):
    return {
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": str(index),
    }  # fmt: skip


def slurm_variables(index, port):
    return {
        "JAX_COORDINATOR_PORT": str(port), "SLURM_JOB_ID": "1", "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": str(index), "SLURM_LOCALID": str(index),
    }  # fmt: skip


@contextlib.contextmanager
def two_processes(tmp_path, *arguments, variables=plain_variables):
    """The toy in two processes of two devices each, on the loopback; whatever happens, none is left."""
    port = free_port()
    base = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    base |= {"JAX_NUM_CPU_DEVICES": "2", "ROLLAX_JOIN_SECONDS": str(SECONDS), "ROLLAX_HEARTBEAT_SECONDS": "2"}
    command = [sys.executable, "-c", PROGRAM, "--runs", str(tmp_path), "--chunk", "2", *arguments]
    started = [
        subprocess.Popen(
            command, env=base | variables(index, port), text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        for index in range(2)
    ]
    try:
        yield started
    finally:
        for process in started:
            process.kill()
            process.communicate()


def saved_chunks(tmp_path, name):
    return len(list((tmp_path / "toy_study" / name / "history" / "toy").glob("0*.npz")))


def after_some_chunks(tmp_path, name, started, chunks):
    deadline = time.monotonic() + SECONDS
    while saved_chunks(tmp_path, name) < chunks:
        ended = [process.communicate() for process in started if process.poll() is not None]
        assert not ended and time.monotonic() < deadline, ended
        time.sleep(0.02)


def finish(started):
    said = [process.communicate(timeout=SECONDS) for process in started]
    return [process.returncode for process in started], *zip(*said, strict=True)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """`UPDATES` updates of the toy in this process, on as many devices as two processes have."""
    return train(tmp_path_factory.mktemp("whole"), toy, toy.Config(updates=UPDATES), name="whole", mesh="data=4")[0]


UPDATES = 400


def go_on_alone(tmp_path, name):
    """Resumes here, in one process, what two have begun."""
    config = toy.Config(runs=str(tmp_path), name=name, resume=True, updates=UPDATES, mesh="data=4")
    program, executables = toy_program(config.mesh, seeds=config.seeds, width=config.width)
    with contextlib.closing(RunFolder("toy_study", config, {"toy": config})) as folder:
        return run(program, "toy", UPDATES, folder, config, executables=executables)[0]


@eight
@pytest.mark.timeout(2 * SECONDS)
def test_two_processes_are_one_run(tmp_path):
    """Started as by srun: each computes its own seeds, the first writes, the results are those of one process."""
    with two_processes(tmp_path, "--name", "two", variables=slurm_variables) as started:
        codes, out, err = finish(started)
    assert codes == [0, 0], err
    assert err == ("", "")
    assert "seeds 0 0 1 1" in out[0] or "seeds 0 1" in out[0]
    assert "seeds 2 3" in out[1]
    assert "12/12" in out[0] and "12/12" not in out[1]
    folder = tmp_path / "toy_study" / "two"
    assert (folder / "report.html").exists() and (folder / "checkpoints" / "toy" / "12").exists()
    assert_as_one_process(tmp_path, "two")


def assert_as_one_process(tmp_path, name):
    one, _ = train(tmp_path, toy, toy.Config(), name="one", mesh="data=4")
    with contextlib.closing(RunFolder("toy_study", toy.Config(runs=str(tmp_path), name=name, resume=True),
                                      {"toy": toy.Config()})) as two:  # fmt: skip
        assert_close(one, load_results(two, "toy", one.train))


@eight
@pytest.mark.timeout(3 * SECONDS)
@pytest.mark.slow
def test_ray_starts_the_processes_of_a_run(tmp_path, monkeypatch):
    """An embedded cluster of two workers: the results are those of one process, and an error is each worker's line."""
    pytest.importorskip("ray")
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "2")
    command = [sys.executable, "-c", PROGRAM, "--runs", str(tmp_path), "--chunk", "2", "--name"]
    ended = on_ray.run_on_ray([*command, "ray"], on_ray.Config(processes=2))
    assert [code for code, _ in ended] == [0, 0], ended
    assert "12/12" in ended[0][1] and "12/12" not in ended[1][1]
    assert_as_one_process(tmp_path, "ray")


def test_ray_is_told_what_to_start(capsys):
    for argv, message in (
        (["--processes", "0", "study.py"], "processes: expected at least 1, got 0"),
        (["--gpus", "1"], "study: expected a file and its arguments behind the options"),
    ):
        with pytest.raises(SystemExit) as stop:
            on_ray.main(argv)
        assert stop.value.code == 2 and message in capsys.readouterr().err


@eight
@pytest.mark.timeout(3 * SECONDS)
@pytest.mark.slow  # by default two processes are one run, see above, and a killed run goes on in test_loop.py
@pytest.mark.parametrize("lost", [0, 1])
def test_a_lost_process_ends_the_run_which_then_resumes(tmp_path, whole, lost):
    """The first process is the one that JAX cannot do without: its loss aborts the others from C++."""
    arguments = ("--name", "cut", "--updates", str(UPDATES), "--save-every", "0")
    with two_processes(tmp_path, *arguments) as started:
        after_some_chunks(tmp_path, "cut", started, 6)
        started[lost].kill()
        begun = time.monotonic()
        codes, _, err = finish(started)
    assert time.monotonic() - begun < 20
    assert codes[lost] == -signal.SIGKILL
    assert codes[1 - lost] not in (0, -signal.SIGKILL)
    assert processes.LOST in err[1 - lost].splitlines()  # JAX may print its stack beside it
    done = saved_chunks(tmp_path, "cut")
    assert 6 <= done < UPDATES // 2
    if lost == 1:  # the second try is stopped in time, by a signal that only the second process gets
        with two_processes(tmp_path, *arguments, "--resume") as started:
            after_some_chunks(tmp_path, "cut", started, done + 6)
            started[1].terminate()
            codes, _, err = finish(started)
        assert codes == [130, 130], err
        assert "--resume --name cut goes on" in err[0]
    assert saved_chunks(tmp_path, "cut") < UPDATES // 2
    assert_close(whole, go_on_alone(tmp_path, "cut"))


@eight
@pytest.mark.timeout(2 * SECONDS)
def test_an_error_in_one_process_is_one_line_in_both(tmp_path):
    (tmp_path / "toy_study" / "taken").mkdir(parents=True)
    (tmp_path / "toy_study" / "taken" / "config.json").write_text("{}")
    with two_processes(tmp_path, "--name", "taken") as started:
        codes, _, err = finish(started)
    assert codes == [2, 2], err
    for said in err:
        assert said.startswith("error: name: expected a new run") and said.count("\n") == 1, said


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({"JAX_NUM_PROCESSES": "2"}, r"JAX_PROCESS_ID: expected an integer of at least 0, got ''"),
        ({"JAX_PROCESS_ID": "1"}, r"JAX_NUM_PROCESSES: expected an integer of at least 1, got ''"),
        ({"JAX_NUM_PROCESSES": "two", "JAX_PROCESS_ID": "0"}, r"JAX_NUM_PROCESSES: expected an integer.*'two'"),
        ({"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "2"}, r"JAX_PROCESS_ID: expected below JAX_NUM_PROCESSES=2"),
        ({"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}, r"JAX_COORDINATOR_ADDRESS: expected host:port.*got ''"),
        (plain_variables(1, 1), r"JAX_NUM_PROCESSES: 2 processes join before JAX has started, which it has"),
    ],
)
def test_wrong_variables_are_named(monkeypatch, variables, says):
    jax.devices()
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=says):
        processes.join()


def test_processes_that_do_not_meet(monkeypatch):
    monkeypatch.setenv("JAX_NUM_PROCESSES", "1")
    monkeypatch.setenv("JAX_PROCESS_ID", "0")
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "127.0.0.1:1")
    processes.join()  # one process meets nobody
    assert not jax.distributed.is_initialized()
    with pytest.raises(ValueError, match=r"JAX_COORDINATOR_ADDRESS: cannot within 0.3 s reach 127.0.0.1:.*refused"):
        processes.meet(f"127.0.0.1:{free_port()}", first=False, seconds=0.3)
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=rf"JAX_COORDINATOR_ADDRESS: cannot listen on 127.0.0.1:{port}: .*in use"):
            processes.meet(f"127.0.0.1:{port}", first=True, seconds=9)
        processes.meet(f"127.0.0.1:{port}", first=False, seconds=9)


@pytest.mark.timeout(SECONDS)
def test_a_first_process_without_the_others_says_so():
    """JAX aborts it from C++ when the time is over: the last line is ours."""
    waits = "from rollax.experiments.harness.processes import join; join()"
    environment = os.environ | plain_variables(0, free_port()) | {"ROLLAX_JOIN_SECONDS": "1"}
    ended = subprocess.run(
        [sys.executable, "-c", waits], env=environment, capture_output=True, text=True, timeout=SECONDS
    )
    assert ended.returncode != 0
    assert "2 processes did not meet within 1 s" in ended.stderr.strip().splitlines()[-1]
