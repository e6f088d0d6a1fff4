"""The scripts of examples/ptb at toy size, on CPython's help texts."""

from __future__ import annotations

import copy
import importlib
import io
import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tiedkl.compare import CompareError, Settings, checklist
from tiedkl.compare import corpus as compare_corpus
from tiedkl.compare.lock import locked
from tiedkl.compare.settings import VARIANTS
from tiedkl.compare.training import Data

FOLDER = Path(__file__).parents[2] / "examples" / "ptb"


def start(script: str, *arguments: str, fails: bool = False) -> str:
    """What a script prints; with `fails`, its errors."""
    done = subprocess.run(
        [sys.executable, str(FOLDER / f"{script}.py"), *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert (done.returncode != 0) is fails, done.stderr
    return done.stderr if fails else done.stdout


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(FOLDER)
    names = ("page", "experiments", "ablated", "run", "predictions", "subspaces", "tables")
    for name in names:
        monkeypatch.delitem(sys.modules, name, raising=False)
    before = signal.getsignal(signal.SIGINT)
    yield {name: importlib.import_module(name) for name in names}
    signal.signal(signal.SIGINT, before)  # run.train has its own


@pytest.fixture
def run(modules: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """As `start`, in this process: to import torch takes longer than most of the scripts do."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def call(script: str, *arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *arguments])
        capsys.readouterr()
        assert not modules[script].main()
        return capsys.readouterr().out

    return call


def numbers(file: Path) -> dict[str, Any]:
    figures = json.loads(file.read_text())
    return {name: (run["status"], run["valid_ppl"], run["test_ppl"]) for name, run in figures.items()}


@pytest.mark.slow
def test_an_experiment_that_is_stopped_goes_on_to_the_same_figures(
    tmp_path: Path, modules: Any, run: Callable[..., str]
) -> None:
    common = ("small", "--smoke", "--seed", "1", "--only", "re*", "--threads", "1")
    whole = ("--runs", str(tmp_path / "a"), "--results", str(tmp_path / "a"))
    assert "all runs are done" in start("run", *common, *whole, "--jobs", "2")
    folder = str(tmp_path / "b")
    parts = ("--runs", folder, "--results", folder)
    assert "4 of 4 runs are left" in run("run", *common, *parts, "--minutes", "0")
    args = modules["run"].arguments([*common, *parts])
    for chosen, identity in modules["run"].chosen_runs(args):  # stop each after its first step
        left = modules["run"].train(chosen, args, identity, deadline=0.0, parent=os.getppid())
        assert (left["status"], left["test_ppl"]) == ("partial", None)
        assert 0 < left["epochs_done"] < 1
    run("run", *common, *parts)
    right = numbers(tmp_path / "a" / "small.json")
    assert numbers(tmp_path / "b" / "small.json") == right
    assert {status for status, *_ in right.values()} == {"done"}
    assert "4 of 4 runs are done" in run("run", *common, *parts), "nothing is trained twice"
    page = start("tables", "--results", str(tmp_path / "a"))
    assert "| +REAL | " in page
    assert "| 86.3 | 82.7 | -5.3% |" in page, "the paper's figures stand beside"
    assert (tmp_path / "a" / "small.svg").read_text().startswith("<svg")
    assert "where it is wrong" not in page, "not measured yet"


@pytest.mark.slow
def test_figures_and_checkpoints_of_another_run_are_refused(
    tmp_path: Path, modules: Any, run: Callable[..., str]
) -> None:
    folder = str(tmp_path)
    command = [
        "small",
        "--smoke",
        "--seed",
        "1",
        "--only",
        "re",
        "--threads",
        "1",
        "--runs",
        folder,
        "--results",
        folder,
    ]
    run("run", *command)
    for split in ("train", "valid", "test"):
        (tmp_path / f"other.{split}.txt").write_text("a b c d e f g h\n" * 100, encoding="utf-8")
    with pytest.raises(CompareError, match=r"small-re-1 in .* is of another run \(the text"):
        run("run", *command, "--data", folder)
    (tmp_path / "small.json").unlink()
    args = modules["run"].arguments([*command, "--vocab-size", "500"])
    ((chosen, identity),) = modules["run"].chosen_runs(args)
    with pytest.raises(CompareError, match=r"small-re-1\.pt is of another run"):
        modules["run"].train(chosen, args, identity, deadline=0.0, parent=os.getppid())
    args = modules["run"].arguments(command)
    ((chosen, identity),) = modules["run"].chosen_runs(args)
    state = torch.load(tmp_path / "small-re-1.pt")
    torch.save(state | {"device": "cuda"}, tmp_path / "small-re-1.pt")
    with pytest.raises(CompareError, match=r"small-re-1\.pt was written on cuda: give --device cuda"):
        modules["run"].train(chosen, args, identity, deadline=0.0, parent=os.getppid())


def test_a_run_that_is_stopped_can_be_tested_as_it_is(
    tmp_path: Path, modules: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, longer = modules["run"], {"epochs": 1}
    settings = module.settings_of
    monkeypatch.setattr(module, "settings_of", lambda *call: settings(*call) | longer)

    def trained(folder: str) -> dict[str, Any]:
        place = ("--runs", folder, "--results", folder)
        args = module.arguments(["small", "--smoke", "--seed", "1", "--only", "re", "--test-unfinished", *place])
        ((chosen, identity),) = module.chosen_runs(args)
        return module.train(chosen, args, identity, deadline=math.inf, parent=os.getppid())

    done = trained(str(tmp_path / "done"))
    longer["epochs"] = 3
    with monkeypatch.context() as patch:
        patch.setattr(module.Lines, "epoch", lambda *_: os.kill(os.getpid(), signal.SIGINT))
        stopped = trained(str(tmp_path / "stopped"))
    assert (done["status"], stopped["status"], stopped["epochs_done"]) == ("done", "partial", 1)
    assert stopped["test_ppl"] == done["test_ppl"]
    assert stopped["test_blocks"] == done["test_blocks"]
    row = modules["tables"].unfinished([modules["tables"].Run(1, stopped, None)])
    assert f"epoch 1.0 of 3, validation {done['valid_ppl']:.2f}, test {done['test_ppl']:.2f}" in row
    goes_on = trained(str(tmp_path / "stopped"))
    assert (goes_on["status"], goes_on["curves"][0]["valid_ppl"]) == ("done", done["valid_ppl"])
    assert goes_on["test_ppl"] == trained(str(tmp_path / "whole"))["test_ppl"]


def test_a_worker_that_is_killed_ends_only_its_own_run(
    tmp_path: Path, modules: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pools: list[Any] = []

    class Pool:
        """The first of them breaks with its first job, and takes no more."""

        def __init__(self, *_: Any, **__: Any) -> None:
            pools.append(self)
            self.broken = False

        def submit(self, train: Any, run: Any, *_: Any) -> Future[dict[str, Any]]:
            future: Future[dict[str, Any]] = Future()
            if self.broken:
                raise BrokenProcessPool
            if self is pools[0]:
                self.broken = True
                future.set_exception(BrokenProcessPool("a worker was killed"))
            else:
                future.set_result({"status": "done"})
            return future

        def shutdown(self) -> None:
            pass

    monkeypatch.setattr(modules["run"], "ProcessPoolExecutor", Pool)
    place = ("--runs", str(tmp_path), "--results", str(tmp_path))
    command = ["small", "quarter", "--smoke", "--seed", "1", "--only", "re,*", *place]
    monkeypatch.setattr(sys, "argv", ["run.py", *command])
    assert modules["run"].main() == 1
    said = capsys.readouterr()
    first, *others = modules["run"].chosen_runs(modules["run"].arguments(command))
    assert said.err == f"{first[0].name}: BrokenProcessPool: a worker was killed\n"
    assert f"1 of {len(others) + 1} runs are left" in said.out
    written = [json.loads((tmp_path / f"{name}.json").read_text()) for name in ("small", "quarter")]
    for figures, experiment in zip(written, ("small", "quarter"), strict=True):
        assert set(figures) == {run.name for run, _ in others if run.experiment == experiment} != set()
    assert len(pools) == 2


def test_the_checklist_of_a_comparison_tells_what_was_measured(modules: Any) -> None:
    tables = modules["tables"]
    for experiment, told in (("small", checklist.REPEATED), ("small64", checklist.LONGER)):
        figures = tables.read(tables.RESULTS / f"{experiment}.json")
        runs = {label: tables.runs_of(figures, label) for label in VARIANTS}
        found = tables.changes(runs, "baseline")
        assert set(found) == set(told)
        for name, change in found.items():
            assert (len(change["seeds"]) > 1) == (experiment == "small")
            assert f"{-change['percent']:.1f}" == f"{told[name]}"
            sizes = tables.PUBLISHED.values()
            published = [100 * (1 - size[name][1] / size["baseline"][1]) for size in sizes]
            assert checklist.PUBLISHED[name] == tuple(round(gain, 1) for gain in published)


def test_a_run_is_trained_by_one_command_at_a_time_and_a_diverged_one_once(
    tmp_path: Path, modules: Any, monkeypatch: pytest.MonkeyPatch, run: Callable[..., str]
) -> None:
    folder = str(tmp_path)
    command = ["small", "--smoke", "--seed", "1", "--only", "re", "--threads", "1", "--runs", folder]
    command += ["--results", folder]
    args = modules["run"].arguments(command)
    ((chosen, identity),) = modules["run"].chosen_runs(args)
    call = (chosen, args, identity, math.inf, os.getppid())
    with (
        locked(tmp_path, "small-re-1.lock", "x"),
        pytest.raises(CompareError, match=r"another training of small-re-1 is at work there.*another --runs"),
    ):
        modules["run"].train(*call)
    monkeypatch.setattr(modules["run"].Trainer, "evaluate", lambda self, split: math.nan)
    figures = modules["run"].train(*call)
    assert figures["status"] == "diverged"
    (tmp_path / "small.json").write_text(json.dumps({chosen.name: figures}))
    assert "1 of 1 runs are done" in run("run", *command), "nothing is left to train"
    assert "| seed 1: diverged in epoch 1.0 of 1 |" in run("tables", "--results", folder)


LOSSES = [
    {},
    {"label_smoothing": 0.1},
    {"target_grad": True},
    {"kl_bias": False},
    {"kl_bias": False, "target_grad": True},
    {"temperatures": [40.0, 10.0]},
    {"similarity": "average"},
    {"similarity": "frozen"},
]


@pytest.mark.parametrize("variant", ["al", "real"])
@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: ",".join(loss) or "none")
def test_an_ablation_changes_the_loss_as_it_says(loss: dict[str, Any], variant: str, modules: Any) -> None:
    """The gradients of a step against autograd's of the formula; and a checkpoint goes on to the same bits."""
    data = compare_corpus.load(None)
    data = replace(data, train=data.train[:300], valid=data.valid[:40], test=data.test[:40])
    settings = Settings(hidden=8, batch=4, bptt=10, epochs=1, dropout=0.0, temperature=5.0, clip=1e9, seed=3)
    resolved = settings.resolved(300)
    vectors = torch.randn(len(data.words), 8, generator=torch.Generator().manual_seed(1))

    def trainer() -> Any:
        made = Data.of(data, 4, torch.device("cpu"))
        kind = modules["ablated"].AblatedTrainer
        return kind(VARIANTS[variant], resolved, made, torch.device("cpu"), options=loss, vectors=vectors)

    whole = trainer()
    steps = whole.run()
    for _ in range(3):
        next(steps)
    before = copy.deepcopy(whole)
    k = whole.step
    next(steps)
    model = before.model.double()
    window = slice(10 * k, 10 * k + 10)
    inputs, targets = (t[window] for t in before.data.train)
    state = [(h.double(), c.double()) for h, c in before.carried]
    hidden, _ = model(inputs, state, before.generator)
    hidden, targets = hidden.flatten(0, 1), targets.flatten()
    metric = {"average": before.source, "frozen": vectors}.get(loss.get("similarity", ""), model.embedding.weight)
    metric = metric if loss.get("target_grad") else metric.detach()
    first, last = loss.get("temperatures", [5.0, 5.0])
    tau = first + (last - first) * k / (whole.steps_per_epoch - 1)
    logits = hidden @ model.weight.T + model.bias
    similar = (metric[targets].double() @ metric.double().T / tau).softmax(-1)
    ce = F.cross_entropy(logits, targets, reduction="sum", label_smoothing=loss.get("label_smoothing", 0.0))
    seen = logits if loss.get("kl_bias", True) else logits - model.bias
    kl = (similar * (similar.log() - (seen / tau).log_softmax(-1))).sum()
    ((ce + 0.5 * tau * kl) / 4).backward()
    for (name, old), new in zip(model.named_parameters(), whole.model.parameters(), strict=True):
        moved = (old - new.detach().double()) / before.learning_rate()
        torch.testing.assert_close(moved, old.grad, rtol=2e-4, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}")

    saved = io.BytesIO()
    torch.save(whole.state_dict(), saved)
    saved.seek(0)
    other = trainer()
    other.load_state_dict(torch.load(saved, weights_only=True))
    for t in (whole, other):
        list(t.run())
    assert whole.test_losses.equal(other.test_losses)


@pytest.mark.slow
def test_what_the_variants_predict(tmp_path: Path, run: Callable[..., str]) -> None:
    folders = ("--runs", str(tmp_path), "--results", str(tmp_path))
    run("run", "small", "--smoke", "--seed", "1", "--threads", "1", *folders)
    printed = start("predictions", "--smoke", "--show", "2", *folders)
    assert printed.count("    +REAL ") == 2
    found = json.loads((tmp_path / "predictions.json").read_text())["variants"]
    assert list(found) == ["baseline", "al", "re", "real"]
    losses = json.loads((tmp_path / "small.json").read_text())
    for name, figures in found.items():
        right = figures["the right word"]["mean"]
        assert right >= 1 / losses[f"small-{name}-1"]["test_ppl"], "the mean is at least the geometric mean (Jensen)"
        assert ("change" in figures["the right word"]) == (name != "baseline")
    page = run("tables", "--results", str(tmp_path))
    assert "| `<unk>`, where it is wrong | " in page


def test_nearest_words(modules: Any) -> None:
    e = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.1], [2.0, 0.0], [0.0, 1.0], [0.1, 3.0]])
    near = modules["predictions"].nearest(e)
    assert near.shape == (6, 3), "no more words than there are"
    assert near[3].tolist() == [2, 5, 4], "by angle, not by length; <unk>, <eos> and itself left out"
    assert near[4].tolist()[0] == 5
    words = ["<unk>", "<eos>", "company", "of", "N", "the"]
    assert modules["predictions"].function_words(words).tolist() == [5, 3]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--device", "cuda:99"), "this PyTorch sees no such GPU"),
        (("--jobs", "0"), "jobs=0, threads=1: expected at least 1"),
        (("--only", "nothing"), "no run of small is called nothing"),
    ],
)
def test_bad_options_are_said_in_a_line(
    options: tuple[str, ...], message: str, tmp_path: Path, run: Callable[..., str]
) -> None:
    command = ("small", "--smoke", "--threads", "1", "--runs", str(tmp_path), "--results", str(tmp_path), *options)
    with pytest.raises(CompareError, match=message):
        run("run", *command)
    if options[0] == "--only":  # and so for every CompareError
        assert start("run", *command, fails=True) == f"error: {message} with that seed\n"


def test_a_table_compares_with_its_control(modules: Any) -> None:
    def figures(label: str, seed: int, ppl: float) -> dict[str, Any]:
        blocks = [math.log(ppl) + 0.01 * (seed + k % 3) for k in range(30)]
        kl = None if label == "baseline" else 0.01 * seed
        return {"label": label, "seed": seed, "status": "done", "parameters": 1000, "best_epoch": 3, "valid_ppl": ppl,
                "test_ppl": math.exp(sum(blocks) / 30), "test_blocks": blocks, "loss": {},
                "settings": {"gamma": 0.5, "temperature": 20.0},
                "curves": [*[{"train_kl": kl, "train_ce": 5.0}] * 3, {"train_kl": 9.0, "train_ce": 5.0}]}  # fmt: skip

    runs = {f"{v}-{s}": figures(v, s, ppl) for v, ppl in (("al", 95.0), ("baseline", 100.0)) for s in (1, 2)}
    lines = modules["tables"].table(runs).splitlines()
    assert lines[2].startswith("| baseline | 1,000 | 2 | 3/3 | - | 100.00 | ")
    assert lines[3].startswith("| +AL | 1,000 | 2 | 3/3 | 3.0% | 95.00 | ")  # alpha KL of the best epoch: 2 and 4%
    assert "| -5.0%* (-5.0 to -5.0) |" in lines[3]
    two = dict(runs)
    del runs["al-2"]  # a seed that only the control has plays no part, and one pair is no proof
    assert "| -5.0% (-5.0 to -5.0) |" in modules["tables"].table(runs).splitlines()[3]
    del two["baseline-2"]
    assert "| -5.0% (-5.0 to -5.0, 1 of 2 seeds) |" in modules["tables"].table(two).splitlines()[3]
    runs["al-1"] |= {"status": "partial", "test_ppl": None}
    runs["al-1"] |= {"epochs_done": 1.5, "epochs_planned": 3}
    line = modules["tables"].table(runs).splitlines()[3]
    assert line.endswith("| - | - | - | - | - | seed 1: epoch 1.5 of 3, validation 95.00 |")
    runs["al-2"] = two["al-2"] | {"loss": {"temperatures": [40.0, 10.0]}}  # alpha changes: no one figure
    assert modules["tables"].table(runs).splitlines()[3].startswith("| +AL | 1,000 | 1 | 3 | - | 95.00 | ")


def test_what_a_loss_does_on_top_of_tying(modules: Any) -> None:
    def figures(label: str, seed: int, ppl: float, **settings: Any) -> dict[str, Any]:
        blocks = [math.log(ppl) + 0.001 * (seed + (k + len(label)) % 3) for k in range(30)]
        variant = "re" if label.startswith("re") else "real"
        return {"label": label, "seed": seed, "status": "done", "valid_ppl": ppl, "test_blocks": blocks,
                "variant": variant, "settings": {"gamma": 0.5} | settings}  # fmt: skip

    three = {"re": 100.0, "real": 99.0, "re,smoothing=0.1": 95.0, "gamma=4": 90.0}
    runs = {f"{label}-{s}": figures(label, s, ppl) for label, ppl in three.items() for s in (1, 2)}
    runs["x"] = figures("gamma=16", 1, 50.0)  # one seed is no proof
    runs |= {f"no bias-{s}": figures("no bias", s, 70.0, tied_bias=False) for s in (1, 2)}  # not the loss alone
    del runs["re,smoothing=0.1-2"]
    title, _, table = modules["tables"].on_tying({"small": runs})
    assert title.startswith("## What a loss does")
    assert [line.split(" | ")[1:3] for line in table.splitlines()[2:]] == [
        ["+REAL", "-1.0%* (-1.0 to -1.0)"],
        ["`gamma=4`", "-10.0%* (-10.0 to -10.0)"],
    ]
    runs["re,smoothing=0.1-2"] = figures("re,smoothing=0.1", 2, 95.0)
    rows = modules["tables"].on_tying({"small": runs})[2].splitlines()[2:]
    assert [row.split(" | ")[-1] for row in rows] == ["+4.2%* (+4.2 to +4.2) |", "- |", "-5.3%* (-5.3 to -5.3) |"]
    assert modules["tables"].on_tying({"small": {"a": runs["re-1"], "b": runs["real-1"]}}) == []
    runs["real-2"]["settings"]["lr"] = 0.5
    with pytest.raises(ValueError, match="real differs from what it is compared with in more than the loss"):
        modules["tables"].on_tying({"small": runs})


def test_the_papers_figures_stand_beside_the_best_training_on_validation(modules: Any) -> None:
    def run(label: str, valid: float | None, test: float | None, **more: Any) -> dict[str, Any]:
        done = {"status": "done", "seed": 1, "epochs_done": 40.0, "epochs_planned": 40}
        return done | {"label": label, "valid_ppl": valid, "test_ppl": test, "test_blocks": [1.0]} | more

    far = {"temperature": 10.0, "gamma": 0.8}
    figures = {
        "small": {"a": run("re", 101.0, 80.0), "b": run("gamma=4", 10.0, 10.0)},
        "small40": {"a": run("re", 89.0, 85.1)},
        "small100": {"a": run("al", 90.0, 86.0), "b": run("al,tau=10,gamma=0.8", 86.3, 82.9, settings=far)},
        "wide": {"a": run("re", 50.0, 50.0)},  # a part of the text is not the paper's training
        "large": {"a": run("real", 71.1, None, status="partial", epochs_done=30.4)},
        "medium": {"a": run("al", None, None, status="partial", epochs_done=0.5)},
    }
    lines = modules["tables"].against_paper(figures).splitlines()
    rows = {tuple(cells[:2]): cells[2:] for line in lines[2:] if (cells := line.strip("| ").split(" | "))}
    assert len(rows) == 12
    assert rows["200", "+RE"] == ["89.00", "89.9", "-1.0%", "85.10", "85.1", "0.0%", "`small40`, seed 1, 40 epochs"]
    assert rows["200", "+AL"][-1] == "`small100`, τ = 10, γ = 0.8, seed 1, 40 epochs"
    stopped = "`large`, seed 1, 40 epochs, stopped after 30"
    assert rows["1,500", "+REAL"] == ["71.10", "71.1", "0.0%", "-", "68.5", "-", stopped]
    assert rows["650", "+AL"] == ["-", "77.4", "-", "-", "74.7", "-", "not trained"]
    with pytest.raises(SystemExit, match="lacks"):
        modules["tables"].with_table("no marks", "x")


def test_every_run_has_a_name_of_its_own(modules: Any) -> None:
    names = [run.name for runs in modules["experiments"].experiments().values() for run in runs]
    assert len(names) == len(set(names))
    four = modules["experiments"].experiments()["small"][:4]
    assert [run.variant for run in four] == ["baseline", "al", "re", "real"]


def test_the_share_outside_a_space(modules: Any) -> None:
    outside = modules["subspaces"].outside
    basis = torch.randn(50, 4)
    assert outside(basis @ torch.randn(4, 4), basis) == pytest.approx(0, abs=1e-6)
    orthogonal = torch.randn(50, 4).double()
    q, _ = torch.linalg.qr(basis.double())
    orthogonal -= q @ (q.T @ orthogonal)
    assert outside(orthogonal, basis) == pytest.approx(1)
    assert outside(
        orthogonal / orthogonal.norm() + q[:, :1] @ torch.full((1, 4), 0.5).double(), basis
    ) == pytest.approx(0.5**0.5)


@pytest.mark.slow
def test_figure_1_goes_on_and_is_shown(tmp_path: Path, run: Callable[..., str]) -> None:
    out = ("--smoke", "--out", str(tmp_path / "subspaces.json"))
    first = start("subspaces", *out)
    report = json.loads((tmp_path / "subspaces.json").read_text())
    assert list(report["runs"]) == ["beta=0", "beta=1 tau=1", "beta=1 tau=10"], "at beta 0 the temperature is nothing"
    assert run("subspaces", *out) == first, "what was trained is not trained again"
    page = run("tables", "--results", str(tmp_path))
    distance = report["runs"]["beta=0"]["distance"]
    assert f"| 0 | {distance:.3f} | {distance:.3f} |" in page
    assert "τ = 10" in (tmp_path / "subspaces.svg").read_text()


def test_the_committed_page_is_that_of_the_committed_figures(modules: Any) -> None:
    results = FOLDER / "results"
    text, pictures = modules["tables"].page(results)
    assert text == (results / "README.md").read_text("utf-8")
    assert set(pictures) == {file.name for file in results.glob("*.svg")}
    readme = (FOLDER / "README.md").read_text("utf-8")
    tables = modules["tables"]
    assert tables.with_table(readme, tables.against_paper(tables.all_figures(results))) == readme
