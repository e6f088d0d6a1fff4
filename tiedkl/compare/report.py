"""The result of a comparison: one dictionary; tables.py has what is shown of it.

The dictionary, `SCHEMA` 2:

    schema, created, status (complete | partial), verdict (sentences),
    outcome (yes | no | draw | one seed | undecided | nothing; see verdict.py), limits,
    config (`Settings.resolved`, with the list of `seeds`), corpus (`Corpus.facts`), environment
    plan        what `--budget` decided (budget.py), or null
    variants    name -> label, summary, tied, augmented, smoothed, status (done | partial | diverged | not started;
                diverged when no run is left to train), seeds_done, and once it has begun: parameters; valid_ppl and
                test_ppl, the exponential of the mean cross-entropy over seeds; tokens_per_second, the median over
                seeds, and tokens_per_second_range, the slowest and the fastest epoch; test_ppl_interval, 95% over
                seeds, or null; curves, averaged over seeds, train_ce being what was trained on, with label smoothing
                where there is some; runs, `Trainer.result` of each seed (taken_from: the comparison that trained it,
                where that was another); loss_memory and training_memory in bytes (memory.py); change, per cent against
                the baseline; evidence, how sure that change is (evidence.py), and beyond_counts, whether either of the
                two predicts the test text better than word counts do, or null; control, for a variant with the
                augmented loss beside the same with label smoothing: the evidence of its change against that, and that
                one's `name`, or null; kl_share, alpha * KL on the training text in the last epoch of the seeds that are
                done, in per cent of its cross-entropy, or null without such a seed or without the augmented loss
    inference   name -> figures of inference.py; empty until all runs are done
    cost        name -> seconds of training for a million tokens, and money, or null without a price
    checklist   stages of a roll-out (checklist.py)

Schema 1 had one seed: no seeds_done, runs, test_ppl_interval, evidence, plan, inference, cost, checklist, outcome.
"""

from __future__ import annotations

import json
import math
import statistics
from datetime import datetime, timezone
from typing import Any

from ..environment import finite
from .checklist import checklist
from .evidence import Run, adjust, against, kl_share, mean_ce, mean_curves, perplexity_interval
from .settings import CONTROLS, VARIANTS, Settings, of_variant
from .statistics import perplexity
from .verdict import limits, verdict

SCHEMA = 2


def build(
    config: dict[str, Any],
    corpus: dict[str, Any],
    environment: dict[str, Any],
    runs: dict[str, list[Run]],
    *,
    memory: dict[str, dict[str, Any]],
    wanted: dict[str, int] | None = None,
    inference: dict[str, Any] | None = None,
    plan: dict[str, Any] | None = None,
    price_per_hour: float | None = None,
    request: Settings | None = None,
) -> dict[str, Any]:
    """The report of `runs`, variant name -> its runs so far, in the order of the report.

    memory: name -> `loss_memory` and `training_memory`. wanted: name -> runs it is to have, default one for each of
    config["seeds"]. request: the settings as the user gave them, for the commands of the checklist; default
    `Settings()`.
    """
    request = request or Settings()
    n_seeds = len(config["seeds"])
    wanted = wanted or dict.fromkeys(runs, n_seeds)
    variants = {
        name: _variant(name, part, wanted[name], memory[name], of_variant(config, name)) for name, part in runs.items()
    }
    base = runs.get("baseline", [])
    evidence = {n: against(base, part) for n, part in runs.items() if n != "baseline"}
    adjust(evidence)
    controls = {n: against(runs[CONTROLS[n]], part) for n, part in runs.items() if CONTROLS.get(n) in runs}
    adjust(controls)
    for change in filter(None, (*evidence.values(), *controls.values())):
        change["beyond_counts"] = min(change["test_ppl"]) < corpus.get("unigram_ppl", math.inf)
    for name, v in variants.items():
        found = v["evidence"] = evidence.get(name)
        control = controls.get(name)
        v["control"] = control and {"name": CONTROLS[name], **control}
        v["change"] = {
            "valid_ppl": _change(v, variants.get("baseline"), "valid_ppl") if found else None,
            "test_ppl": found and found["percent"],
            "parameters": _change(v, variants.get("baseline"), "parameters"),
        }
    outcome, sentences = verdict(variants, n_seeds, corpus, fresh=request.fresh)
    report = {
        "schema": SCHEMA,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "status": "complete" if all(v["status"] == "done" for v in variants.values()) else "partial",
        "verdict": sentences,
        "outcome": outcome,
        "limits": limits(variants, request.tuned_for, config),
        "config": config,
        "corpus": corpus,
        "environment": environment,
        "plan": plan,
        "variants": variants,
        "inference": inference or {},
        "cost": {n: _cost(v, price_per_hour) for n, v in variants.items() if v.get("tokens_per_second")},
    }
    report["checklist"] = checklist(report, request)
    return report


def _variant(name: str, runs: list[Run], wanted: int, memory: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    about = VARIANTS[name]
    done = [run for run in runs if run.done]
    kept = [run for run in runs if run.result["status"] != "diverged"]
    n_diverged = len(runs) - len(kept)
    ended = "diverged" if n_diverged else "done"
    entry: dict[str, Any] = {
        "label": about.label,
        "summary": about.summary,
        "tied": about.tied,
        "augmented": about.augmented,
        "smoothed": about.smoothed,
        "status": "not started" if not runs else ended if len(done) + n_diverged == wanted else "partial",
        "seeds_done": [run.seed for run in done],
    }
    if not runs:
        return entry
    last = runs[-1].result
    valid = [run.result["valid_ppl"] for run in done or runs if run.result["valid_ppl"]]
    speeds = [run.result["tokens_per_second"] for run in runs if run.result["tokens_per_second"]]
    by_epoch = [row["tokens_per_second"] for run in runs for row in run.result["curves"]]
    return entry | memory | {
        "epochs_done": last["epochs_done"],
        "epochs_planned": last["epochs_planned"],
        "parameters": last["parameters"],
        "best_epoch": runs[0].result["best_epoch"],
        "valid_ppl": _geometric(valid),
        "test_ppl": perplexity(statistics.fmean(map(mean_ce, done))) if done else None,
        "test_ppl_interval": perplexity_interval(runs),
        "tokens_per_second": statistics.median(speeds) if speeds else None,
        "tokens_per_second_range": [min(by_epoch), max(by_epoch)] if by_epoch else None,
        "seconds": sum(run.result["seconds"] for run in runs),
        "kl_share": kl_share(mean_curves(done), config),
        "curves": mean_curves(kept or runs),
        "runs": [{"seed": run.seed, **run.result} for run in runs],
    }  # fmt: skip


def _geometric(values: list[float]) -> float | None:
    if len(values) < 2:
        return values[0] if values else None
    return perplexity(statistics.fmean(map(math.log, values)))


def _change(v: dict[str, Any], base: dict[str, Any] | None, key: str) -> float | None:
    """Change against the baseline in per cent; None for itself and without both figures."""
    if base is None or v is base or v.get(key) is None or base.get(key) is None:
        return None
    return float(100.0 * (v[key] / base[key] - 1.0))


def _cost(v: dict[str, Any], price_per_hour: float | None) -> dict[str, Any]:
    seconds = 1e6 / v["tokens_per_second"]
    return {
        "seconds_per_million": seconds,
        "price_per_million": None if price_per_hour is None else seconds / 3600 * price_per_hour,
    }


def to_json(report: dict[str, Any]) -> str:
    """Strict JSON: what is not a finite number becomes null."""
    return json.dumps(finite(report), indent=1, allow_nan=False) + "\n"
