"""Train the runs of experiments.py; stop at any time, the same command goes on.

    python examples/ptb/run.py small --data DIR                          one run after the other
    python examples/ptb/run.py small --data DIR --jobs 2 --threads 1     two at a time
    python examples/ptb/run.py large --data DIR --device cuda --minutes 10
    python examples/ptb/run.py sixteenth --data DIR --only 'tau*'        labels by pattern
    python examples/ptb/tables.py                                        what came out

DIR holds ptb.train.txt, ptb.valid.txt and ptb.test.txt. Checkpoints go to --runs; the figures of every run, finished or
not, to results/EXPERIMENT.json beside this file (--results elsewhere). A run is checkpointed every minute, after every
epoch and on Ctrl-C, and continues to the same bits.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import multiprocessing
import signal
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from ablated import AblatedTrainer
from experiments import Run, experiments
from torch import Tensor

from tiedkl.compare import corpus as corpora
from tiedkl.compare.settings import VARIANTS, CompareError, Settings
from tiedkl.compare.statistics import block_length
from tiedkl.compare.store import Store, write_atomically
from tiedkl.compare.training import Data, Trainer
from tiedkl.environment import stamp

HERE = Path(__file__).parent
CHECKPOINT_SECONDS = 60.0


def make_trainer(run: Run, args: argparse.Namespace) -> Trainer:
    """The trainer of a run, at its start."""
    text = corpora.load(None if run.help_texts else args.data, vocab_size=args.vocab_size)
    device = torch.device(args.device)
    settings = replace(Settings(threads=args.threads), seed=run.seed, **run.settings).resolved(len(text.train))
    if args.smoke:
        settings |= {"epochs": 1, "hidden": 16, "batch": 4, "bptt": 8}
        text = replace(text, train=text.train[:600], valid=text.valid[:200], test=text.test[:200])
    text = replace(text, train=text.train[: int(len(text.train) * run.fraction)])
    data = Data.of(text, settings["batch"], device)
    variant = VARIANTS[run.variant]
    if not run.loss:
        return Trainer(variant, settings, data, device)
    vectors = None
    if run.loss.get("similarity") == "frozen":  # the embedding that the same experiment's +RE learned
        source = replace(run, label="re", loss={}).name
        state = Store(args.runs).load(source, device)
        if state is None or not state["best"]:
            raise CompareError(f"{run.name} takes its vectors from {source}: train that first, for an epoch at least")
        vectors = state["best"]["weights"]["embedding.weight"]
    return AblatedTrainer(variant, settings, data, device, options=run.loss, vectors=vectors)


def train(run: Run, args: argparse.Namespace, deadline: float) -> dict[str, Any]:
    """Continue a run until it is done, `deadline` (time.time) or Ctrl-C; its figures."""
    stopped: list[int] = []
    signal.signal(signal.SIGINT, lambda number, frame: stopped.append(number))
    torch.set_num_threads(args.threads)
    trainer, store = make_trainer(run, args), Store(args.runs)
    state = store.load(run.name, trainer.device)
    if state is not None:
        try:
            trainer.load_state_dict(state)
        except (RuntimeError, KeyError) as error:
            why = str(error).splitlines()[0]
            raise CompareError(f"the checkpoint {run.name}.pt is not of this run: {why} Move it away.") from None

    saved = time.monotonic()
    for event in trainer.run():
        stop = bool(stopped) or time.time() > deadline
        if event == "epoch":
            last = trainer.curves[-1]
            print(f"{run.name}: epoch {last['epoch']}, validation {last['valid_ppl']:.2f}", flush=True)
        if stop or event != "step" or time.monotonic() - saved > CHECKPOINT_SECONDS:
            store.save(run.name, trainer.state_dict())
            saved = time.monotonic()
        if stop and event != "done":
            break
    settings = {k: v for k, v in trainer.settings.items() if k not in ("threads", "impl", "checkpoint_every")}
    return {
        "experiment": run.experiment,
        "label": run.label,
        "variant": run.variant,
        "seed": run.seed,
        "fraction": run.fraction,
        "loss": run.loss,
        "settings": settings,
        "stamp": stamp(trainer.device),
        "test_blocks": None if trainer.test_losses is None else block_means(trainer.test_losses),
        **trainer.result(),
    }


def block_means(losses: Tensor) -> list[float]:
    """Means of per-token losses over consecutive blocks of nearly equal length: enough for a bootstrap of the text."""
    parts = losses.double().tensor_split(len(losses) // block_length(len(losses)))
    return [round(float(part.mean()), 5) for part in parts]


def read(file: Path) -> dict[str, Any]:
    """The figures so far, by name of the run."""
    return json.loads(file.read_text()) if file.exists() else {}


def add_text_options(parser: argparse.ArgumentParser) -> None:
    """Where text, checkpoints and figures are, and on what to compute."""
    parser.add_argument("--data", help="directory of the text, as for tiedkl compare; default: CPython's help texts")
    parser.add_argument("--vocab-size", type=int, default=10_000)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of each run")
    parser.add_argument("--runs", type=Path, default=Path("ptb-runs"), help="checkpoints (default %(default)s)")
    parser.add_argument("--results", type=Path, default=HERE / "results", help="figures (default: beside this file)")
    parser.add_argument("--smoke", action="store_true", help="toy size")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", choices=list(experiments()))
    add_text_options(parser)
    parser.add_argument("--only", default="*", metavar="PATTERN", help="of labels, such as 're*'")
    parser.add_argument("--seed", type=int, action="append", help="only this seed; repeatable")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop then")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    args = parser.parse_args()
    deadline = time.time() + 60 * args.minutes
    chosen = [
        run
        for run in experiments()[args.experiment]
        if fnmatch.fnmatch(run.label, args.only) and (args.seed is None or run.seed in args.seed)
    ]
    if not chosen:
        parser.error(f"no run of {args.experiment} is called {args.only}")
    args.runs.mkdir(parents=True, exist_ok=True)
    args.results.mkdir(parents=True, exist_ok=True)
    file = args.results / f"{args.experiment}.json"
    figures = read(file)
    todo = [run for run in chosen if figures.get(run.name, {}).get("status") != "done"]
    print(f"{len(chosen) - len(todo)} of {len(chosen)} runs are done", flush=True)
    status = 0
    context = multiprocessing.get_context("spawn")
    signal.signal(signal.SIGINT, lambda number, frame: None)  # the workers stop, and then there is nothing to wait for
    with ProcessPoolExecutor(args.jobs, mp_context=context) as pool:
        pending = iter(todo)
        running = {}
        while True:
            while len(running) < args.jobs and time.time() < deadline and (run := next(pending, None)):
                running[pool.submit(train, run, args, deadline)] = run
            if not running:
                break
            for future in [f for f in running if f.done()]:
                run = running.pop(future)
                try:
                    result = future.result()
                except Exception as error:  # one run's failure must not end the others
                    print(f"{run.name}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
                    status = 1
                    continue
                figures = read(file) | {run.name: result}  # another process may have written too
                write_atomically(file, (json.dumps(figures, indent=1) + "\n").encode())
                if figures[run.name]["status"] != "done" and time.time() < deadline:
                    pending = iter(())  # interrupted
            time.sleep(0.2)
    left = sum(figures.get(run.name, {}).get("status") != "done" for run in chosen)
    print(f"{left} of {len(chosen)} runs are left; the same command continues" if left else "all runs are done")
    return status


if __name__ == "__main__":
    sys.exit(main())
