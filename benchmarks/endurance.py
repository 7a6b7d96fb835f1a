"""Endurance, measured: `make endurance`, or `python benchmarks/endurance.py [memory|paths|soak …] [--seconds 120]`. Prints a table; run it on a quiet machine.

memory: one ensemble over 10⁶ steps. paths: 10⁶ paths over 10³ steps. soak: the same jobs again and again, and then against a process that has just started."""
import argparse
import multiprocessing
import os
import resource
import sys
import time
from array import array

import numpy as np
import torch

from samsde.algorithm import SAM, USAM, Chain
from samsde.ensemble import simulate
from samsde.objective import FiniteSum, Quadratic, Recorder
from samsde.sde import SDE

MIB = 2**20


def resident() -> float:
    "MiB of this process that are in memory now"
    with open("/proc/self/statm") as f: return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / MIB

def peak() -> float: return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
def row(*cells): print("| " + " | ".join(cells) + " |", flush=True)

def bowl(d:int=4) -> Quadratic: return Quadratic(torch.diag(torch.linspace(.5, 1., d, dtype=torch.float64)), .1)
def logistic(n:int=32, d:int=4) -> FiniteSum:
    g = torch.Generator().manual_seed(0)
    A, y = torch.randn(n, d, generator=g, dtype=torch.float64), torch.randn(n, generator=g, dtype=torch.float64)
    return FiniteSum(lambda x: torch.nn.functional.softplus(y * (A @ x)), n, d, 4, select=lambda x, i: torch.nn.functional.softplus(y[i] * (A[i] @ x)))


def memory(seconds:float):
    "Is memory flat over 10⁶ steps? It is read at ten times within one run, by an observable."
    row("10⁶ steps", "paths", "memory after 10 % (MiB)", "at the end", "growth", "seconds", "steps a second"), row(*["---"] * 7)
    for name, process, steps in [("USAM, quadratic", Chain(USAM(.1), bowl(), .01), 10**6), ("SDE of SAM, quadratic", SDE(SAM(.1), bowl(), .01), 10**6),
                                 ("SAM, minibatches", Chain(SAM(.1), logistic(), .01), 10**5)]:
        seen, begin = [], time.perf_counter()
        def watch(x):
            seen.append(resident())
            return x.square().sum(-1)
        simulate(process, torch.ones(4, dtype=torch.float64), .01 * steps, 8, every=steps // 10, observe=watch)
        took = time.perf_counter() - begin
        row(f"{name}, {steps:,} steps", "8", f"{seen[1]:.1f}", f"{seen[-1]:.1f}", f"{seen[-1] - seen[1]:+.1f} MiB", f"{took:.0f}", f"{steps / took:,.0f}")


def paths(seconds:float):
    "10⁶ paths × 10³ steps: how much memory beyond that of the result?"
    row("10⁶ paths × 10³ steps", "d", "points (MiB)", "peak beyond the start (MiB)", "seconds", "path steps a second"), row(*["---"] * 6)
    for d, dtype in [(2, torch.float32)]:
        H, n, steps = torch.diag(torch.linspace(.5, 1., d, dtype=dtype)), 10**6, 10**3
        before, begin = resident(), time.perf_counter()
        run = simulate(SDE(USAM(.1), Quadratic(H, .1), .01), torch.ones(d, dtype=dtype), .01 * steps, n, every=100)
        took, points = time.perf_counter() - begin, run.final.numel() * run.final.element_size() / MIB
        row("SDE of USAM, quadratic, float32", f"{d}", f"{points:.1f}", f"{peak() - before:.0f}", f"{took:.0f}", f"{n * steps / took:,.0f}")


def soak_jobs() -> dict: # name -> function of a seed
    "Some hundredths of a second each"
    x0, a = torch.ones(4, dtype=torch.float64), torch.ones(10**4, dtype=torch.float64)
    def plain(seed):
        for _ in range(15_000): torch.mul(a, 1 + 1e-9, out=a)
    def job(process, n, threads=None): return lambda seed: simulate(process, x0, 1., n, every=50, seed=seed, threads=threads)
    sde = SDE(SAM(.1), bowl(), .01)
    return {"plain torch": plain, "SDE of SAM": job(sde, 4_000), "SDE of SAM, one thread": job(sde, 2_000, 1), "SAM, minibatches": job(Chain(SAM(.1), logistic(), .01), 1_000)}

def took(run, seed:int) -> float:
    start = time.perf_counter()
    run(seed)
    return time.perf_counter() - start

def fresh(pipe):
    "A process that does what it is told, and says how long that took"
    jobs = soak_jobs()
    while order := pipe.recv(): pipe.send(took(jobs[order[0]], order[1]))

def soak(seconds:float):
    """The same jobs in turn, again and again: does the speed drift, does memory grow? A machine's own speed drifts too, so at the end every job
    takes turns with itself in a process that has just started: what this one has become slower by is seen there. With two standard errors, of twenty blocks."""
    jobs, times, sizes, begin = soak_jobs(), array("d"), array("d"), time.perf_counter() # numbers side by side: a log is not to be taken for a leak
    while time.perf_counter() - begin < seconds or len(sizes) < 20:
        sizes.append(resident())
        times.extend(took(run, len(sizes)) for run in jobs.values())
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=fresh, args=(there,))
    process.start()
    there.close()
    def other(name, seed):
        here.send((name, seed))
        return here.recv()
    warm, ratios = Recorder.patience + 20, {name: array("d") for name in jobs}
    for k in range(warm + max(20, len(sizes) // 10)):
        for name, run in jobs.items():
            old, new = took(run, k) if k % 2 else None, other(name, k)
            if k >= warm: ratios[name].append((old or took(run, k)) / new)
    here.send(None), process.join()
    row(f"soak of {seconds:.0f} s", "jobs", "median job (ms)", "last tenth against second", "slower than a fresh process"), row(*["---"] * 5)
    for name, t in zip(jobs, np.array(times).reshape(len(sizes), -1).T):
        tenth, logs = len(t) // 10 + 1, [np.median(np.log(block)) for block in np.array_split(ratios[name], 20)]
        row(name, f"{len(t)}", f"{1e3 * np.median(t):.1f}", f"{100 * (np.median(t[-tenth:]) / np.median(t[tenth:2 * tenth]) - 1):+.1f} %",
            f"{100 * np.mean(logs):+.1f} ± {200 * np.std(logs, ddof=1) / 20**.5:.1f} %")
    print("\nMiB in memory, at eleven times: " + ", ".join(f"{sizes[k]:.1f}" for k in np.linspace(0, len(sizes) - 1, 11).astype(int)))


if __name__ == "__main__":
    parts = {"memory": memory, "paths": paths, "soak": soak}
    parser = argparse.ArgumentParser(description="Endurance of samsde, measured", epilog=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(parts)} (default: all)")
    parser.add_argument("--seconds", type=float, default=120., help="length of the soak (default: 120)")
    options = parser.parse_args()
    if unknown := set(options.parts) - set(parts): sys.exit(f"PART must be one of {', '.join(parts)}, got {', '.join(sorted(unknown))}")
    if not options.seconds > 0: sys.exit(f"--seconds must be positive, got {options.seconds}")
    print(f"# Endurance\n\n{torch.get_num_threads()} threads, torch {torch.__version__}, load {os.getloadavg()[0]:.1f} before the start.\n")
    for name in options.parts or parts:
        parts[name](options.seconds)
        print()
