"""Endurance, measured: `make endurance`, or `python benchmarks/endurance.py [memory|paths|soak …] [--seconds 120]`. Prints a table; run it on a quiet machine.

memory: one ensemble over 10⁶ steps. paths: 10⁶ paths over 10³ steps. soak: the same job again and again, and its speed over time."""
import argparse
import os
import resource
import sys
import time
from array import array

import numpy as np
import torch

from samsde.algorithm import SAM, USAM, Chain
from samsde.ensemble import simulate
from samsde.objective import FiniteSum, Quadratic
from samsde.sde import SDE

MIB = 2**20


def resident() -> float:
    "MiB of this process that are in memory now"
    with open("/proc/self/statm") as f: return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / MIB

def peak() -> float: return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
def row(*cells): print("| " + " | ".join(cells) + " |", flush=True)
def slope(t, y, blocks:int=20) -> tuple: # per unit of t, with its standard error
    "Of the medians of blocks: neighbouring jobs share the machine's moods, and are not independent"
    t, y = (np.array([np.median(block) for block in np.array_split(v, min(blocks, len(v)))]) for v in (t, y))
    c = t - t.mean()
    b = (c @ y) / (c @ c)
    rest = y - y.mean() - b * c
    return b, (rest @ rest / max(len(t) - 2, 1) / (c @ c))**.5

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


def soak(seconds:float):
    """Jobs in turn, again and again: does the speed drift, does memory grow? Slopes over the time after the first tenth, of the medians of twenty blocks, with two standard errors.
    A machine's own speed drifts too: beside a job's time stands its ratio to that of a loop of plain torch, which has just had its turn."""
    x0, a = torch.ones(4, dtype=torch.float64), torch.ones(10**4, dtype=torch.float64)
    def plain(seed):
        for _ in range(15_000): torch.mul(a, 1 + 1e-9, out=a)
    def job(process, n): return lambda seed: simulate(process, x0, 1., n, every=50, seed=seed)
    jobs = {"plain torch": plain, "SDE of SAM, quadratic": job(SDE(SAM(.1), bowl(), .01), 4_000), "SAM, minibatches": job(Chain(SAM(.1), logistic(), .01), 1_000)}
    log, n, begin = array("d"), 0, time.perf_counter() # numbers side by side: the log of a long soak is not to be taken for a leak
    while (now := time.perf_counter() - begin) < seconds or n < 20:
        log.extend((now, resident()))
        for run in jobs.values():
            start = time.perf_counter()
            run(n)
            log.append(time.perf_counter() - start)
        n += 1
    t, size, *times = np.array(log).reshape(n, -1)[n // 10:].T
    def drift(values, unit, scale): return "{:+.1f} ± {:.1f} {}".format(*np.array(slope(t, values)) * [1, 2] * (t[-1] - t[0]) * scale, unit)
    def relative(values): return drift(values, "%", 100 / np.median(values))
    row(f"soak of {seconds:.0f} s", "jobs", "median job (ms)", "drift", "drift against plain torch"), row(*["---"] * 5)
    for name, took in zip(jobs, times): row(name, f"{n}", f"{1e3 * np.median(took):.1f}", relative(took), relative(took / times[0]) if took is not times[0] else "")
    print(f"\nMemory grew by {drift(size, 'MiB', 1)}.")


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
