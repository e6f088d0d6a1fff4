"""Train the runs of experiments.py; stop at any time, the same command goes on.

    python examples/ptb/run.py small --data DIR                          one run after the other
    python examples/ptb/run.py small --data DIR --jobs 2 --threads 1     two at a time
    python examples/ptb/run.py large --data DIR --device cuda --tf32 --minutes 9
    python examples/ptb/run.py large100 medium76 --data DIR --only real --jobs 2 --device cuda --tf32 --minutes 9
    python examples/ptb/run.py sixteenth --data DIR --only 'tau*'        labels by pattern
    python examples/ptb/tables.py                                        what came out

DIR holds ptb.train.txt, ptb.valid.txt and ptb.test.txt. Checkpoints go to --runs; the figures of every run, finished or
not, to results/EXPERIMENT.json beside this file (--results elsewhere). A run is checkpointed at least every minute,
and on Ctrl-C, and continues to the same bits.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import multiprocessing
import os
import signal
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from ablated import AblatedTrainer
from experiments import Run, experiments

from tiedkl.compare import corpus as corpora
from tiedkl.compare import runner
from tiedkl.compare.corpus import Corpus
from tiedkl.compare.lock import in_turn, locked
from tiedkl.compare.progress import Progress
from tiedkl.compare.settings import VARIANTS, CompareError, Settings
from tiedkl.compare.statistics import block_means
from tiedkl.compare.store import Store, differences, write_atomically
from tiedkl.compare.training import Data, Trainer
from tiedkl.environment import stamp

HERE = Path(__file__).parent
CHECKPOINT_SECONDS = 60.0
ENDED = ("done", "diverged")


def text_of(run: Run, args: argparse.Namespace) -> Corpus:
    """The text of a run, its training split cut to the run's part. The vocabulary is that of the whole."""
    text = corpora.load(None if run.help_texts else args.data, vocab_size=args.vocab_size)
    if args.smoke:
        text = replace(text, train=text.train[:600], valid=text.valid[:200], test=text.test[:200])
    return replace(text, train=text.train[: int(len(text.train) * run.fraction)])


def settings_of(run: Run, text: Corpus, args: argparse.Namespace) -> dict[str, Any]:
    """Every setting of a run."""
    settings = replace(Settings(threads=args.threads), seed=run.seed, **run.settings).resolved(len(text.train))
    if run.initial_range is not None:
        settings["initial_range"] = run.initial_range
    if args.tf32:
        settings["tf32"] = True
    return settings | ({"epochs": 1, "hidden": 16, "batch": 4, "bptt": 8} if args.smoke else {})


def identity_of(run: Run, text: Corpus, settings: dict[str, Any]) -> dict[str, Any]:
    """What makes two runs the same run: figures and checkpoints of any other are not taken for it.

    The device is not part of it; a figure's stamp has that, and a checkpoint remembers it.
    """
    facts = text.facts()
    return {
        "variant": run.variant,
        "loss": run.loss,
        "settings": {k: v for k, v in settings.items() if k not in ("threads", "impl", "device")},
        "text": {k: facts[k] for k in ("name", "vocabulary", "tokens", "sha256")},
    }


def check(old: dict[str, Any], new: dict[str, Any], where: str) -> None:
    """Raise CompareError when two identities differ; either may have more in it."""
    flat = [
        # earlier versions had the device among the settings
        {**i.get("settings", {}), "variant": i.get("variant"), "loss": i.get("loss"), "corpus": i.get("text")}
        | {"device": None}
        for i in (old, new)
    ]
    if what := differences(*flat):
        raise CompareError(f"{where} is of another run ({what}): move it away, or choose another --runs and --results")


def make_trainer(run: Run, text: Corpus, args: argparse.Namespace) -> Trainer:
    """The trainer of a run, at its start."""
    device = torch.device(args.device)
    settings = settings_of(run, text, args)
    data, variant = Data.of(text, settings["batch"], device), VARIANTS[run.variant]
    if not run.loss:
        return Trainer(variant, settings, data, device)
    vectors = None
    if run.loss.get("similarity") == "frozen":  # the embedding that +RE has learned
        source = f"{run.loss['vectors']}-re-{run.seed}"
        state = Store(str(args.runs)).load(source, device)
        if state is None or state["test_losses"] is None:
            raise CompareError(f"{run.name} takes its vectors from {source}: train that to its end first")
        vectors = state["best"]["weights"]["embedding.weight"]
    return AblatedTrainer(variant, settings, data, device, options=run.loss, vectors=vectors)


def resume(trainer: Trainer, run: Run, identity: dict[str, Any], runs: Path) -> None:
    """Load the run's checkpoint where there is one; only on the kind of device that wrote it are the bits the same."""
    state = Store(str(runs)).load(run.name, trainer.device)
    if state is not None:
        check(state.get("identity", {}), identity, f"the checkpoint {runs / run.name}.pt")
        if (device := state.get("device", trainer.device.type)) != trainer.device.type:
            raise CompareError(f"the checkpoint {runs / run.name}.pt was written on {device}: give --device {device}")
        trainer.load_state_dict(state)


class Lines(Progress):
    """A line an epoch on standard output instead of a bar: several runs share a terminal."""

    def __init__(self, name: str) -> None:
        super().__init__(0, 0, quiet=True)
        self.name = name

    def epoch(self, label: str, row: dict[str, Any], epochs: int) -> None:
        """What an epoch gave."""
        self.say(f"epoch {row['epoch']}, validation {row['valid_ppl']:.2f}")

    def say(self, text: str) -> None:
        """A line with the run's name before it."""
        print(f"{self.name}: {text}", flush=True)


def train(run: Run, args: argparse.Namespace, identity: dict[str, Any], deadline: float, parent: int) -> dict[str, Any]:
    """Continue a run until it has ended, `deadline` (time.time), SIGINT, or the death of `parent`; its figures.

    Raises CompareError when another command trains it.
    """
    stopped: list[int] = []
    signal.signal(signal.SIGINT, lambda number, frame: stopped.append(number))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])  # `main` blocked it: an interrupted import is a mess
    torch.set_num_threads(args.threads)
    if args.tf32:
        torch.set_float32_matmul_precision("high")
    store = Store(str(args.runs))

    def save(state: dict[str, Any]) -> None:
        store.save(run.name, state | {"identity": identity, "device": trainer.device.type})

    def should_stop() -> bool:
        return bool(stopped) or time.time() > deadline or os.getppid() != parent

    with locked(args.runs, f"{run.name}.lock", f"training of {run.name}", "--runs"):
        trainer = make_trainer(run, text_of(run, args), args)
        resume(trainer, run, identity, args.runs)
        runner.train(trainer, run.name, save, Lines(run.name), CHECKPOINT_SECONDS, should_stop)
    result, losses = trainer.result(), trainer.test_losses
    if args.test_unfinished and not trainer.ended and trainer.best:
        result["test_ppl"], losses = trainer.test()
    return {
        "experiment": run.experiment,
        "label": run.label,
        "seed": run.seed,
        "fraction": run.fraction,
        **identity,
        "stamp": stamp(trainer.device),
        # enough for an interval over the text
        "test_blocks": None if losses is None else [round(x, 5) for x in block_means(losses).tolist()],
        **result,
    }


def read(file: Path) -> dict[str, Any]:
    """The figures so far, by name of the run."""
    return json.loads(file.read_text()) if file.exists() else {}


def file_of(run: Run, results: Path) -> Path:
    """Where the figures of a run are."""
    return results / f"{run.experiment}.json"


def known(chosen: list[tuple[Run, dict[str, Any]]], results: Path) -> dict[str, Any]:
    """The figures so far of the experiments that were chosen, by name of the run."""
    files = dict.fromkeys(file_of(run, results) for run, _ in chosen)
    return {name: row for file in files for name, row in read(file).items()}


def add_text_options(parser: argparse.ArgumentParser) -> None:
    """Where text, checkpoints and figures are, and on what to compute."""
    parser.add_argument("--data", help="directory of the text, as for tiedkl compare; default: CPython's help texts")
    parser.add_argument("--vocab-size", type=int, default=10_000)
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--tf32", action="store_true", help="products with 10 bits of mantissa, as cuDNN's LSTM by default; for a GPU"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of each run")
    parser.add_argument("--runs", type=Path, default=Path("ptb-runs"), help="checkpoints (default %(default)s)")
    parser.add_argument("--results", type=Path, default=HERE / "results", help="figures (default: beside this file)")
    parser.add_argument("--smoke", action="store_true", help="toy size")


def chosen_runs(args: argparse.Namespace) -> list[tuple[Run, dict[str, Any]]]:
    """The runs that the command names, each with its identity."""
    texts: dict[tuple[bool, float], Corpus] = {}
    chosen = []
    for name in dict.fromkeys(args.experiments):
        runs = [run for run in experiments()[name] if fnmatch.fnmatch(run.label, args.only)]
        if args.seed is not None:
            runs = [run for run in runs if run.seed in args.seed]
        if not runs:
            raise CompareError(f"no run of {name} is called {args.only} with that seed")
        for run in runs:
            key = (run.help_texts, run.fraction)
            text = texts[key] = texts.get(key) or text_of(run, args)
            chosen.append((run, identity_of(run, text, settings_of(run, text, args))))
    return chosen


def arguments(command: list[str] | None = None) -> argparse.Namespace:
    """The parsed command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = list(experiments())
    parser.add_argument(
        "experiments", nargs="+", choices=names, metavar="EXPERIMENT", help=f"one or more of {', '.join(names)}"
    )
    add_text_options(parser)
    parser.add_argument("--only", default="*", metavar="PATTERN", help="of labels, such as 're*'")
    parser.add_argument("--seed", type=int, action="append", help="only this seed; repeatable")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop then")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument(
        "--test-unfinished",
        action="store_true",
        help="test the best epoch so far of a run that this command trains and stops",
    )
    return parser.parse_args(command)


def main() -> int:
    args = arguments()
    runner.pick_device(args.device)
    if args.tf32 and torch.device(args.device).type != "cuda":
        raise CompareError("--tf32 is for a GPU: add --device cuda")
    if args.jobs < 1 or args.threads < 1:
        raise CompareError(f"jobs={args.jobs}, threads={args.threads}: expected at least 1 of each")
    deadline = time.time() + 60 * args.minutes
    args.runs.mkdir(parents=True, exist_ok=True)
    args.results.mkdir(parents=True, exist_ok=True)
    chosen = chosen_runs(args)
    figures = known(chosen, args.results)
    for run, identity in chosen:
        if run.name in figures:
            check(figures[run.name], identity, f"{run.name} in {file_of(run, args.results)}")
    todo = [pair for pair in chosen if figures.get(pair[0].name, {}).get("status") not in ENDED]
    print(f"{len(chosen) - len(todo)} of {len(chosen)} runs are done", flush=True)
    status, interrupts = 0, []
    signal.signal(signal.SIGINT, lambda number, frame: interrupts.append(number))  # the workers stop by themselves

    def new_pool() -> ProcessPoolExecutor:
        return ProcessPoolExecutor(args.jobs, mp_context=multiprocessing.get_context("spawn"))

    running: dict[Any, Run] = {}
    pool = new_pool()
    try:
        while True:
            while len(running) < args.jobs and time.time() < deadline and not interrupts and todo:
                run, identity = todo.pop(0)
                signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])  # the worker inherits it
                job = (train, run, args, identity, deadline, os.getpid())
                try:
                    future = pool.submit(*job)
                except BrokenProcessPool:  # the system killed a worker, for its memory perhaps
                    pool.shutdown()
                    pool = new_pool()
                    future = pool.submit(*job)
                running[future] = run
                signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
            if not running:
                break
            for future in [f for f in running if f.done()]:
                run = running.pop(future)
                try:
                    result = future.result()
                except Exception as error:  # one run's failure must not end the others
                    kind = "" if isinstance(error, CompareError) else f"{type(error).__name__}: "
                    print(f"{run.name}: {kind}{error}", file=sys.stderr, flush=True)
                    status = 1
                    continue
                file = file_of(run, args.results)
                with in_turn(args.results):  # another command may write too
                    write_atomically(file, (json.dumps(read(file) | {run.name: result}, indent=1) + "\n").encode())
            if interrupts:  # a signal for this process alone is for the workers too
                for worker in multiprocessing.active_children():
                    os.kill(worker.pid or 0, signal.SIGINT)
            time.sleep(0.2)
    finally:
        pool.shutdown()
    figures = known(chosen, args.results)
    left = sum(figures.get(run.name, {}).get("status") not in ENDED for run, _ in chosen)
    print(f"{left} of {len(chosen)} runs are left; the same command continues" if left else "all runs are done")
    return status


if __name__ == "__main__":
    try:
        sys.exit(main())
    except CompareError as error:
        sys.exit(f"error: {error}")
