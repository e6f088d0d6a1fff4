"""DTensors of a one-dimensional mesh, taken apart into this rank's tensors and the process group."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

NAMES = ("input", "weight_shard", "target", "bias_shard", "target_weight", "token_weight")


def local(
    tensors: tuple[Any, ...], group: Any, sequence_parallel: bool, reduce_input_grad: bool
) -> tuple[Any, tuple[Any, ...]]:
    """(group, the local tensors), in the order of NAMES; `weight_shard` is a DTensor, the others may be.

    Gradients become DTensors with the same placements. ValueError for other meshes and placements.
    """
    mesh = tensors[1].device_mesh
    if mesh.ndim != 1:
        raise ValueError(
            f"weight_shard is on a mesh of {mesh.ndim} dimensions, expected 1: the tensor-parallel part of the mesh"
        )
    if group is not None and group is not mesh.get_group():
        raise ValueError("group is not that of weight_shard's mesh: leave it out")
    tokens = Shard(0) if sequence_parallel else Replicate()
    rows = Shard(0)
    expected = dict(zip(NAMES, (tokens, rows, tokens, rows, rows, tokens), strict=True))

    def one(name: str, x: Any) -> Tensor | Any:
        if not isinstance(x, DTensor):
            return x
        if x.device_mesh != mesh or tuple(x.placements) != (expected[name],):
            raise ValueError(
                f"{name} is a DTensor with placements {x.placements} on {x.device_mesh}, "
                f"expected ({expected[name]},) on {mesh}"
            )
        partial = name == "input" and not sequence_parallel and not reduce_input_grad
        return x.to_local(grad_placements=[Partial()] if partial else x.placements)

    return mesh.get_group(), tuple(one(name, x) for name, x in zip(NAMES, tensors, strict=True))
