"""Training of one variant: a resumable sequence of steps, an evaluation after each epoch, the test at the end.

LSTM: stochastic gradient descent on the loss summed over the window's time steps and averaged over its sequences, which
is what the learning rate 1 of Zaremba et al. (2014) and Inan et al. (2017) refers to; a mean over tokens would make the
same rate `bptt` times smaller. The hidden state is carried from window to window. Transformer: AdamW on the mean over
tokens. Both: global-norm clipping, and a rate that falls by a constant factor an epoch after the first few.

Perplexity is exp(mean cross-entropy) without dropout, computed alike for every variant.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ..ops import environment_flag
from .corpus import SPLITS, Corpus, batches
from .lstm import State
from .models import LanguageModel, VariantLoss
from .settings import CompareError, Variant, of_variant
from .statistics import perplexity

Event = Literal["step", "epoch", "done"]
WARM_UPS = 3  # steps before a CUDA graph is captured
ADDED = {"test_losses": None, "diverged": False, "taken_from": None}  # missing in checkpoints of earlier versions


class Diverged(CompareError):
    """The loss of a training is not a number any more."""


@dataclass(frozen=True)
class Data:
    """Inputs and targets of each split, both (T, B), on the training device."""

    n_vocab: int
    train: tuple[Tensor, Tensor]
    valid: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]

    @classmethod
    def of(cls, corpus: Corpus, n_seq: int, device: torch.device) -> Data:
        """Lay the corpus out in `n_seq` columns."""
        pairs = [tuple(t.to(device) for t in batches(getattr(corpus, split), n_seq, corpus.eos)) for split in SPLITS]
        return cls(len(corpus.words), *pairs)  # type: ignore[arg-type]


def in_text_order(values: Tensor, targets: Tensor) -> Tensor:
    """Values (T, B) of a split's tokens as (n_tokens,) in the order of the text, padding left out."""
    return values.T[targets.T >= 0]  # a column is consecutive text


class CapturedStep:
    """Forward and backward of a window as one CUDA graph.

    A loop over time steps is a thousand small kernels, which take longer to launch than to run. A replay draws new
    dropout masks, the same as without a graph, and leaves its gradients in the parameters' `grad`.
    """

    def __init__(
        self,
        work: Callable[..., tuple[Tensor, Tensor, State]],
        model: LanguageModel,
        generator: torch.Generator,
        call: tuple[Tensor, Tensor, State],
    ) -> None:
        inputs, targets, carried = call
        self.inputs, self.targets = inputs.clone(), targets.clone()
        self.carried: State = [(h.clone(), c.clone()) for h, c in carried]
        self.parameters = list(model.parameters())
        before = generator.get_state()
        with torch.cuda.device(inputs.device):
            here, side = torch.cuda.current_stream(), torch.cuda.Stream()
            side.wait_stream(here)
            with torch.cuda.stream(side):
                for _ in range(WARM_UPS):  # kernels compile, libraries take their workspaces
                    work(self.inputs, self.targets, self.carried)
            here.wait_stream(side)
            generator.set_state(before)
            self.graph = torch.cuda.CUDAGraph()
            self.graph.register_generator_state(generator)
            with torch.cuda.graph(self.graph, stream=side):
                self.result = work(self.inputs, self.targets, self.carried)
        self.gradients = [p.grad for p in self.parameters]

    def __call__(self, call: tuple[Tensor, Tensor, State]) -> tuple[Tensor, Tensor, State]:
        """CE, KL and the state to carry on, in memory of the graph: the next call overwrites them."""
        inputs, targets, carried = call
        self.inputs.copy_(inputs)
        self.targets.copy_(targets)
        for mine, given in zip(self.carried, carried, strict=True):
            for to, value in zip(mine, given, strict=True):
                to.copy_(value)
        self.graph.replay()
        for p, gradient in zip(self.parameters, self.gradients, strict=True):
            p.grad = gradient
        return self.result


class Trainer:
    """One variant on its way; `state_dict` and `load_state_dict` hold everything that changes."""

    def __init__(self, variant: Variant, settings: dict[str, Any], data: Data, device: torch.device) -> None:
        settings = of_variant(settings, variant.name)
        self.variant, self.settings, self.data, self.device = variant, settings, data, device
        self.model = LanguageModel(data.n_vocab, settings, tied=variant.tied).to(device)
        self.loss = VariantLoss(variant, settings)
        self.generator = torch.Generator(device).manual_seed(settings["seed"])
        self.is_lstm = settings["model"] == "lstm"
        self.optimizer: torch.optim.Optimizer = (
            torch.optim.SGD(self.model.parameters(), lr=settings["lr"])
            if self.is_lstm
            else torch.optim.AdamW(self.model.parameters(), lr=settings["lr"])
        )
        self.steps_per_epoch = -(-len(data.train[0]) // settings["bptt"])
        self.epoch = self.step = 0
        self.carried: State = []
        self.captured: CapturedStep | None = None
        self.sums = {"ce": 0.0, "kl": 0.0, "tokens": 0, "seconds": 0.0}  # of the epoch under way
        self.terms = torch.zeros(2, dtype=torch.float64, device=device)  # its CE and KL, which `wait` reads
        windows = (data.train[1] >= 0).sum(1).split(settings["bptt"])
        self.window_tokens: list[int] = torch.stack([n.sum() for n in windows]).tolist()
        self.seconds = 0.0  # of training and evaluation so far
        self.trained = {"tokens": 0, "seconds": 0.0}  # so far, evaluation left out
        self.curves: list[dict[str, Any]] = []
        self.best: dict[str, Any] = {}  # epoch, valid_ppl, weights
        self.test_ppl: float | None = None
        self.test_losses: Tensor | None = None  # float32, of each test token in the order of the text
        self.diverged = False  # in the epoch under way, which is as far as this training gets
        self.taken_from: str | None = None  # the directory of the comparison it was trained by, where not by this one

    @property
    def done(self) -> bool:
        return self.test_losses is not None

    @property
    def ended(self) -> bool:
        """Whether there is nothing left to train: it is done, or has diverged."""
        return self.done or self.diverged

    @property
    def steps_done(self) -> int:
        return self.epoch * self.steps_per_epoch + self.step

    def run(self) -> Iterator[Event]:
        """Train to the end. At every event the object is whole: it may be saved, or left.

        Raises Diverged at the end of an epoch whose loss is not a number; the object is whole then too.
        """
        while self.epoch < self.settings["epochs"]:
            while self.step < self.steps_per_epoch:
                self._train_step()
                yield "step"
            self._end_epoch()
            yield "epoch"
        if not self.done:
            began = time.perf_counter()
            self.test_ppl, self.test_losses = self.test()
            self.seconds += time.perf_counter() - began
            yield "done"

    def learning_rate(self) -> float:
        """lr, times lr_decay for each epoch after the first `decay_after`."""
        s = self.settings
        return s["lr"] * s["lr_decay"] ** max(0, self.epoch + 1 - s["decay_after"])

    def _train_step(self) -> None:
        began = time.perf_counter()
        bptt, (inputs, targets) = self.settings["bptt"], self.data.train
        n_seq = inputs.shape[1]
        if self.step == 0:
            self.carried = self.model.body.start(n_seq)
            for group in self.optimizer.param_groups:
                group["lr"] = self.learning_rate()
        window = slice(self.step * bptt, (self.step + 1) * bptt)
        call = inputs[window], targets[window], self.carried
        self.model.train()
        if self._capturable(call):
            if self.captured is None:
                self.captured = CapturedStep(self._forward_backward, self.model, self.generator, call)
            ce, kl, carried = self.captured(call)
        else:
            ce, kl, carried = self._forward_backward(*call)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.settings["clip"])
        self.optimizer.step()
        self.terms += torch.stack((ce, kl)).detach()
        n_tokens = self.window_tokens[self.step]
        self.carried, self.step = carried, self.step + 1
        self.sums["tokens"] += n_tokens
        self.trained["tokens"] += n_tokens
        self._took(time.perf_counter() - began)

    def _took(self, seconds: float) -> None:
        """Count time of training."""
        self.sums["seconds"] += seconds
        self.trained["seconds"] += seconds
        self.seconds += seconds

    def wait(self) -> None:
        """Wait for a GPU to finish the steps it was given; `sums` and the times are whole then.

        A step only hands its work over, so that the GPU never waits for the host.
        """
        if not self.step:
            return
        began = time.perf_counter()
        self.sums["ce"], self.sums["kl"] = self.terms.tolist()
        self._took(time.perf_counter() - began)

    def _forward_backward(self, inputs: Tensor, targets: Tensor, carried: State) -> tuple[Tensor, Tensor, State]:
        """Gradients of a window; its CE and KL, each summed over its tokens, and the state to carry on."""
        self.optimizer.zero_grad(set_to_none=True)
        hidden, carried = self.model(inputs, carried, self.generator)
        terms = self.loss(self.model, hidden, targets)
        items = inputs.shape[1] if self.is_lstm else (targets >= 0).sum().clamp(min=1)
        (terms.loss / items).backward()
        return terms.ce, terms.kl, carried

    def _capturable(self, call: tuple[Tensor, Tensor, State]) -> bool:
        """Whether a CUDA graph may hold the step: on a GPU, of a whole window, with a loss that waits for nothing."""
        return self.device.type == "cuda" and len(call[0]) == self.settings["bptt"] and not self._loss_waits

    @functools.cached_property
    def _loss_waits(self) -> bool:
        """Whether the loss has the host wait for the GPU."""
        plan = self.loss.plan(self.model, self.settings["bptt"] * self.data.train[0].shape[1])
        return plan.impl not in ("triton", "cuda") or environment_flag("TIEDKL_CHECK_TARGETS")

    def _end_epoch(self) -> None:
        self.wait()
        began = time.perf_counter()
        valid_ce = self.evaluate(self.data.valid)
        sums = self.sums
        if not math.isfinite(valid_ce + sums["ce"]):
            self.diverged = True
            raise Diverged(
                f"{self.variant.label}: training diverged in epoch {self.epoch + 1} (the loss is not a number)"
            )
        self.curves.append(
            {
                "epoch": self.epoch + 1,
                "lr": self.learning_rate(),
                "train_ce": sums["ce"] / sums["tokens"],
                "train_kl": sums["kl"] / sums["tokens"] if self.variant.augmented else None,
                "valid_ce": valid_ce,
                "valid_ppl": perplexity(valid_ce),
                "tokens_per_second": sums["tokens"] / sums["seconds"],
            }
        )
        if not self.best or perplexity(valid_ce) < self.best["valid_ppl"]:
            weights = {name: p.detach().clone() for name, p in self.model.state_dict().items()}
            self.best = {"epoch": self.epoch + 1, "valid_ppl": perplexity(valid_ce), "weights": weights}
        self.epoch, self.step = self.epoch + 1, 0
        self.sums = {name: type(value)() for name, value in sums.items()}
        self.terms.zero_()
        self.seconds += time.perf_counter() - began

    @torch.no_grad()
    def windows(self, split: tuple[Tensor, Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """Hidden states (T, B, D) and targets (T, B) of each window, without dropout, the state carried through."""
        self.model.eval()
        state, bptt = self.model.body.start(split[0].shape[1]), self.settings["bptt"]
        for x, y in zip(*(part.split(bptt) for part in split), strict=True):
            hidden, state = self.model(x, state, self.generator)
            yield hidden, y

    @torch.no_grad()
    def evaluate(self, split: tuple[Tensor, Tensor]) -> float:
        """Mean cross-entropy a token, in nats, without dropout, the state carried through the whole split."""
        total = sum(float(self.loss.cross_entropy(self.model, hidden, y)) for hidden, y in self.windows(split))
        return total / int((split[1] >= 0).sum())

    @torch.no_grad()
    def token_losses(self, split: tuple[Tensor, Tensor]) -> Tensor:
        """Cross-entropy of each token of a split, float32 (n_tokens,) on the CPU, in the order of the text."""
        rows = [self.loss.token_cross_entropy(self.model, hidden, y) for hidden, y in self.windows(split)]
        return in_text_order(torch.cat(rows), split[1]).float().cpu()

    def test(self) -> tuple[float, Tensor]:
        """Perplexity and `token_losses` of the test text by the best epoch's weights, which the model then has."""
        self.model.load_state_dict(self.best["weights"])
        losses = self.token_losses(self.data.test)
        return perplexity(float(losses.double().mean())), losses

    def state_dict(self) -> dict[str, Any]:
        """Everything a checkpoint must hold; tensors, numbers, strings and containers only."""
        self.wait()
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            **{name: getattr(self, name) for name in self._PLAIN},
        }

    _PLAIN: tuple[str, ...] = (
        "epoch", "step", "carried", "sums", "seconds", "trained", "curves", "best", "test_ppl", "test_losses",
        "diverged", "taken_from",
    )  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken; the numbers that follow are the same to the last bit."""
        state = ADDED | state
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"].cpu())
        for name in self._PLAIN:
            setattr(self, name, state[name])
        self.terms.copy_(torch.tensor([self.sums["ce"], self.sums["kl"]], dtype=torch.float64))
        if self.test_losses is not None:
            self.test_losses = self.test_losses.cpu()

    def result(self) -> dict[str, Any]:
        """The variant's part of the report (see report.py)."""
        return {
            "status": "done" if self.done else "diverged" if self.diverged else "partial",
            "epochs_done": self.epoch + self.step / self.steps_per_epoch,
            "epochs_planned": self.settings["epochs"],
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "best_epoch": self.best.get("epoch"),
            "valid_ppl": self.best.get("valid_ppl"),
            "test_ppl": self.test_ppl if self.done else None,
            "tokens_per_second": self.trained["tokens"] / self.trained["seconds"] if self.steps_done else None,
            "seconds": self.seconds,
            "taken_from": self.taken_from,
            "curves": self.curves,
        }
