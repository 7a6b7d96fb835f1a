"""Sweeps on a cluster that loses a worker, sweeps that are killed themselves, damaged files, and bad input."""

import functools
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import joblib
import pandas as pd
import pytest
import torch
from joblib.externals.loky.process_executor import TerminatedWorkerError
from joblib.parallel import BACKENDS

from samsde import sweep as module
from samsde.algorithm import DNSAM, SAM, SGD, USAM, Chain
from samsde.objective import FiniteSum, Quadratic
from samsde.sde import SDE
from samsde.sweep import sweep

f64 = dict(dtype=torch.float64)
bowl = Quadratic(torch.diag(torch.tensor([1.0, 4.0], **f64)), sigma=0.3)
at = torch.ones(2, **f64)
one_core = functools.partial(joblib.parallel_config, n_jobs=1)


def files(folder):
    return sorted(folder.glob("*.npz"))


def same(table, expected):
    pd.testing.assert_frame_equal(table, expected, check_exact=True)


def network(batch_size):
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(40, 3, generator=generator, **f64)
    net = torch.nn.Sequential(
        torch.nn.Linear(3, 4, **f64), torch.nn.Tanh(), torch.nn.Linear(4, 2, **f64)
    )
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, **f64))
    return FiniteSum.from_module(
        net, torch.nn.CrossEntropyLoss(), X, (X[:, 0] > 0).long(), batch_size
    )


def grid(seeds=(0, 1), **more):
    """48 jobs: additive noise and minibatches of a module, closures, algorithms as objects and as functions."""
    return sweep(
        [SGD(), USAM, DNSAM, SAM],
        {"bowl": bowl, "net": network},
        [0.05],
        [0.2],
        [1, 4],
        seeds,
        t_end=2.0,
        n_paths=16,
        x0={"bowl": at},
        processes={"Chain": Chain, "SDE": lambda *a: SDE(*a, draws=16)},
        observe={"loss": lambda f, x: f.loss(x), "x": lambda f, x: x[..., :2]},
        interval=1.0,
        **more,
    )


@pytest.fixture(scope="module")
def expected():
    with one_core():
        return grid()


def test_a_cluster_loses_a_worker(expected, tmp_path):
    """Two worker processes, one of which is killed while it has work: complete, and equal to the serial table to the last bit."""
    distributed = pytest.importorskip("distributed", reason="dask is not installed")
    killed = []
    with (
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, dashboard_address=None
        ) as cluster,
        distributed.Client(cluster) as client,
    ):
        pids = client.run(os.getpid)

        def kill():
            while len(files(tmp_path)) < 5:
                time.sleep(0.01)
            while not killed:
                busy = [
                    address
                    for address, tasks in client.processing().items()
                    if tasks and address in pids
                ]
                if busy:
                    killed.append(len(files(tmp_path)))
                    os.kill(pids[busy[0]], signal.SIGKILL)

        killer = threading.Thread(target=kill, daemon=True)
        killer.start()
        with joblib.parallel_config(backend="dask"):
            table = grid(folder=tmp_path)
        killer.join(10)
        left = set(pids.values()) & set(client.run(os.getpid).values())
    assert killed and killed[0] < 40 < len(files(tmp_path)) == 48 and len(left) == 1, (killed, left)
    same(table, expected)
    of = lambda seed: expected.loc[expected.seed == seed, "mean"].reset_index(drop=True)
    assert not of(0).equals(of(1))  # the control: another seed


def cluster(**how):
    distributed = pytest.importorskip("distributed", reason="dask is not installed")
    return distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, dashboard_address=None, **how
    )


def within(seconds, work):
    """What `work` returns, or raises; a test that fails if it takes longer"""
    found = []

    def run():
        try:
            found.append((work(), None))
        except BaseException as error:
            found.append((None, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    assert found, f"no return in {seconds} s"
    result, error = found[0]
    if error:
        raise error
    return result


def on_cluster(client, **how):
    with joblib.parallel_config("dask", client=client):
        return grid(**how)


@pytest.mark.parametrize("pause", [0, pytest.param(1.5, marks=pytest.mark.slow)])
def test_a_cluster_loses_all_workers(expected, tmp_path, pause):
    """Both are killed within three seconds, and started again by Dask: complete, and equal to the serial table."""
    with cluster() as both, both.get_client() as client:
        pids = list(client.run(os.getpid).values())

        def kill():
            while len(files(tmp_path)) < 5:
                time.sleep(0.01)
            for pid in pids:
                os.kill(pid, signal.SIGKILL)
                time.sleep(pause)

        killer = threading.Thread(target=kill, daemon=True)
        killer.start()
        same(within(120, lambda: on_cluster(client, folder=tmp_path)), expected)
        assert not killer.is_alive() and not set(pids) & set(client.run(os.getpid).values())


def eight_jobs(loss, folder):
    how = dict(t_end=1.0, n_paths=4, x0=at, observe={"loss": loss}, folder=folder)
    return sweep([SGD(), SAM], {"bowl": bowl}, [0.1], [0.1], seeds=range(4), **how)


def test_a_job_that_kills_its_workers(tmp_path):
    """Dask gives it up after some of them, and so does the sweep. (joblib's own way to Dask is never told, and waits for ever.)"""
    killed = pytest.importorskip(
        "distributed", reason="dask is not installed"
    ).scheduler.KilledWorker
    parent = os.getpid()

    def loss(f, x):
        if os.getpid() != parent and len(files(tmp_path)) > 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return f.loss(x)

    def run(client):
        with joblib.parallel_config("dask", client=client):
            return eight_jobs(loss, tmp_path)

    with cluster() as both, both.get_client() as client:
        with pytest.raises(killed, match="workers died while running it"):
            within(120, lambda: run(client))
    assert 1 < len(files(tmp_path)) < 8


def test_a_cluster_without_workers(tmp_path, monkeypatch):
    """Workers that die and are not replaced: an error, after a minute or what it is set to."""
    monkeypatch.setattr(module, "PATIENCE", 2.0)
    with cluster() as both, both.get_client() as client:

        def leave():
            while len(files(tmp_path)) < 5:
                time.sleep(0.01)
            both.scale(0)

        threading.Thread(target=leave, daemon=True).start()
        with pytest.raises(RuntimeError, match="no worker for 2 s"):
            within(120, lambda: on_cluster(client, folder=tmp_path))
    assert 5 <= len(files(tmp_path)) < 48


def test_on_ray(expected):
    """Ray is no requirement of developers: `pip install ray` runs this test too. Its workers have no folder in common with this process."""
    ray = pytest.importorskip("ray", reason="Ray is not installed")
    from ray.util.joblib import register_ray

    paths = os.pathsep.join([str(Path(__file__).parent), str(Path(module.__file__).parent.parent)])
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        logging_level="ERROR",
        runtime_env={"env_vars": {"PYTHONPATH": paths}},
    )
    try:
        register_ray()
        with joblib.parallel_config(backend="ray"):
            same(grid(), expected)
    finally:
        ray.shutdown()


def test_a_job_travels_with_its_task():
    """What joblib's Dask backend takes for large is lost with the worker that holds it; a job is not, whatever it holds."""
    sizeof = pytest.importorskip("dask.sizeof", reason="dask is not installed").sizeof
    job = module.Job({}, Chain(SAM(0.1), network(1), 0.1), torch.ones(10**6), {}, 1.0, 2, 1.0, 1)
    assert sizeof(job) < 1000 < sizeof(job.x0.numpy())


def test_a_killed_sweep_goes_on(expected, tmp_path, monkeypatch):
    """Killed twice at some moment, it ends with the numbers of an undisturbed run, and no job runs twice."""
    script = "import sys; from pathlib import Path; import test_sweep as t\nwith t.one_core(): t.grid(folder=Path(sys.argv[1]))"
    env = os.environ | dict(
        PYTHONPATH=os.pathsep.join(
            [str(Path(__file__).parent), str(Path(module.__file__).parent.parent)]
        )
    )
    for enough in (3, 20):
        running = subprocess.Popen([sys.executable, "-c", script, tmp_path], env=env)
        while len(files(tmp_path)) < enough and running.poll() is None:
            time.sleep(0.005)
        running.kill()
        assert running.wait() == -signal.SIGKILL
    done, runs, run = len(files(tmp_path)), [], module.run
    monkeypatch.setattr(module, "run", lambda job: runs.append(job) or run(job))
    with one_core():
        same(grid(folder=tmp_path), expected)
    assert 20 <= done < 48 == done + len(runs)


def test_joblib_loses_a_worker(tmp_path):
    """joblib's own processes are not replaced: the sweep stops, and goes on from its folder."""
    parent, trap = os.getpid(), tmp_path / "trap"

    def loss(f, x):
        if os.getpid() != parent and trap.exists() and len(files(tmp_path)) > 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return f.loss(x)

    def run():
        return eight_jobs(loss, tmp_path)

    trap.touch()
    with joblib.parallel_config("loky", n_jobs=2):
        with pytest.raises(TerminatedWorkerError):
            run()
        assert 1 < len(files(tmp_path)) < 8
        trap.unlink()
        same(run(), small(seeds=range(4)))


def small(folder=None, objective=bowl, cores=1, **more):
    settings = dict(
        algorithms=[SGD(), SAM],
        objectives={"bowl": objective},
        etas=[0.1],
        rhos=[0.1],
        t_end=1.0,
        n_paths=4,
        x0=at,
        folder=folder,
    )
    with joblib.parallel_config("loky", n_jobs=cores):
        return sweep(**settings | more)


def test_a_full_disk_leaves_no_half_file(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as m:
        m.setattr(os, "replace", full)
        with pytest.raises(OSError, match="No space left"):
            small(tmp_path)
    assert not files(tmp_path)
    same(small(tmp_path), small())
    assert [path.suffix for path in tmp_path.iterdir()] == [".npz"] * 2


def test_links(tmp_path):
    """What a folder's link leads to is written, also where that is not there yet, and what a file's link leads to."""
    link, target = tmp_path / "link", tmp_path / "target"
    link.symlink_to(target)
    table = small(link)
    assert link.is_symlink() and len(files(target)) == 2
    path = files(target)[0]
    path.rename(tmp_path / "moved")
    path.symlink_to(tmp_path / "moved")
    same(small(link), table)
    (tmp_path / "moved").unlink()
    same(small(link), table)
    assert path.is_symlink() and (tmp_path / "moved").is_file()


def test_what_a_killed_sweep_left_goes(tmp_path):
    """After an hour, since another sweep may be writing."""
    old, new = tmp_path / "a.npz.0123abcd.part", tmp_path / "a.npz.ffffffff.part"
    for path in (old, new):
        path.write_text("half")
    os.utime(old, (0, 0))
    small(tmp_path)
    assert new.exists() and not old.exists()


def test_a_backend_that_returns_all_at_once(monkeypatch):
    """As Ray's does"""
    monkeypatch.setattr(BACKENDS["loky"], "supports_return_generator", False)
    same(small(cores=2), small())


def turned(data, at):
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def as_json(data):
    return b'{"format": 2, "content": {}}'


DAMAGE = {
    "cut short": lambda data: data[:-100],
    "empty": lambda data: b"",
    "one digit": lambda data: turned(data, data.index(b'"rows": [["loss", ') + 17),
    "text": lambda data: b"text",
    "a file of version 0.1": as_json,
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_files_are_refused(kind, tmp_path):
    damage, table = DAMAGE[kind], small(tmp_path)
    path, data = files(tmp_path)[0], files(tmp_path)[0].read_bytes()
    assert damage(data) != data
    path.write_bytes(damage(data))
    with pytest.raises(ValueError, match=f"{path.name} is no file of samsde, or damaged"):
        small(tmp_path)
    path.write_bytes(data)
    same(small(tmp_path), table)


def test_a_folder_of_an_earlier_version_is_refused(tmp_path):
    """Its files were JSON, under the same names."""
    small(tmp_path)
    path = files(tmp_path)[0]
    path.rename(path.with_suffix(".json"))
    with pytest.raises(ValueError, match="has the format of an earlier version of samsde"):
        small(tmp_path)
    path.with_suffix(".json").unlink()
    (tmp_path / "notes.json").write_text("{}")
    assert len(small(tmp_path)) == 2  # the control: another file in JSON


@pytest.mark.parametrize(
    "change",
    [
        dict(objective=Quadratic(2 * bowl.H, sigma=0.3)),
        dict(x0=2 * at),
        dict(observe={"loss": lambda f, x: 2 * f.loss(x)}),
        dict(algorithms={"SGD": SGD(), "SAM": USAM}),
    ],
)
def test_another_meaning_of_the_same_name_is_refused(change, tmp_path):
    small(tmp_path)
    with pytest.raises(ValueError, match="belongs to a run with other settings"):
        small(tmp_path, **change)
    small(tmp_path, seeds=[1, 0], rhos=[0.2, 0.1])  # the control: a larger grid


@pytest.mark.parametrize("start", [[2.0, 1.0], [-1.0, 2.0], [1.0, 2.0000000000000004]])
def test_another_start_is_refused(start, tmp_path):
    """Also where the loss is the same from there"""
    small(tmp_path, x0=torch.tensor([1.0, 2.0], **f64), objective=Quadratic(torch.eye(2, **f64)))
    with pytest.raises(ValueError, match=r"other settings \(x0\)"):
        small(tmp_path, x0=torch.tensor(start, **f64), objective=Quadratic(torch.eye(2, **f64)))


def labels(flipped=0, n=50, dtype=torch.float64):
    """Logistic regression, and the share of right answers; some labels are turned"""
    X = torch.randn(n, 2, generator=torch.Generator().manual_seed(0), dtype=dtype)
    y = (X[:, 0] > 0).to(dtype) * 2 - 1
    y[n - flipped :] *= -1

    def right(f, x):
        return ((x @ X.T) * y > 0).double().mean(-1)

    return FiniteSum(lambda x: torch.nn.functional.softplus(-y * (X @ x)), n, 2), right


@pytest.mark.parametrize("flipped", [1, 15])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("seen", [True, False])
def test_other_data_are_refused(flipped, dtype, seen, tmp_path):
    """Turned labels are found, though one sample is drawn at a time and only the share of right answers, or nothing of them, is observed."""
    objective, right = labels(dtype=dtype)
    other, now = labels(flipped, dtype=dtype)

    def run(objective, right):
        return small(
            tmp_path,
            objective=objective,
            x0=torch.ones(2, dtype=dtype),
            observe={"right": right if seen else lambda f, x: x},
        )

    table = run(objective, right)
    with pytest.raises(ValueError, match="other settings .*the objective"):
        run(other, now)
    same(run(*labels(dtype=dtype)), table)  # the control: made anew


@pytest.mark.parametrize(
    "dtype, bit",
    [
        (torch.bfloat16, 2**-7),
        (torch.float16, 2**-10),
        (torch.float32, 1e-5),
        (torch.float64, 1e-13),
    ],
)
def test_another_curvature_at_every_precision(dtype, bit, tmp_path):
    """In half precision its last bit"""

    def run(curvature, n=1):
        threads = torch.get_num_threads()
        try:
            torch.set_num_threads(n)
            return small(
                tmp_path,
                objective=Quadratic(curvature * torch.eye(2, dtype=dtype), sigma=0.3),
                x0=torch.ones(2, dtype=dtype),
            )
        finally:
            torch.set_num_threads(threads)

    table = run(1.0)
    with pytest.raises(ValueError, match="the objective"):
        run(1.0 + bit)
    same(run(1.0, 2), table)


def test_threads_of_torch_do_not_matter():
    threads, tables = torch.get_num_threads(), []
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            tables.append(small(n_paths=500))
    finally:
        torch.set_num_threads(threads)
    same(*tables)


TABLE = {
    "no list of etas": (dict(etas=0.1), TypeError, "etas must be a list of numbers, got 0.1"),
    "no eta": (dict(etas=[]), ValueError, "etas must be at least 1, got none"),
    "eta twice": (dict(etas=[0.1, 0.1]), ValueError, "etas must be different"),
    "negative eta": (dict(etas=[-0.1]), ValueError, "eta must be positive and finite, got -0.1"),
    "negative rho": (dict(rhos=[-1]), ValueError, "rho must be non-negative and finite, got -1"),
    "rho is NaN": (
        dict(rhos=[float("nan")]),
        ValueError,
        "rho must be non-negative and finite, got nan",
    ),
    "no rho": (
        dict(rhos=[]),
        ValueError,
        "'SAM' of algorithms is a function of rho, but rhos are not given",
    ),
    "rhos for nobody": (
        dict(algorithms=[SGD()]),
        ValueError,
        "rhos are given, but none of algorithms is a function of rho",
    ),
    "class without a radius": (
        dict(algorithms=[SGD, SAM]),
        TypeError,
        "algorithm=SGD, rho=0.1: .* takes 1 positional argument",
    ),
    "two of one name": (
        dict(algorithms=[SAM(0.1), SAM]),
        ValueError,
        "algorithms must have different names",
    ),
    "one algorithm": (
        dict(algorithms=SAM),
        TypeError,
        "algorithms must be a mapping from names, or a list, got type",
    ),
    "algorithm is a number": (
        dict(algorithms={"SAM": 0.1}),
        TypeError,
        "algorithms must be Algorithms or functions of rho, got 0.1 for 'SAM'",
    ),
    "function makes no algorithm": (
        dict(algorithms={"SAM": lambda rho: rho}),
        TypeError,
        "rho=0.1: must make an Algorithm, got float",
    ),
    "no objective": (dict(objectives={}), ValueError, "objectives must be at least one, got none"),
    "objective of batch size": (
        dict(objectives={"net": network}),
        ValueError,
        "'net' of objectives is a function of batch_size, but batch_sizes are not",
    ),
    "batch size 0": (
        dict(objectives={"net": network}, batch_sizes=[0]),
        ValueError,
        "batch_size must be at least 1, got 0",
    ),
    "batch sizes for nobody": (
        dict(batch_sizes=[1]),
        ValueError,
        "batch_sizes are given, but none of objectives",
    ),
    "negative seed": (dict(seeds=[-1]), ValueError, "seed must be at least 0, got -1"),
    "seed 0.5": (dict(seeds=[0.5]), TypeError, "seed must be a whole number, got float"),
    "no seed": (dict(seeds=[]), ValueError, "seeds must be at least 1, got none"),
    "one path": (dict(n_paths=1), ValueError, "n_paths must be at least 2, got 1"),
    "t_end between two steps": (
        dict(etas=[0.1, 0.3]),
        ValueError,
        "objective=bowl, eta=0.3, .*t_end must be a whole number of eta=0.3, got 1",
    ),
    "interval between two steps": (
        dict(interval=0.25),
        ValueError,
        "eta=0.1.*interval must be a whole number of eta=0.1, got 0.25",
    ),
    "interval that does not end": (
        dict(interval=0.4),
        ValueError,
        "t_end must be a whole number of interval=0.4, got 1",
    ),
    "no substep": (dict(substeps=0), ValueError, "substeps must be at least 1, got 0"),
    "unknown process": (
        dict(processes=["SDE"]),
        TypeError,
        "process=str: 'str' object is not callable",
    ),
    "process is none": (
        dict(processes={"x": lambda *a: 3}),
        TypeError,
        "process=x: process must be a Chain, an SDE, or another Process, got int",
    ),
    "process that does not fit": (
        dict(processes={"x": lambda *a: SDE(*a, order=2)}),
        ValueError,
        "process=x: order=2 needs expansion='second' or 'exact'",
    ),
    "process with another eta": (
        dict(processes={"x": lambda a, o, eta: Chain(a, o, 0.2)}),
        ValueError,
        "process=x: the process must have the eta that it is asked for, got 0.2",
    ),
    "several radii at once": (
        dict(algorithms=[SAM(torch.tensor([0.1, 0.2]))], rhos=[]),
        ValueError,
        r"algorithm=SAM: must have one radius, got shape \(2,\)",
    ),
    "process with several radii": (
        dict(processes={"x": lambda a, *rest: Chain(SAM(torch.tensor([0.1, 0.2])), *rest)}),
        ValueError,
        "one eta and one rho",
    ),
    "no start": (
        dict(x0=None),
        ValueError,
        "objective=bowl.*x0 must hold a start for objective 'bowl'",
    ),
    "start of another": (
        dict(x0={"bowl": at, "net": at}),
        ValueError,
        "x0 holds starts for .'net'., which are no objectives",
    ),
    "start of the wrong length": (
        dict(x0=torch.ones(3, **f64)),
        ValueError,
        r"x0 must have shape \(..., 2\), got \(3,\)",
    ),
    "start for too few paths": (
        dict(x0=torch.ones(3, 2, **f64)),
        ValueError,
        r"x0 must have shape \(d,\) or \(4, d\), got \(3, 2\)",
    ),
    "start of another dtype": (dict(x0=torch.ones(2)), TypeError, "x0 is torch.float32"),
    "no observables": (
        dict(observe=torch.norm),
        TypeError,
        "observe must be a mapping from names to functions of an objective and points",
    ),
    "observable that mixes paths": (
        dict(observe={"m": lambda f, x: x.mean()}),
        ValueError,
        "observable 'm' must keep the leading axes",
    ),
    "observable that fails": (
        dict(observe={"m": lambda f, x: f.nothing}),
        ValueError,
        "algorithm=SGD, objective=bowl, .*no attribute 'nothing'",
    ),
}


@pytest.mark.parametrize("case", TABLE)
def test_bad_input(case, tmp_path):
    """Refused with the setting's name before any job runs, and no file is left."""
    change, error, message = TABLE[case]
    with pytest.raises(error, match=message):
        small(tmp_path / "new", **change)
    assert not (tmp_path / "new").exists()


def test_good_input_beside_it():
    assert len(small()) == 2 and len(small(interval=0.5, seeds=[0, 1], substeps=2)) == 12


def test_a_job_that_fails_says_which(tmp_path):
    """DNSAM that comes to a zero gradient after its first step; the jobs before it are kept."""
    still = Quadratic(torch.ones(1, 1, **f64))
    with pytest.raises(
        ValueError,
        match="algorithm=DNSAM, objective=still, eta=0.5, .*seed=0: DNSAM divides by the norm",
    ):
        small(
            tmp_path,
            algorithms=[SGD(), DNSAM],
            objectives={"still": still},
            etas=[0.5],
            x0=torch.tensor([0.75], **f64),
            rhos=[0.25],
            t_end=2.0,
        )
    assert len(files(tmp_path)) == 1


@pytest.mark.parametrize("name", ["schedule", "rho_schedule"])
def test_a_schedule_that_is_too_short(name):
    """It is refused before a job starts, as an observable of three paths that none is shown tells;
    one that reaches to the end is taken."""
    seen = []

    def watched(objective, x):
        seen.append(len(x))
        return objective.loss(x)

    def run(steps):
        rates = torch.full((steps,), 0.1, dtype=torch.float64)
        return sweep(
            {"SAM": SAM(0.1)},
            {"bowl": Quadratic(torch.eye(2, dtype=torch.float64), 0.1)},
            [0.1],
            t_end=0.4,
            n_paths=3,
            x0=torch.ones(2, dtype=torch.float64),
            processes={"chain": functools.partial(Chain, **{name: rates})},
            observe={"loss": watched},
        )

    with joblib.parallel_config(backend="sequential"):
        with pytest.raises(ValueError, match=f"process=chain: {name} has 3 .*, but step 3 is to"):
            run(3)
        assert 3 not in seen
        assert len(run(4)) == 1 and 3 in seen
