"""`VocabParallelTiedLoss`: what users call, and what the ranks check. tiedkl/distributed/walk.py computes."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from typing_extensions import Unpack

from .. import ops
from ..arguments import Call, Number, check_call, is_dtensor, shift_targets
from ..backends.torch import TUNING
from ..loss import FusedTiedLoss, LossOptions, TiedLossOutput, needs, output
from ..plan import Shape, make_plan
from ..problem import SKIPPED, acc_dtype
from .collectives import Claim, agree, all_gather, checksum
from .function import Job, VocabParallel


class VocabParallelTiedLoss(nn.Module):
    """`tiedkl.FusedTiedLoss` where the ranks of a process group each hold some rows of the tied matrix.

    Rank k holds rows [v_k, v_k+1) of the (V, D) matrix: shards in rank order, of any lengths, empty ones included.
    Every rank has all tokens, or with `sequence_parallel` a part of them. All ranks have to call, and get the same
    loss, to the last bit. Logits and the matrix are never sent: see `tiedkl.distributed.traffic`.

    Args:
        group: the process group; None is the default one. With a DTensor `weight` it is that of its mesh.
        sequence_parallel: each rank holds some of the tokens: `input`, `target` and `token_weight` are parts along
            their first dimension, in rank order, of any lengths. The loss is that of all tokens; for reduction="none"
            it is this rank's tokens' own. Gradients of `input` are this rank's.
        reduce_input_grad: add up the gradient of `input` over the ranks. False leaves each rank its share.
        check: also compare what is not compared by default, `input`, `token_weight` and `num_items`, by a checksum.
            TIEDKL_CHECK_TARGETS=1 turns it on as well.
        **options: those of `tiedkl.FusedTiedLoss`; `impl` is "auto" or "torch", and `workspace_bytes` is each rank's.

    Arguments of a call, `loss_fn(input, weight_shard, target, bias_shard=None, *, target_weight=None, ...)`:
        input: (..., D), the same on every rank; (n, ...) of its own with `sequence_parallel`.
        weight_shard: (rows, D), or a DTensor with placements [Shard(0)] on a one-dimensional mesh; its gradient is such
            a DTensor too. Then `bias_shard` and `target_weight` may be such DTensors, and the rest replicated ones.
        target: (...) global ids in [0, V), or `ignore_index`.
        bias_shard: (rows,). target_weight: (rows, D').
        token_weight, num_items, shift: as for `FusedTiedLoss`.

    The gradient of the loss given to backward has to be the same on every rank. On a GPU a forward waits for the device
    a few times at its start, for the targets and sizes, and not after that.

    Raises:
        TypeError, ValueError: as `FusedTiedLoss`, on every device for a target outside [0, V); and where ranks differ
        in options, shapes or targets. The same error on every rank, before anything else is sent.
        RuntimeError: without a process group, for another `impl`, or from torch.distributed when a rank is gone.
    """

    def __init__(
        self,
        *,
        group: dist.ProcessGroup | None = None,
        sequence_parallel: bool = False,
        reduce_input_grad: bool = True,
        check: bool = False,
        **options: Unpack[LossOptions],
    ):
        super().__init__()
        flags = {"sequence_parallel": sequence_parallel, "reduce_input_grad": reduce_input_grad, "check": check}
        for name, flag in flags.items():
            if not isinstance(flag, bool):
                raise TypeError(f"{name} must be a bool, got {type(flag).__name__}")
        if sequence_parallel and not reduce_input_grad:
            raise ValueError(
                "sequence_parallel=True adds up the gradient of input: reduce_input_grad=False cannot hold"
            )
        impl = options.setdefault("impl", "auto")
        if impl not in ("auto", "torch"):
            raise RuntimeError(f"impl={impl!r} cannot run on a sharded vocabulary: 'auto' and 'torch' can")
        options["impl"] = "torch"
        self.settings = FusedTiedLoss(**options).settings
        self.group = group
        self.sequence_parallel, self.reduce_input_grad, self.check = sequence_parallel, reduce_input_grad, check

    def forward(
        self,
        input: Tensor,
        weight_shard: Tensor,
        target: Tensor,
        bias_shard: Tensor | None = None,
        *,
        target_weight: Tensor | None = None,
        token_weight: Tensor | None = None,
        num_items: Number | Tensor | None = None,
        shift: int = 0,
    ) -> Tensor | TiedLossOutput:
        """The loss; see the class for shapes and errors."""
        if not dist.is_initialized():
            raise RuntimeError("no process group: call torch.distributed.init_process_group first")
        group: Any = self.group
        # One-dimensional targets in parts are shifted once they are whole.
        late = shift if self.sequence_parallel and isinstance(target, Tensor) and target.dim() == 1 else 0
        now = 0 if late else shift
        call: Call | None = None
        try:
            if is_dtensor(weight_shard):
                from .tensors import local

                mesh: Any = weight_shard.device_mesh  # type: ignore[attr-defined]
                if group is None and mesh.ndim == 1:
                    group = mesh.get_group()  # where the others hear of an error in `local`
                given = (input, weight_shard, target, bias_shard, target_weight, token_weight)
                group, (input, weight_shard, target, bias_shard, target_weight, token_weight) = local(
                    given, group, self.sequence_parallel, self.reduce_input_grad
                )
            tensors = (input, weight_shard, target, bias_shard, target_weight, token_weight)
            call = check_call(self.settings, *tensors, num_items, now, empty=True)
            claim = self._claim(call, num_items, shift, late)
        except Exception as error:
            claim = Claim(error=error)
        claims = agree(claim, group)  # raises where there is an error
        assert call is not None
        job = self._job(call, claims, late, group)
        loss, terms, scale = VocabParallel.apply(call.h, call.w, call.b, call.t, job)
        return output(self.settings, call.shape, now, loss, terms, scale)

    def _claim(self, call: Call, num_items: Number | Tensor | None, shift: int, late: int) -> Claim:
        """What this rank is about to compute, for the others to compare with theirs."""
        c, y = self.settings.scalars, call.target.to("cpu", torch.int64)
        if late and c.reduction == ops.NONE:
            raise ValueError("shift with sequence_parallel=True and reduction='none': pass targets that are shifted")
        valid = y[y != c.ignore_index]
        low, high = torch.aminmax(valid) if len(valid) else (0, -1)
        facts: dict[str, object] = {
            **vars(c.options),
            "reduction": ops.REDUCTIONS[c.reduction],
            "ignore_index": c.ignore_index,
            "workspace_bytes": c.workspace_bytes,
            "sequence_parallel": self.sequence_parallel,
            "reduce_input_grad": self.reduce_input_grad,
            "the dtype": str(call.h.dtype),
            "the width": call.w.shape[1],
            "bias": "given" if call.b is not None else None,
            "the width of target_weight": None if call.t is None else call.t.shape[1],
            "the dtype of token_weight": None if call.token_weight is None else str(call.token_weight.dtype),
            "num_items": "a tensor" if isinstance(num_items, Tensor) else num_items,
            "shift": shift,
            "the set of gradients wanted": needs(call, c.options),
        }
        if self.sequence_parallel:
            facts["target.shape[1:]"] = tuple(call.shape[1:])
        else:
            facts["target.shape"] = tuple(call.shape)
            facts["the checksum of target"] = checksum(y)
        if self.check or ops.environment_flag("TIEDKL_CHECK_TARGETS"):
            facts["check"] = True
            facts["the checksum of num_items"] = None if call.num_items is None else float(call.num_items)
            if not self.sequence_parallel:
                facts["the checksum of input"] = checksum(call.h)
                facts["the checksum of token_weight"] = (
                    None if call.token_weight is None else checksum(call.token_weight)
                )
        return Claim(facts, rows=len(call.w), tokens=len(call.h), low=int(low), high=int(high))

    def _job(self, call: Call, claims: list[Claim], late: int, group: Any) -> Job:
        """Everything that follows from what all ranks hold. ValueError for targets outside the vocabulary."""
        c = self.settings.scalars
        rows, sizes = [x.rows for x in claims], [x.tokens for x in claims]
        vocab, target, token_weight = sum(rows), call.target.to(torch.int64), call.token_weight
        if not vocab:
            raise ValueError("weight_shard.shape[0]=0 on every rank: the vocabulary is empty")
        for rank, x in enumerate(claims):
            bad = x.low if x.low < 0 else x.high
            if x.low < 0 or x.high >= vocab:
                where = f" on rank {rank}" if self.sequence_parallel else ""
                raise ValueError(
                    f"a target{where} is {bad}, outside [0, {vocab}), and is not ignore_index={c.ignore_index}"
                )
        if self.sequence_parallel:
            target = all_gather(target, sizes, group)
            token_weight = None if token_weight is None else all_gather(token_weight, sizes, group)
        target, token_weight = shift_targets(target, token_weight, late, c.ignore_index)
        y = torch.where(target == c.ignore_index, SKIPPED, target)
        o, acc, wanted = c.options, acc_dtype(call.h.dtype), needs(call, c.options)
        shape = Shape(
            tokens=len(y),
            vocab=max(rows),  # everybody's plan is that of the largest shard
            width=call.w.shape[1],
            teacher_width=(call.w if call.t is None else call.t).shape[1],
            kl=o.alpha != 0,
            grad=bool(wanted),
            target_grad=o.target_grad,
            acc_bytes=acc.itemsize,
            half=call.h.dtype != acc,
        )
        return Job(
            scalars=c._replace(needs=wanted),
            group=group,
            plan=make_plan("torch", shape, TUNING, c.workspace_bytes if c.workspace_bytes >= 0 else None),
            y=y.cpu(),
            scale=ops.token_scale(y, False, token_weight, call.num_items, c.reduction, acc),
            first=sum(rows[: dist.get_rank(group)]),
            vocab=vocab,
            sizes=sizes,
            sequence_parallel=self.sequence_parallel,
            reduce_input_grad=self.reduce_input_grad,
        )

    def extra_repr(self) -> str:
        s, o = self.settings.scalars, self.settings.scalars.options
        reduction = ops.REDUCTIONS[s.reduction]
        return (
            f"temperature={o.temperature:g}, alpha={o.alpha:g}, reduction={reduction!r}, "
            f"sequence_parallel={self.sequence_parallel}"
        )
