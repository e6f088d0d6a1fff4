"""The accuracy figures of the README: `tiedkl verify`, KL as it becomes small, and suites of float32 alone.

    python benchmarks/accuracy.py              everything, some fifteen minutes; JSON under benchmarks/results/cpu/
    python benchmarks/accuracy.py --suites 0   without the float32 suites
    python benchmarks/accuracy.py --smoke      toy size, for continuous integration; keeps nothing

`python benchmarks/readme_tables.py` puts the figures into the README.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tempfile
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import tiedkl
from tiedkl import cli, reference
from tiedkl.bench.store import write_json
from tiedkl.environment import stamp
from tiedkl.problem import Options, Problem

RESULT = Path(__file__).parent / "results" / "cpu" / "accuracy.json"
TAU = 20.0
CASES, SUITES = 464, 10


def small_kl(n: int, v: int, d: int) -> list[dict[str, float]]:
    """Largest relative error of a token's KL in float32, for hidden states ever nearer to the target's embedding."""
    torch.manual_seed(0)
    w, y = 0.3 * torch.randn(v, d), torch.randint(v, (n,))
    s = w[y] @ w.T
    loss_fn = tiedkl.FusedTiedLoss(temperature=TAU, alpha=1.0, reduction="none", return_terms=True)
    found = []
    print(f"N={n} V={v} D={d}, tau={TAU:g}: largest relative error of a token's KL in float32")
    print(f"{'mean KL':>10}{'eager':>10}{'tiedkl':>10}")
    for noise in (1.0, 0.1, 0.01, 0.003, 0.001):
        h = w[y] + noise * torch.randn(n, d)
        truth = reference.forward(Problem(h.double(), w.double(), y, None, None, Options(TAU, 1.0))).kl
        log_r, q = F.log_softmax(h @ w.T / TAU, -1), F.softmax(s / TAU, -1)
        eager = F.kl_div(log_r, q, reduction="none").sum(-1)
        terms = loss_fn(h, w, y)
        assert isinstance(terms, tiedkl.TiedLossOutput)
        errors = [float(((x - truth) / truth).abs().max()) for x in (eager, terms.kl)]
        print(f"{float(truth.mean()):10.1e}{errors[0]:10.1e}{errors[1]:10.1e}", flush=True)
        found.append({"mean_kl": float(truth.mean()), "eager": errors[0], "tiedkl": errors[1]})
    return found


def verify(*arguments: str) -> dict[str, Any]:
    """`tiedkl verify`: the suite's ratios, the worst single bound of each backend and dtype, and the breaches."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "verify.json"
        if cli.main(["verify", *arguments, "--json", str(file)]) not in (0, 1):
            raise SystemExit(f"tiedkl verify {shlex.join(arguments)} did not finish")
        report = json.loads(file.read_text())
    worst: dict[str, float] = {}
    bounds: dict[str, int] = {}
    for case in report["cases"]:
        for quantity in case["quantities"].values():
            worst[case["impl"]] = max(worst.get(case["impl"], 0.0), quantity["bound_used"])
            bounds[case["impl"]] = bounds.get(case["impl"], 0) + 1
    return {
        "command": shlex.join(["tiedkl", "verify", *arguments]),
        "problems": len({case["id"] for case in report["cases"]}),
        "suite": report["suite"],
        "bounds": bounds,
        "worst_bound_used": worst,
        "breaches": report["breaches"],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suites", type=int, default=SUITES, help="of float32 alone, one a seed; default %(default)s")
    parser.add_argument("--smoke", action="store_true", help="toy size")
    args = parser.parse_args()
    problems = "4" if args.smoke else str(CASES)
    fast = [x for impl in ("cpp", "torch") for x in ("--impl", impl)]
    where = stamp(torch.device("cpu"))
    where["commit"] = where.pop("git_commit")
    report: dict[str, Any] = {
        "stamp": {
            "command": shlex.join(["python", "benchmarks/accuracy.py", *sys.argv[1:]]),
            "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            **where,
        },
        "small_kl": small_kl(*((8, 500, 16) if args.smoke else (64, 20_000, 64))),
        "verify": verify("--cases", problems),
        "float32_suites": [],
    }
    for seed in range(1 if args.smoke else args.suites):
        suite = ("--dtype", "float32", "--cases", problems, "--seed", str(seed))
        report["float32_suites"].append(verify(*fast, *suite))
        if not args.smoke:
            write_json(RESULT, report)
    if not args.smoke:
        write_json(RESULT, report)
        print(f"wrote {RESULT}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
