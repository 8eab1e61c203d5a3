"""Calls of a GPU kernel that need no dispatcher: `_backend._run` skips it where it would make no difference.

From the dispatcher into a Python kernel and back takes 30 us (H200 machine), six times the launch of a kernel.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

Kinds = tuple[frozenset[type], ...]  # the types that a kernel takes for each argument

_KINDS: dict[str, tuple[type, ...]] = {
    "Tensor": (Tensor, torch.nn.Parameter), "List[int]": (tuple, list), "ScalarType": (torch.dtype,),
    "int": (int,), "float": (float,), "bool": (bool,),
}  # fmt: skip


def changes_nothing(args: tuple, kinds: Kinds) -> bool:
    """Whether the dispatcher would pass these arguments unchanged to the kernel for CUDA tensors, and do no more.

    It does more if a mode, a trace or a transform is active, for the profiler (which records the operator's name), for
    arguments of other types than the schema's, and for tensors that are not dense and in GPU memory, apart from numbers
    in 0-d CPU tensors.
    """
    if (
        torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._is_tracing()
        or torch._C._autograd._profiler_enabled()
    ):
        return False
    gpu, cpu = _dense_keys("cuda"), _dense_keys("cpu")
    on_gpu = False
    for value, kind in zip(args, kinds, strict=True):
        if type(value) not in kind:
            return False
        if isinstance(value, Tensor):
            keys = torch._C._dispatch_keys(value).raw_repr()
            if keys in gpu:
                on_gpu = True
            elif keys not in cpu or value.dim():
                return False
    return on_gpu


@functools.cache
def _dense_keys(device: str) -> frozenset[int]:
    """Return the dispatch keys of the device's dense tensors: no wrapper, no lazy negation, no other layout."""
    with torch.inference_mode():
        inference = torch.empty(0, device=device)
    with torch.inference_mode(False):
        return frozenset(torch._C._dispatch_keys(t).raw_repr() for t in (inference, torch.empty(0, device=device)))


def kinds_of(op: torch._ops.OpOverload) -> Kinds | None:
    """Return the types that the kernel takes for each argument; None if it needs the dispatcher.

    The dispatcher counts writes into arguments, and one call with a list of tensors stands for many.
    """
    names = [str(argument.real_type) for argument in op._schema.arguments]
    plain = [name.removeprefix("Optional[").removesuffix("]") if "Optional" in name else name for name in names]
    if op._schema.is_mutable or not _KINDS.keys() >= set(plain):
        return None
    none = (type(None),)
    return tuple(frozenset(_KINDS[p] + none * (p != n)) for p, n in zip(plain, names, strict=True))
