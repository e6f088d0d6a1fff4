"""What a search found: `best.json`, the table of trials, and the answer to "is it better than the defaults?".

best.json: `schema` 1, `settings` (keywords of `tiedkl.compare.Settings`), `loss` (keywords of
`tiedkl.FusedTiedLoss`), `tuned_for` (a variant), `trial`, `valid_ppl` (defaults, best), `check`, `unchecked`, `search`,
`trials` (number, state, note, defaults, params, valid_ppl, epochs, seconds), `text`, `training`, `verdict`, `commands`
(what to do with it, as `commands` below has it).

`check` is a trial against the defaults with other seeds: `trial`, `valid_ppl` (seed, defaults, best; null where the
training diverged), `diverged` (seed, settings, note), `held` (whether it is better on validation, on average, and none
diverged), and `test`, the test split (evidence.py; null where no seed has both). That trial is the best that held, of
`FINALISTS`; `rejected` has what was found of those before it. Where none held it is the best of the search, `rejected`
has the others, and the settings of best.json are the defaults; `unfinished` is the next one to be checked where time or
the user ended it. `check` is null where it was not begun, and `unchecked` says why.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..compare.checklist import SEEDS
from ..compare.command import OUT, compare_command, config, options, search_of_all
from ..compare.evidence import widest
from ..compare.markdown import rows as markdown_rows
from ..compare.settings import OWN, PAPER_VARIANTS, VARIANTS, Settings
from ..compare.statistics import percent, perplexity
from ..compare.store import write_atomically
from ..compare.tables import number
from ..environment import finite
from .settings import TuneSettings
from .study import ABANDONED, BEST, DEFAULTS, DIVERGED, DIVERGED_CE, NOTE, REASON, TABLE, optuna

if TYPE_CHECKING:
    from .worker import Task

KEPT = (  # what a learning rate, a temperature and gamma go with
    "model", "hidden", "layers", "batch", "bptt", "lr_decay", "clip", "vocab_size", "min_count",
)  # fmt: skip
FINALISTS = 3  # trials that the check may try, one after the other until one holds on validation
FAIR = "For a fair test each variant needs a search of its own:"
NOT_YET = "Other seeds were not tried yet: the same command, without --fresh, goes on with the search and the check."


def complete(study: Any) -> list[Any]:
    state = optuna().trial.TrialState
    return list(study.get_trials(deepcopy=False, states=(state.COMPLETE,)))


def pair(study: Any) -> tuple[Any, Any]:
    """The completed trial of the defaults, and the best; None where there is none."""
    trials = complete(study)
    defaults = next((t for t in trials if t.user_attrs.get(DEFAULTS)), None)
    return defaults, min(trials, key=lambda t: t.value, default=None)


def finalists(study: Any) -> list[Any]:
    """The best complete trials that are better than the defaults, the best first."""
    defaults, _ = pair(study)
    better = [t for t in complete(study) if defaults is not None and t.value < defaults.value]
    return sorted(better, key=lambda t: t.value)[:FINALISTS]


def epochs(trial: Any) -> list[float]:
    """Validation cross-entropy after each epoch."""
    return [ce for ce in trial.intermediate_values.values() if ce != DIVERGED_CE]


def ppl(trial: Any) -> float | None:
    """Validation perplexity of the best epoch; None without one."""
    return perplexity(min(epochs(trial))) if epochs(trial) else None


def result(
    study: Any, settings: TuneSettings, task: Task, checked: dict[str, Any] | None = None, unchecked: str = NOT_YET
) -> dict[str, Any]:
    """The content of best.json; its settings are the defaults while no trial is complete."""
    defaults, best = pair(study)
    if checked is not None:
        best = defaults if none_held(checked) else next(t for t in complete(study) if t.number == checked["trial"])
    wanting = checked is None and defaults is not None and best is not None and best.number != defaults.number
    params = dict(best.params) if best else settings.defaults()
    kept = {name: task.config[name] for name in KEPT} | {"tokenizer": settings.tokenizer}
    values = {**kept, **{n: task.config[n] for n in OWN}, **params}
    found = {
        "schema": 1,
        "settings": values,
        "loss": VARIANTS[settings.variant].loss_keywords(values),
        "tuned_for": settings.variant,
        "trial": best.number if best else None,
        "valid_ppl": {"defaults": defaults and ppl(defaults), "best": best and ppl(best)},
        "check": checked,
        "unchecked": unchecked if wanting else None,
        "search": {name: list(r[:2]) for name, r in settings.ranges().items()},
        "trials": [_row(t) for t in study.get_trials(deepcopy=False)],
        "text": {key: task.facts[key] for key in ("name", "vocabulary", "tokens", "sha256")},
        "training": {"epochs": settings.epochs, "max_tokens": settings.max_tokens, "seed": settings.seed},
    }
    return found | {"verdict": verdict(found), "commands": commands(settings)}


def _row(trial: Any) -> dict[str, Any]:
    reason = trial.user_attrs.get(REASON)
    return {
        "number": trial.number,
        "state": reason if reason in (DIVERGED, ABANDONED) else trial.state.name.lower(),
        "note": trial.user_attrs.get(NOTE),
        "defaults": bool(trial.user_attrs.get(DEFAULTS)),
        "params": dict(trial.params),
        "valid_ppl": ppl(trial),
        "epochs": len(epochs(trial)),
        "seconds": trial.user_attrs.get("seconds"),
    }


def none_held(check: dict[str, Any]) -> bool:
    """Whether every finalist was worse than the defaults on validation with the other seeds, or diverged."""
    return not (check["held"] or defaults_diverged(check) or check["unfinished"] is not None)


def defaults_diverged(check: dict[str, Any]) -> bool:
    """Whether there is nothing to compare a trial with."""
    return any(d["settings"] == "defaults" for d in check["diverged"])


def valid_change(rows: list[dict[str, Any]]) -> float | None:
    """The change of validation perplexity against the defaults in per cent, over the seeds; None where one diverged."""
    if any(row["best"] is None or row["defaults"] is None for row in rows):
        return None
    return percent(math.fsum(math.log(row["best"] / row["defaults"]) for row in rows) / len(rows))


def verdict(found: dict[str, Any]) -> list[str]:
    """Sentences: the gain in the search, and what other seeds and the test split say of it."""
    check = found["check"]
    if check is not None and none_held(check):
        tried = [check, *check["rejected"]]
        return [f"Nothing beats the defaults: better in the search, but {_with_seeds(check)} not: {_trials(tried)}."]
    old, new = found["valid_ppl"]["defaults"], found["valid_ppl"]["best"]
    if old is None or new is None:
        return [_without_defaults(found)]
    if found["trials"][found["trial"]]["defaults"]:
        return [f"Nothing beats the defaults (validation perplexity {old:.2f}) in this search."]
    first = (
        f"Better than the defaults in the search: validation perplexity {new:.2f} instead of {old:.2f} "
        f"({100 * (new / old - 1):+.1f}%), trial {found['trial']}."
    )
    if check is None:
        return [first, f"The best of many trials looks better than it is. {found['unchecked']}"]
    if check["unfinished"] is not None:
        tried = [check, *check["rejected"]]
        return [
            first,
            f"It does not hold {_with_seeds(check)}: {_trials(tried)}. The next best, trial {check['unfinished']}, is "
            "not checked to the end yet: the same command, without --fresh, goes on.",
        ]
    if check["diverged"]:
        where = ", ".join(f"with the {d['settings']} settings and seed {d['seed']}" for d in check["diverged"])
        return [first, f"It does not hold {_with_seeds(check)}: training diverged {where}."]
    test, n = check["test"], len(check["valid_ppl"])
    low, high = widest(test)["percent"]
    better = sum(row["best"] < row["defaults"] for row in check["valid_ppl"])
    holds = "It holds" if high < 0 else "It does not hold" if low > 0 else "It is not proven"
    sentences = [
        first,
        f"{holds} {_with_seeds(check)} on the test text, which no trial has seen: perplexity "
        f"{test['test_ppl'][0]:.2f} instead of {test['test_ppl'][1]:.2f} ({test['percent']:+.1f}%, 95% interval "
        f"{low:+.1f} to {high:+.1f}%); validation perplexity better with {better} of {n}.",
    ]
    if check["rejected"]:
        sentences.append(
            f"Better in the search, but {_with_seeds(check)} not: {_trials(check['rejected'])}. As these seeds also "
            "decided that, the gain looks a little better than it is."
        )
    return sentences


def _with_seeds(check: dict[str, Any]) -> str:
    n = len(check["valid_ppl"])
    return f"with {n} other seed{'' if n == 1 else 's'}"


def _trials(checks: list[dict[str, Any]]) -> str:
    """Trials that did not hold, each with why."""
    parts = []
    for check in checks:
        change = valid_change(check["valid_ppl"])
        what = "diverged" if change is None else f"{change:+.1f}% of validation perplexity"
        parts.append(f"trial {check['trial']} ({what})")
    return ", ".join(parts)


def _without_defaults(found: dict[str, Any]) -> str:
    if not any(t["defaults"] and t["state"] == DIVERGED for t in found["trials"]):
        return "The trial with the defaults is not complete yet: there is nothing to compare with."
    new = found["valid_ppl"]["best"]
    if new is None:
        return "Training with the defaults diverged, and no other trial is complete: try a smaller --lr."
    return f"Training with the defaults diverged; the best is trial {found['trial']}, validation perplexity {new:.2f}."


def why_unchecked(settings: TuneSettings, n_done: int, *, late: bool) -> str:
    """Why the winner was not checked with other seeds, and how it will be; `late` when the time was up."""
    if not settings.check:
        return "Other seeds were not tried: --check 3 does it."
    if not late:
        return NOT_YET
    short = f"; --trials {n_done} without --timeout checks at once" if n_done < settings.trials else ""
    return (
        "The time was up before the check with other seeds was done: the same command with a longer --timeout, or "
        f"without, does it{short}."
    )


def table(found: dict[str, Any]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Columns and rows, a row for each trial."""
    names = list(found["search"])
    columns = ("trial", "state", *names, "valid ppl", "epochs", "seconds")
    body = []
    for t in found["trials"]:
        mark = " (defaults)" if t["defaults"] else " (winner)" if t["number"] == found["trial"] else ""
        cells = (number(t["params"].get(name), ".4g") for name in names)
        figures = (number(t["valid_ppl"], ",.2f"), str(t["epochs"]), number(t["seconds"], ",.1f"))
        body.append((f"{t['number']}{mark}", t["state"], *cells, *figures))
    return columns, body


def markdown(found: dict[str, Any]) -> str:
    """The study as Markdown."""
    lines = [f"# Search on {found['text']['name'].replace('_', chr(92) + '_')}", ""]
    lines += [*found["verdict"], ""]
    through = ", the gradient through its similarity target too" if found["loss"].get("target_grad") else ""
    lines += [
        f"Variant {found['tuned_for']}{through}, {found['training']['epochs']} epochs of "
        f"{found['text']['tokens']['train']:,} training tokens a trial; the validation perplexity decides, and "
        "hopeless trials are pruned.",
        "",
    ]
    notes = [f"- Trial {t['number']}: {t['note']}" for t in found["trials"] if t["note"]]
    lines += [*markdown_rows(table(found)), "", *(notes and [*notes, ""])]
    code = [f"    {command}" for command in found["commands"]]
    return "\n".join([*lines, "Use it:", "", code[0], "", FAIR, "", *code[1:], ""])


def commands(settings: TuneSettings) -> list[str]:
    """To compare with what was found; to search for another variant alike; to compare each with its own."""
    own, best = settings.variant, Path(settings.out).expanduser() / BEST
    other = "real" if own == "baseline" else "baseline"
    out = Path(OUT.format(other))
    # of a baseline there is no gamma to search
    parts = [] if settings.search is None else [part.strip() for part in settings.search.split(",")]
    kept = [part for part in parts if part.partition("=")[0] not in VARIANTS[other].unused]
    searched = ",".join(kept) or search_of_all(settings, other)
    through = settings.target_grad and VARIANTS[other].augmented
    search = replace(settings, variant=other, out=str(out), search=searched, fresh=False, target_grad=through)
    # the rest is in best.json
    again = Settings(data=settings.data, impl=settings.impl, device=settings.device, threads=settings.threads)
    arms = tuple(dict.fromkeys((*PAPER_VARIANTS, own)))  # the default has no control
    fair = compare_command(again, variants=(other, own), seeds=SEEDS, out="tuned")
    return [
        compare_command(again, variants=arms, seeds=SEEDS, out=f"tuned-{own}") + config(best),
        f"tiedkl tune{options(search)}",
        fair + config(out / BEST, other) + config(best, own),
    ]


def write_best(
    study: Any,
    settings: TuneSettings,
    task: Task,
    out: Path,
    checked: dict[str, Any] | None = None,
    unchecked: str = NOT_YET,
) -> dict[str, Any]:
    """Write best.json and tune.md, each whole or not at all; return the result."""
    found = result(study, settings, task, checked, unchecked)
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
    ending += f"  {row['note']}" if row["note"] else ""
    return f"{n_done:>3}/{n_trials}  {row['state']:<9} valid ppl {number(row['valid_ppl'], '8.2f')}  {values}{ending}"
