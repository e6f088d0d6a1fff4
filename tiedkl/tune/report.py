"""What a search found: `best.json`, the table of trials, and the answer to "is it better than the defaults?".

best.json: `schema` 1, `settings` (keywords of `tiedkl.compare.Settings`), `loss` (keywords of
`tiedkl.FusedTiedLoss`), `variant`, `trial`, `valid_ppl` (defaults, best), `check` (the winner against the defaults
with other seeds, on the test split; see evidence.py), `search`, `trials` (number, state, params, valid_ppl, epochs,
seconds), `text`, `verdict`.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..compare.markdown import rows as markdown_rows
from ..compare.report import number
from ..compare.settings import LOSS_OPTIONS, VARIANTS
from ..compare.store import write_atomically
from ..environment import finite
from .settings import TuneSettings
from .study import ABANDONED, BEST, DEFAULTS, DIVERGED, REASON, TABLE, optuna

if TYPE_CHECKING:
    from .worker import Task

KEPT = ("model", "hidden", "layers", "batch", "bptt", "lr_decay", "clip")  # what a learning rate goes with


def complete(study: Any) -> list[Any]:
    state = optuna().trial.TrialState
    return list(study.get_trials(deepcopy=False, states=(state.COMPLETE,)))


def pair(study: Any) -> tuple[Any, Any]:
    """The completed trial of the defaults, and the best; None where there is none."""
    trials = complete(study)
    defaults = next((t for t in trials if t.user_attrs.get(DEFAULTS)), None)
    return defaults, min(trials, key=lambda t: t.value, default=None)


def ppl(trial: Any) -> float | None:
    """Validation perplexity, of the best epoch so far for a trial that was pruned."""
    values = [trial.value] if trial.value is not None else list(trial.intermediate_values.values())
    return math.exp(min(min(values), 700.0)) if values else None


def result(study: Any, settings: TuneSettings, task: Task, checked: dict[str, Any] | None = None) -> dict[str, Any]:
    """The content of best.json; its settings are the defaults while no trial is complete."""
    defaults, best = pair(study)
    params = dict(best.params) if best else settings.defaults()
    config = {name: task.config[name] for name in KEPT}
    values = {**config, **{n: task.config[n] for n in ("lr", "dropout", "temperature", "gamma")}, **params}
    found = {
        "schema": 1,
        "settings": values,
        "loss": {name: values[name] for name in LOSS_OPTIONS}
        if VARIANTS[settings.variant].augmented
        else {"alpha": 0.0},
        "variant": settings.variant,
        "trial": best.number if best else None,
        "valid_ppl": {"defaults": defaults and ppl(defaults), "best": best and ppl(best)},
        "check": checked,
        "search": {name: list(r[:2]) for name, r in settings.ranges().items()},
        "trials": [_row(t) for t in study.get_trials(deepcopy=False)],
        "text": {key: task.facts[key] for key in ("name", "vocabulary", "tokens", "sha256")},
        "training": {"epochs": settings.epochs, "max_tokens": settings.max_tokens, "seed": settings.seed},
    }
    return found | {"verdict": verdict(found)}


def _row(trial: Any) -> dict[str, Any]:
    reason = trial.user_attrs.get(REASON)
    return {
        "number": trial.number,
        "state": reason if reason in (DIVERGED, ABANDONED) else trial.state.name.lower(),
        "defaults": bool(trial.user_attrs.get(DEFAULTS)),
        "params": dict(trial.params),
        "valid_ppl": ppl(trial),
        "epochs": len(trial.intermediate_values),
        "seconds": trial.user_attrs.get("seconds"),
    }


def verdict(found: dict[str, Any]) -> list[str]:
    """Sentences: the gain in the search, and what other seeds and the test split say of it."""
    old, new = found["valid_ppl"]["defaults"], found["valid_ppl"]["best"]
    if old is None or new is None:
        return ["The trial with the defaults is not complete yet: there is nothing to compare with."]
    if found["trials"][found["trial"]]["defaults"]:
        return [f"Nothing beats the defaults (validation perplexity {old:.2f}) in this search."]
    first = (
        f"Improves on the defaults: validation perplexity {new:.2f} instead of {old:.2f} "
        f"({100 * (new / old - 1):+.1f}%), trial {found['trial']}, the seed of the search."
    )
    check = found["check"]
    if check is None:
        return [first, "The best of many trials looks better than it is; other seeds were not tried."]
    test = check["test"]
    sure = test["over_both"] or test["over_text"]
    low, high = sure["percent"]
    n = len(check["valid_ppl"])
    better = sum(row["best"] < row["defaults"] for row in check["valid_ppl"])
    holds = "It holds" if high < 0 else "It does not hold" if low > 0 else "It is not proven"
    return [
        first,
        f"{holds} with {n} other seed{'' if n == 1 else 's'} on the test text, which no trial has seen: perplexity "
        f"{test['test_ppl'][0]:.2f} instead of {test['test_ppl'][1]:.2f} ({test['percent']:+.1f}%, 95% interval "
        f"{low:+.1f} to {high:+.1f}%); validation perplexity better with {better} of {n}.",
    ]


def table(found: dict[str, Any]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Columns and rows, a row for each trial."""
    names = list(found["search"])
    columns = ("trial", "state", *names, "valid ppl", "epochs", "seconds")
    body = []
    for t in found["trials"]:
        mark = " (defaults)" if t["defaults"] else " (best)" if t["number"] == found["trial"] else ""
        cells = (number(t["params"].get(name), ".4g") for name in names)
        figures = (number(t["valid_ppl"], ",.2f"), str(t["epochs"]), number(t["seconds"], ",.1f"))
        body.append((f"{t['number']}{mark}", t["state"], *cells, *figures))
    return columns, body


def markdown(found: dict[str, Any]) -> str:
    """The study as Markdown."""
    lines = [f"# Search on {found['text']['name'].replace('_', chr(92) + '_')}", ""]
    lines += [*found["verdict"], ""]
    lines += [
        f"Variant {found['variant']}, {found['training']['epochs']} epochs of {found['text']['tokens']['train']:,} "
        "training tokens a trial; the validation perplexity decides, and hopeless trials are pruned.",
        "",
    ]
    return "\n".join([*lines, *markdown_rows(table(found)), "", "Use it: `tiedkl compare --config best.json`", ""])


def write_best(
    study: Any, settings: TuneSettings, task: Task, out: Path, checked: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Write best.json and tune.md, each whole or not at all; return the result."""
    found = result(study, settings, task, checked)
    text = json.dumps(finite(found), indent=1, allow_nan=False) + "\n"
    write_atomically(out / BEST, text.encode())
    write_atomically(out / TABLE, markdown(found).encode())
    return found


def line(study: Any, trial_number: int, n_done: int, n_trials: int) -> str:
    """What a trial gave, and the best so far."""
    trial = study.get_trials(deepcopy=False)[trial_number]
    row = _row(trial)
    values = "  ".join(f"{name} {value:.4g}" for name, value in row["params"].items())
    _, best = pair(study)
    ending = "" if best is None else f"  best so far {ppl(best):.2f} (trial {best.number})"
    return f"{n_done:>3}/{n_trials}  {row['state']:<9} valid ppl {number(row['valid_ppl'], '8.2f')}  {values}{ending}"
