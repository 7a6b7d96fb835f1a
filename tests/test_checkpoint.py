"""A run that is killed, interrupted or out of disk ends, after it was started again, with exactly the numbers of an undisturbed run."""

import errno
import functools
import io
import math
import multiprocessing
import os
import pickle
import random
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

import samsde.machinery.store
from samsde import ensemble
from samsde.algorithm import DNSAM, SAM, SGD, USAM, Chain
from samsde.machinery.store import FORMAT, RunState
from samsde.ensemble import simulate
from samsde.machinery.record import Recorder
from samsde.objective import FiniteSum, NoisyLoss, Quadratic
from samsde.sde import SDE

f64 = dict(dtype=torch.float64)
H, A = (
    torch.tensor([[2.0, 0.3], [0.3, 1.0]], **f64),
    torch.tensor([[1.0, 2.0], [3.0, -1.0], [0.5, 0.5]], **f64),
)
forks = pytest.mark.skipif(
    "forkserver" not in multiprocessing.get_all_start_methods(), reason="processes cannot fork here"
)


def data(batch_size=1, replace=True, rows=A, select=None):
    return FiniteSum(lambda x: (rows @ x - 1) ** 2 / 4, len(rows), 2, batch_size, replace)


def steep(sigma=0.5):
    return NoisyLoss(lambda x: (x**4).sum() / 4, 2, sigma)


def square(x):
    return x.square().sum(-1)


RUNS = {  # each some tenths of a second
    "8 blocks on 2 threads": lambda how: simulate(
        Chain(SAM(0.1), Quadratic(H.float(), 0.5), 0.1),
        torch.ones(2),
        4.0,
        200_000,
        every=20,
        keep=True,
        threads=2,
        **how,
    ),
    "all blocks in two chunks": lambda how: simulate(
        SDE(USAM(0.1), Quadratic(H, 0.5), 0.1),
        torch.ones(2, **f64),
        1.5,
        200_000,
        dt=0.05,
        every=5,
        threads=2,
        chunk=100_000,
        **how,
    ),
    "one block of minibatches": lambda how: simulate(
        Chain(SAM(0.1), data(2), 0.1),
        torch.ones(2, **f64),
        40.0,
        5,
        every=10,
        observe={"x": lambda x: x, "f": square},
        keep=True,
        **how,
    ),
    "a sweep in which paths diverge": lambda how: simulate(
        SDE(SAM(torch.tensor([0.0, 0.1], **f64)), steep(5.0), 0.1),
        torch.ones(2, **f64),
        60.0,
        200,
        every=3,
        threads=2,
        **how,
    ),
}


def numbers(ensemble) -> dict:
    "All numbers of an ensemble"
    parts = {"final": ensemble.final, "diverged_at": ensemble.diverged_at, "times": ensemble.times}
    for kind in ("mean", "std", "sem", "paths"):
        parts |= {f"{kind} {name}": t for name, t in getattr(ensemble, kind).items()}
    return {name: t.numpy() for name, t in parts.items()}


def same(a, b) -> bool:
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype and a[k].shape == b[k].shape and a[k].tobytes() == b[k].tobytes()
        for k in a
    )


def stored(path) -> dict:
    with np.load(path) as f:
        return dict(f)


def child(name, out, begun, how, pause=0.01):
    "What runs in a process of its own: writes its numbers, and those of the partial ensemble if it is interrupted"
    warnings.simplefilter("ignore")
    signal.signal(signal.SIGINT, signal.default_int_handler)  # see heard
    RunState.pause = pause
    begun.set()
    try:
        result, status = RUNS[name](how), "done"
    except KeyboardInterrupt as stop:
        result, status = stop.partial, "interrupted"
    np.savez(f"{out}.{status}.npz", **({} if result is None else numbers(result)))


@pytest.fixture(scope="module", autouse=True)
def heard():
    "A shell's background job ignores Ctrl-C, and so would every process that it starts"
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def fork(processes):
    "Starts a child in a process that is a copy of one which has torch, and what torch loads late, in memory already"

    def start(name, out, **how):
        begun = processes.Event()
        process = processes.Process(target=child, args=(name, out, begun, how))
        process.start()
        assert begun.wait(60)
        return process

    return start


@forks
@pytest.mark.parametrize("number, name", list(enumerate(RUNS)), ids=RUNS)
def test_killed_at_random_moments(fork, tmp_path, number, name):
    """kill -9, five times for each of four runs; what comes out in the end is the undisturbed run, to the last bit. The control is another seed."""

    def undisturbed(seed):
        process, begin = fork(name, tmp_path / f"seed{seed}", seed=seed), time.monotonic()
        process.join(100)
        return stored(tmp_path / f"seed{seed}.done.npz"), time.monotonic() - begin

    (whole, took), (other, _) = undisturbed(0), undisturbed(1)
    moments, kills, used, file = random.Random(number), 0, 0, tmp_path / "run.npz"
    for attempt in range(100):
        used += file.exists()  # there is something to go on from
        process = fork(name, tmp_path / f"try{attempt}", seed=0, checkpoint=file)
        if kills < 5 or not used:
            process.join(moments.uniform(0.1, 1) * took)
        else:
            process.join(100)
        if process.is_alive():
            process.kill()
            process.join()
        if process.exitcode == 0:
            assert same(stored(tmp_path / f"try{attempt}.done.npz"), whole)
            if kills >= 5 and used:
                break
            file.unlink()  # finished before it was killed: once more
        else:
            assert process.exitcode == -signal.SIGKILL
            kills += 1
    assert kills >= 5 and used and not same(other, whole)
    assert all(
        p == file or p.suffix == ".part" for p in tmp_path.glob("run*")
    )  # of the killed ones, for an hour


@forks
@pytest.mark.parametrize("name", ["8 blocks on 2 threads", "one block of minibatches"])
def test_interrupted_by_a_signal(fork, tmp_path, name):
    """The KeyboardInterrupt has what is done, and there is a file to go on from."""
    process, file = (
        fork(name, tmp_path / "first", checkpoint=tmp_path / "run.npz"),
        tmp_path / "run.npz",
    )
    while not file.exists():
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGINT)
    process.join(60)
    partial = stored(tmp_path / "first.interrupted.npz")
    for out, how in (("again", dict(checkpoint=file)), ("whole", {})):
        fork(name, tmp_path / out, **how).join(100)
    whole = stored(tmp_path / "whole.done.npz")
    assert same(stored(tmp_path / "again.done.npz"), whole)
    if "one block" in name:
        assert not partial  # no path was at its end
    else:
        assert 0 <= len(partial.get("final", ())) < 200_000 and (
            not partial or (partial["final"] == whole["final"][: len(partial["final"])]).all()
        )


def test_interrupt_ends_a_program_as_ever(tmp_path):
    """A program that does not catch it ends by SIGINT, as shells expect, and says what was done."""
    program = (
        "import torch; from samsde.algorithm import *; from samsde.ensemble import simulate; from samsde.objective import Quadratic\n"
        "simulate(Chain(SAM(.1), Quadratic(torch.eye(2)), .1), torch.ones(2), 1e5, 4, observe=lambda x: print('on', flush=True) or x, every=10**5, threads=1)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "on\n"
        process.send_signal(signal.SIGINT)
        error = process.communicate(timeout=60)[1]
    assert (
        process.returncode == -signal.SIGINT
        and "KeyboardInterrupt: 0 of 4 paths were done" in error
    )


# Smaller runs, in this process: 12 paths in blocks of 4, where an observable counts and stops
calls, stop_at = [0], [0]


def watch(x):
    calls[0] += 1
    if calls[0] == stop_at[0]:
        raise KeyboardInterrupt
    return x


@pytest.fixture
def small(monkeypatch):
    "A run of three blocks; states are kept after every step"
    monkeypatch.setattr(RunState, "pause", 0)
    monkeypatch.setattr("samsde.ensemble.block_size", lambda n, size: 4)

    def go(process=None, x0=None, t_end=2.0, n_paths=12, stop=0, **how):
        calls[0], stop_at[0] = 0, stop
        return simulate(
            process or Chain(SAM(0.1), Quadratic(H, 0.5), 0.1),
            torch.ones(2, **f64) if x0 is None else x0,
            t_end,
            n_paths,
            **dict(observe=watch, threads=1) | how,
        )

    return go


@pytest.fixture
def file(small, tmp_path):
    "A checkpoint with a block that is done, and one on its way"
    with pytest.raises(KeyboardInterrupt):
        small(stop=30, checkpoint=tmp_path / "run.npz")
    return tmp_path / "run.npz"


def refused(go, file, match):
    before = file.read_bytes()
    with pytest.raises(ValueError, match=match):
        go(checkpoint=file)
    assert file.read_bytes() == before and [p.name for p in file.parent.iterdir()] == [file.name]


@pytest.mark.parametrize("stop", range(2, 65, 7))
@pytest.mark.parametrize(
    "process",
    [
        Chain(SAM(0.1), Quadratic(H, 0.5), 0.1),
        SDE(SAM(0.1), steep(), 0.1, seed=None),
        Chain(DNSAM(0.1), data(2, False), 0.1),
    ],
    ids=["additive", "drawn", "minibatches"],
)
def test_stopped_at_every_record(small, tmp_path, process, stop):
    """Only what was not known is computed again: at most the record at which it stopped."""
    whole, file = numbers(small(process)), tmp_path / "run.npz"
    assert calls[0] == 63
    with pytest.raises(KeyboardInterrupt) as error:
        small(process, stop=stop, checkpoint=file)
    assert len(error.value.partial.final if error.value.partial else ()) == (stop - 2) // 21 * 4
    assert (
        same(numbers(small(process, checkpoint=file)), whole)
        and calls[0] <= 1 + 63 - (stop - 2) + 1
    )
    assert same(numbers(small(process, checkpoint=file)), whole) and calls[0] == 1  # the probe's
    assert not same(numbers(small(process, seed=1)), whole)


@pytest.mark.parametrize("stop", range(3, 90, 9))
def test_stopped_where_a_path_diverges(small, tmp_path, stop):
    """A block in which a path diverges is run twice, and is stopped here in either run."""
    process, x0, file = Chain(SAM(0.1), steep(), 0.1), twelve.clone(), tmp_path / "run.npz"
    x0[5] = 40.0
    with pytest.warns(UserWarning, match="1 of 12 paths diverged, the first, path 5"):
        whole = numbers(small(process, x0))
    assert calls[0] == 63 + 21
    with pytest.raises(KeyboardInterrupt), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        small(process, x0, stop=stop, checkpoint=file)
    with pytest.warns(UserWarning, match="path 5"):
        again = small(process, x0, checkpoint=file)
    assert same(numbers(again), whole) and calls[0] <= 1 + 84 - (stop - 2) + 1


def test_the_main_thread_takes_no_steps(small):
    """Signals reach the main thread. An interrupt in the middle of a vmap would leave torch in disorder."""
    seen = set()
    small(observe=lambda x: seen.add(threading.current_thread()) or x)
    assert len(seen) == 1 and threading.main_thread() not in seen


def test_threads_and_chunks_may_change(small, file):
    whole = numbers(small())
    for how in (dict(threads=2), dict(chunk=12), dict(threads=2, chunk=8), dict(progress=False)):
        copy = file.with_name("copy.npz")
        copy.write_bytes(file.read_bytes())
        assert same(numbers(small(checkpoint=copy, **how)), whole)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_precision(small, tmp_path, dtype):
    process, x0 = Chain(SAM(0.1), Quadratic(H.to(dtype), 0.5), 0.1), torch.ones(2, dtype=dtype)
    whole = small(process, x0, keep=True)
    with pytest.raises(KeyboardInterrupt):
        small(process, x0, keep=True, stop=30, checkpoint=tmp_path / "run.npz")
    again = small(process, x0, keep=True, checkpoint=tmp_path / "run.npz")
    assert (
        again.final.equal(whole.final)
        and again.mean["watch"].equal(whole.mean["watch"])
        and again.paths["watch"].equal(whole.paths["watch"])
    )
    assert again.paths["watch"].dtype == dtype


def test_a_network_from_its_record(small, tmp_path, monkeypatch):
    """Steps of a network are replayed from a record after some calls. A run that goes on in a new process, before it has one, gives the same numbers."""
    made = []

    class Known(Recorder):
        def __init__(self):
            super().__init__()
            made.append(self)

    monkeypatch.setattr("samsde.ensemble.Recorder", Known)

    def network():
        net = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Tanh(), torch.nn.Linear(3, 1))
        with torch.no_grad():
            for k, p in enumerate(net.parameters()):
                p.copy_(torch.linspace(-1, 1, p.numel()).add(k).sin().view_as(p))
        return FiniteSum.from_module(net, torch.nn.MSELoss(), A.float(), A[:, :1].float())

    for kind in (Chain, SDE):
        go = lambda **how: small(kind(SAM(0.1), network(), 0.1), network().x0, 40.0, 4, **how)
        whole, file = numbers(go()), tmp_path / f"{kind.__name__}.npz"
        assert made and made[-1].records  # there was one
        assert same(numbers(go(record=False)), whole)
        with pytest.raises(KeyboardInterrupt):
            go(stop=90, checkpoint=file)
        assert same(numbers(go(checkpoint=file)), whole)


class Full(io.FileIO):
    "A file on a disk with so many bytes left"

    def __init__(self, path, left):
        super().__init__(path, "wb")
        self.left = left

    def write(self, data):
        self.left -= len(data)
        if self.left < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(data)


def fill(monkeypatch, left, files=0):
    "From now on files are written to a disk that has place for so many of them, and so many bytes more"
    usual, count = Path.open, [0]

    def full(path, mode="r", *rest, **more):
        if "w" not in mode:
            return usual(path, mode, *rest, **more)
        count[0] += 1
        return (
            usual(path, mode, *rest, **more)
            if count[0] <= files
            else io.BufferedWriter(Full(path, left), 64)
        )

    monkeypatch.setattr(Path, "open", full)


@pytest.mark.parametrize("left", [0, 100, 3_000])
@pytest.mark.parametrize("files", [0, 1])
def test_full_disk(small, tmp_path, monkeypatch, left, files):
    """The run goes on, warns, and returns its numbers; the last good file is there, and nothing else."""
    whole, file = numbers(small()), tmp_path / "run.npz"
    with (
        monkeypatch.context() as change,
        pytest.warns(UserWarning, match="could not be written .*No space left.*: the run goes on"),
    ):
        fill(change, left, files)
        run = small(checkpoint=file)
    assert same(numbers(run), whole) and [p.name for p in tmp_path.iterdir()] == ["run.npz"] * files
    assert (
        same(numbers(small(checkpoint=file)), whole) and 1 < calls[0] <= 64 - files
    )  # one file: it was used


def test_full_disk_when_interrupted(small, file, monkeypatch):
    """What is done is in the interrupt all the same, and the old file stays."""
    before = file.read_bytes()
    with (
        monkeypatch.context() as change,
        pytest.warns(UserWarning, match="No space left"),
        pytest.raises(KeyboardInterrupt) as error,
    ):
        fill(change, 3_000)
        small(stop=30, checkpoint=file)
    assert (
        len(error.value.partial.final) == 8
        and file.read_bytes() == before
        and len(list(file.parent.iterdir())) == 1
    )


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() or not sys.platform.startswith("linux"),
    reason="only root may mount a file system",
)
def test_full_file_system(small, tmp_path):
    """A real one, of 8 KiB, on which not even the smallest checkpoint has room."""
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8k", "samsde", tmp_path], capture_output=True
    ).returncode:
        pytest.skip("no mount here")
    try:
        (tmp_path / "other").write_bytes(bytes(8192))
        with pytest.warns(UserWarning, match="No space left"):
            run = small(keep=True, checkpoint=tmp_path / "run.npz")
        assert same(numbers(run), numbers(small(keep=True))) and [
            p.name for p in tmp_path.iterdir()
        ] == ["other"]
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def test_random_damage(small, file):
    """Files cut short are refused. A file with a bit turned is refused, or, where the bit means nothing, gives the right numbers."""
    whole, good, draw, refusals = numbers(small()), file.read_bytes(), random.Random(0), 0
    for size in [0, 1, len(good) - 1, *(draw.randrange(len(good)) for _ in range(30))]:
        file.write_bytes(good[:size])
        refused(small, file, "is no file of samsde, or damaged")
    for _ in range(200):
        i, bit = draw.randrange(len(good)), 1 << draw.randrange(8)
        file.write_bytes(good[:i] + bytes([good[i] ^ bit]) + good[i + 1 :])
        try:
            assert same(numbers(small(checkpoint=file)), whole)
        except ValueError as error:
            assert "is no file of samsde, or damaged" in str(error)
            refusals += 1
    assert refusals > 150


def test_other_files(small, file):
    """Text, a pickle, an array, another zip: refused, and not opened as a pickle."""

    class Trap:
        def __reduce__(self):
            return os._exit, (1,)

    trap, one = io.BytesIO(), io.BytesIO()
    np.savez(trap, about=np.array([Trap()], dtype=object))
    np.save(one, np.ones(3))
    other = io.BytesIO()
    with zipfile.ZipFile(other, "w") as z:
        z.writestr("a.txt", "hello")
    for content in (
        b"hello",
        pickle.dumps(Trap()),
        one.getvalue(),
        trap.getvalue(),
        other.getvalue(),
    ):
        file.write_bytes(content)
        refused(small, file, "is no file of samsde, or damaged")


def test_changed_by_hand(small, tmp_path):
    """A file in which an array or what it says of itself is another: by name, shape, dtype or one number."""
    file = tmp_path / "run.npz"
    with pytest.raises(KeyboardInterrupt):
        small(stop=30, keep=True, checkpoint=file)
    good = stored(file)
    assert {
        "part0:final",
        "part0:mean0",
        "part0:paths0",
        "block4:m20",
        "block4:counted",
        "block4:generator",
    } <= set(good)

    def changed(a):
        if a.ndim == 0 and a.dtype.kind == "U":
            return np.array(str(a)[:-1] + " " + str(a)[-1])
        a = a.copy()
        a.reshape(-1).view(np.uint8)[-1] ^= 1
        return a

    for name, a in good.items():
        others = [
            good | {name: changed(a)},
            {k: v for k, v in good.items() if k != name},
            good | {name + "0": a},
        ]
        if a.dtype.kind not in "US":
            others += [good | {name: a[..., None]}, good | {name: a.astype(np.float16)}]
        for bad in others:
            np.savez(file, **bad)
            refused(lambda **how: small(keep=True, **how), file, "is no file of samsde, or damaged")
    np.savez(file, **good)
    assert small(keep=True, checkpoint=file).n_paths == 12  # the control


@pytest.mark.parametrize(
    "about", ["null", "[]", "3", '"text"', "{}", "[" * 10**5, '{"format": {}}', '{"format": 3}']
)
def test_a_file_that_says_little(small, file, about):
    np.savez(file, **stored(file) | {"about": np.array(about.encode())})
    refused(small, file, "damaged|has format {}")


@pytest.mark.parametrize("name", ["about", "part0:final", "more"])
def test_a_bomb(small, file, name):
    """A file of a megabyte that unpacks to a gigabyte is refused before that, with little memory, at once."""
    with zipfile.ZipFile(file) as z:
        good = {n: z.read(n) for n in z.namelist() if n != f"{name}.npy"}
    dtype = "'<U268435456'" if name == "about" else "'<f8'"
    shape = "()" if name == "about" else "(134217728,)"
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, dict(descr=dtype.strip("'"), fortran_order=False, shape=eval(shape))
    )
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as z:
        for n, content in good.items():
            z.writestr(n, content)
        with z.open(f"{name}.npy", "w", force_zip64=True) as f:
            f.write(header.getvalue())
            for _ in range(2**10):
                f.write(bytes(2**20))
    assert file.stat().st_size < 2**21
    tracemalloc.start()
    begin = time.monotonic()
    refused(small, file, "damaged")
    assert time.monotonic() - begin < 2 and tracemalloc.get_traced_memory()[1] < 2**27
    tracemalloc.stop()


def test_a_link(small, tmp_path):
    """What a link leads to is written, wherever it is, also where nothing is there yet; the link stays."""
    whole, link = numbers(small()), tmp_path / "run.npz"
    for target in (tmp_path / "other" / "target.npz", tmp_path / "other" / "again.npz"):
        target.parent.mkdir(exist_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to(target)
        with pytest.raises(KeyboardInterrupt):
            small(stop=30, checkpoint=link)
        assert link.is_symlink() and target.is_file() and not target.is_symlink()
        assert same(numbers(small(checkpoint=link)), whole) and link.is_symlink()
    assert sorted(p.name for p in target.parent.iterdir()) == ["again.npz", "target.npz"]
    link.unlink()
    link.symlink_to(tmp_path / "nowhere" / "target.npz")
    with pytest.raises(ValueError, match="checkpoint must be a file in a folder that exists"):
        small(checkpoint=link)


def test_no_file(small, tmp_path):
    """A folder and a pipe are no files; a pipe is not waited for."""
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(ValueError, match="checkpoint must be a file, but"):
            small(checkpoint=path)


def test_what_a_killed_writer_left_goes(small, file):
    """After an hour, since another run may be writing."""
    for name in ("run.npz.0123abcd.part", "other.npz.0123abcd.part", "run.npz.ffffffff.part"):
        (file.parent / name).write_text("half")
    for name in ("run.npz.0123abcd.part", "other.npz.0123abcd.part"):
        os.utime(file.parent / name, (0, 0))
    small(checkpoint=file)
    assert sorted(p.name for p in file.parent.iterdir()) == [
        "other.npz.0123abcd.part",
        "run.npz",
        "run.npz.ffffffff.part",
    ]


def test_interrupted_while_it_writes(small, file, monkeypatch):
    """Nothing but the last good file is left."""
    before = file.read_bytes()

    def interrupt(f, **arrays):
        f.write(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as change, pytest.raises(KeyboardInterrupt):
        change.setattr(np, "savez", interrupt)
        small(checkpoint=file)
    assert file.read_bytes() == before and len(list(file.parent.iterdir())) == 1


def test_two_runs_write_to_one_file(small, tmp_path, monkeypatch):
    """Both have begun before either writes: each returns its own numbers, and the file is whole: of one of them."""
    both_there, opened = threading.Barrier(2), ensemble.opened

    def opened_together(*args):
        run_state = opened(*args)
        both_there.wait(60)
        return run_state

    file, seeds = tmp_path / "run.npz", [0, 1]
    alone = [numbers(small(observe=square, seed=seed, t_end=6.0)) for seed in seeds]
    with warnings.catch_warnings(), ThreadPoolExecutor(2) as pool, monkeypatch.context() as patched:
        warnings.simplefilter("error")
        patched.setattr(ensemble, "opened", opened_together)
        both = list(
            pool.map(
                lambda seed: numbers(small(observe=square, seed=seed, t_end=6.0, checkpoint=file)),
                seeds,
            )
        )
    assert all(same(a, b) for a, b in zip(both, alone)) and len(list(tmp_path.iterdir())) == 1
    again = []
    for seed in seeds:
        try:
            again.append(
                same(
                    numbers(small(observe=square, seed=seed, t_end=6.0, checkpoint=file)),
                    alone[seed],
                )
            )
        except ValueError as error:
            assert "belongs to a run with other settings (seed)" in str(error)
    assert again == [True]


HARMS = {  # what an observable may do to the points that it is shown
    "numpy": lambda x: x.numpy().fill(0),
    "data": lambda x: x.data.zero_(),
    "in place": lambda x: x.mul_(0),
    "resized": lambda x: x.resize_(0),
    "a view": lambda x: x[..., 0].fill_(7.0),
    "set": lambda x: x.set_(torch.zeros(3, **f64)),
}


@pytest.mark.parametrize("harm", HARMS)
@pytest.mark.parametrize("start", ["one", "each"])
def test_an_observable_that_changes_its_points(small, tmp_path, harm, start):
    """The simulation, the next observable, the user's start and a checkpoint's sketches are as without it."""
    x0 = torch.ones(2, **f64) if start == "one" else torch.linspace(1, 2, 24, **f64).reshape(12, 2)
    before = x0.clone()

    def harmful(x):
        first = x[..., 0].clone()
        HARMS[harm](x)
        return first

    both = {"first": harmful, "x": lambda x: x}
    plain = small(x0=x0, observe={"first": lambda x: x[..., 0], "x": lambda x: x}, keep=True)
    for how in ({}, dict(checkpoint=tmp_path / "run.npz"), dict(checkpoint=tmp_path / "run.npz")):
        assert same(
            numbers(small(x0=x0, observe=both, keep=True, **how)), numbers(plain)
        ) and x0.equal(before)


def test_an_observable_with_one_buffer(small):
    """It writes into the same array at every call, a numpy array or a tensor."""
    for buffer in (np.zeros(12), torch.zeros(12, **f64)):

        def reused(x):
            into = buffer[: len(x)]
            into[:] = x.square().sum(-1)
            return into

        assert same(
            numbers(small(observe={"f": reused}, keep=True)),
            numbers(small(observe={"f": square}, keep=True)),
        )


def test_a_process_that_changes_its_points(small):
    """A step in place: the user's start stays."""

    class InPlace(Chain):
        def advance(self, x, draw, steps):
            return x.copy_(super().advance(x, draw, steps))

    x0 = twelve.clone()
    assert same(
        numbers(small(InPlace(SAM(0.1), bowl, 0.1), x0=x0)), numbers(small(x0=twelve))
    ) and x0.equal(twelve)


bowl, mirror = Quadratic(H, 0.5), torch.tensor([1.0, -1.0], **f64)
twelve = torch.linspace(-1, 1, 24, **f64).reshape(12, 2)
late = A.clone()
late[2] += 1e-6


def close(x):
    return watch(x) * (1 + 1e-9)


def beyond(x, at):
    return x[..., 0] > at


def hit(at):
    return lambda x: x[..., 0] > at


def wall(at):
    return lambda x: x.square().sum() / 2 + torch.relu(x[0].abs() - at) ** 3


def sharp(curvature, dtype):
    return dict(
        process=Chain(
            SAM(0.1), Quadratic(torch.diag(torch.tensor([1.0, curvature], dtype=dtype)), 0.5), 0.1
        ),
        x0=torch.ones(2, dtype=dtype),
    )


def turned(dtype, k=0):
    y = torch.ones(500, dtype=dtype)
    y[:k] = -1
    rows = torch.randn(500, 2, generator=torch.Generator().manual_seed(0), dtype=dtype)
    return dict(
        process=Chain(
            SGD(), FiniteSum(lambda x: torch.nn.functional.softplus(-y * (rows @ x)), 500, 2), 0.1
        ),
        x0=torch.ones(2, dtype=dtype),
    )


OTHERS = {  # base, what differs, what the refusal names
    "seed": ({}, dict(seed=1), "seed"),
    "end": ({}, dict(t_end=2.1), "times"),
    "records": ({}, dict(every=2), "times"),
    "paths": ({}, dict(n_paths=16), "shape"),
    "step": (dict(process=SDE(SAM(0.1), bowl, 0.1)), dict(dt=0.05), "times"),
    "kept": ({}, dict(keep=True), "keep"),
    "start": ({}, dict(x0=mirror), "x0"),
    "start by one bit": ({}, dict(x0=torch.nextafter(torch.ones(2, **f64), mirror)), "x0"),
    "starts in another order": (dict(x0=twelve), dict(x0=twelve.flip(0)), "x0"),
    "a start at 0 sees no curvature": (
        dict(x0=torch.zeros(2, **f64), process=Chain(USAM(0.1), bowl, 0.1)),
        dict(process=Chain(USAM(0.1), Quadratic(2 * H, 0.5), 0.1)),
        "what a step does",
    ),
    "algorithm": ({}, dict(process=Chain(USAM(0.1), bowl, 0.1)), "algorithm"),
    "radius by one bit": (
        {},
        dict(process=Chain(SAM(math.nextafter(0.1, 1)), bowl, 0.1)),
        "algorithm",
    ),
    "learning rate by one bit": (
        {},
        dict(process=Chain(SAM(0.1), bowl, math.nextafter(0.1, 1))),
        "process",
    ),
    "SDE": ({}, dict(process=SDE(SAM(0.1), bowl, 0.1)), "process"),
    "curvature": (
        {},
        dict(process=Chain(SAM(0.1), Quadratic(H + 1e-8, 0.5), 0.1)),
        "what a step does",
    ),
    "noise": ({}, dict(process=Chain(SAM(0.1), Quadratic(H, 0.5 + 1e-8), 0.1)), "what a step does"),
    "expansion": (
        dict(process=SDE(SAM(0.1), bowl, 0.1)),
        dict(process=SDE(SAM(0.1), bowl, 0.1, "exact")),
        "process",
    ),
    "order": (
        dict(process=SDE(SAM(0.1), bowl, 0.1, "exact")),
        dict(process=SDE(SAM(0.1), bowl, 0.1, "exact", order=2)),
        "process",
    ),
    "draws": (
        dict(process=SDE(SAM(0.1), steep(), 0.1)),
        dict(process=SDE(SAM(0.1), steep(), 0.1, draws=512)),
        "process",
    ),
    "batch size": (
        dict(process=Chain(SAM(0.1), data(), 0.1)),
        dict(process=Chain(SAM(0.1), data(2), 0.1)),
        "process",
    ),
    "replacement": (
        dict(process=Chain(SAM(0.1), data(2), 0.1)),
        dict(process=Chain(SAM(0.1), data(2, False), 0.1)),
        "what a step does",
    ),
    "a row of the data": (
        dict(process=Chain(SAM(0.1), data(), 0.1)),
        dict(process=Chain(SAM(0.1), data(rows=late), 0.1)),
        "what a step does",
    ),
    **{
        f"curvature in {t}": (sharp(1.0, t), sharp(1 + bit, t), "the objective")
        for t, bit in {
            torch.bfloat16: 2**-7,
            torch.float16: 2**-10,
            torch.float32: 1e-5,
            torch.float64: 1e-13,
        }.items()
    },
    "curvature 1.3 in bfloat16": (
        sharp(1.0, torch.bfloat16),
        sharp(1.3, torch.bfloat16),
        "what a step does",
    ),
    **{
        f"a label of 500 in {t}": (turned(t), turned(t, 1), "the objective")
        for t in (torch.bfloat16, torch.float32, torch.float64)
    },
    "observable": ({}, dict(observe={"watch": close}), "what is observed"),
    **{
        f"{name} of an observable": (
            dict(observe={"hit": a, "watch": watch}),
            dict(observe={"hit": b, "watch": watch}),
            "what is observed",
        )
        for name, (a, b) in {
            "code": (lambda x: x[..., 0] > 2e3, lambda x: x[..., 0] > 3e3),
            "closure": (hit(1e3), hit(1.01e3)),
            "default": (lambda x, at=1e3: x[..., 0] > at, lambda x, at=2e3: x[..., 0] > at),
            "argument": (functools.partial(beyond, at=1e3), functools.partial(beyond, at=2e3)),
            "tensor": (hit(torch.tensor(8.0)), hit(torch.tensor(80.0))),
        }.items()
    },
    "a loss far off": (
        dict(process=Chain(SAM(0.1), NoisyLoss(wall(8.0), 2, 0.5), 0.1)),
        dict(process=Chain(SAM(0.1), NoisyLoss(wall(30.0), 2, 0.5), 0.1)),
        "what a step does",
    ),
    "name of an observable": ({}, dict(observe={"look": watch}), "observe"),
    "shared noise": (
        dict(process=Chain(SAM(torch.tensor([0.1, 0.2], **f64)), bowl, 0.1)),
        dict(share=True),
        "shape",
    ),
}


@pytest.mark.parametrize("case", OTHERS)
def test_another_run(small, tmp_path, case):
    """Whatever decides the numbers is compared, and what differs is named."""
    base, change, name = OTHERS[case]
    file = tmp_path / "run.npz"
    with pytest.raises(KeyboardInterrupt):
        small(stop=10, checkpoint=file, **base)
    refused(
        lambda **how: small(**base | change | how),
        file,
        rf"belongs to a run with other settings \(.*{name}",
    )
    assert small(checkpoint=file, **base).n_paths == 12


def test_a_counter_is_no_other_observable(small, tmp_path):
    """Nor is one that says the same in another place; and what cannot be observed far off is observed near."""
    file, seen = tmp_path / "run.npz", []
    for _ in range(2):
        count = len(seen)

        def counted(x):
            nonlocal count
            count += 1
            assert x.abs().max() < 30, "too far"
            return x.square().sum(-1)

        seen.append(small(observe=counted, checkpoint=file).final)
        count = 17
    assert seen[0].equal(seen[1])


def test_another_version(small, file, monkeypatch):
    for target, name in (
        ("samsde.machinery.store.__version__", "samsde"),
        ("torch.__version__", "torch"),
    ):
        with monkeypatch.context() as change:
            change.setattr(target, "0.0")
            refused(small, file, rf"other settings \({name}\)")
    with monkeypatch.context() as change:
        change.setattr(samsde.machinery.store, "FORMAT", FORMAT + 1)
        refused(small, file, f"has format {FORMAT}, but this version of samsde has {FORMAT + 1}")
    assert small(checkpoint=file).n_paths == 12


def test_rounding_is_no_other_run(small, file):
    """The last bits of a step may differ between machines: the run goes on."""

    class Elsewhere(Quadratic):
        def grad(self, x):
            return super().grad(x) * (1 + 4e-16)

    assert small(Chain(SAM(0.1), Elsewhere(H, 0.5), 0.1), checkpoint=file).n_paths == 12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_threads_are_no_other_run(small, tmp_path, dtype):
    """Sums over many samples are rounded otherwise by another number of threads; the sketches are not."""
    rows = torch.randn(20_000, 2, generator=torch.Generator().manual_seed(0), dtype=dtype)

    def run():
        sum_ = FiniteSum(lambda x: torch.nn.functional.softplus(rows @ x), len(rows), 2)
        return small(
            Chain(SGD(), sum_, 0.1),
            torch.ones(2, dtype=dtype),
            0.5,
            checkpoint=tmp_path / "run.npz",
            threads=1,
        ).final

    before, seen = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            seen.append(run())
            assert torch.get_num_threads() == n
    finally:
        torch.set_num_threads(before)
    assert seen[0].equal(seen[1]) and seen[0].equal(seen[2])
