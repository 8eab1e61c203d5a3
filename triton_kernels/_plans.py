"""Launches of kernels that were launched before with arguments of the same kind, without Triton's own binder.

`JITFunction.run` spends 20 us (H200 machine) on finding the compiled kernel. A plan keeps it under a key at least as
fine as Triton's: integers by value, tensors by dtype and alignment. Pointers and `do_not_specialize` integers are not
part of a plan; they are filled in at each launch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import triton.language as tl
from torch import Tensor
from torch.nn import Parameter
from triton import knobs
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

MOST = 4096  # plans; all are dropped before there are more
LONGEST = 16  # tuple that is compared by value

_plans: dict[tuple, Plan] = {}
_forms: dict[tuple, Form] = {}


class Plan(NamedTuple):
    run: Callable
    function: Any
    metadata: Any
    bound: list[object]  # arguments in the order of the signature
    filled: list[int]  # positions in `bound` of the values that `_describe` returns
    constants: object  # kept alive, as the key has its id


class Form:
    """How a launcher names the arguments of a kernel: `order` are their positions in the signature, -1 of options."""

    def __init__(self, kernel: JITFunction, args: int, named: Sequence[str]) -> None:
        at = {param.name: k for k, param in enumerate(kernel.params)}
        self.order = [*range(args), *(at.get(name, -1) for name in named)]
        self.free = [k >= 0 and kernel.params[k].do_not_specialize for k in self.order]


def launch(
    kernel: Any, count: int, index: int | None, num_warps: int, args: Sequence[Any], named: dict[str, Any],
    constants: dict[str, Any],
) -> None:  # fmt: skip
    """Launch `count` programs of a kernel on the current device, with fp fusion (contraction to fma) off.

    Args:
        index: of the current device; None: the tensors are on a CPU.
        args, named: the kernel's first arguments, and others by name.
        constants: more arguments by name; the same object stands for the same values.
    """

    def run() -> Any:
        return kernel[(count,)](*args, **named, **constants, num_warps=num_warps, enable_fp_fusion=False)

    if type(kernel) is not JITFunction or _is_watched(kernel):
        run()
        return
    name = kernel.fn, len(args), *named
    form = _forms.get(name)
    if form is None:
        form = _forms[name] = Form(kernel, len(args), tuple(named))
    values = (*args, *named.values())
    active = driver.active
    # the driver and the form by identity
    key: list = [active, form, index, num_warps, id(constants) if constants else None]
    filled: list[int] = []
    if not _describe(values, form.free, -1 if index is None else index, key, filled):
        run()
        return
    whole = tuple(key)
    plan = _plans.get(whole)
    if plan is None:
        _keep(whole, form, run(), values, constants)
        return
    bound = plan.bound.copy()
    for at, value in zip(plan.filled, filled, strict=True):
        bound[at] = value
    stream = active.get_current_stream(active.get_current_device() if index is None else index)
    plan.run(count, 1, 1, stream, plan.function, plan.metadata, None, None, None, *bound)


def _is_watched(kernel: JITFunction) -> bool:
    """Whether a hook or instrumentation wants to see each launch."""
    runtime = knobs.runtime
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    return bool(
        getattr(enter, "calls", enter) or getattr(leave, "calls", leave) or kernel.pre_run_hooks
        or runtime.add_stages_inspection_hook or runtime.debug or knobs.compilation.instrumentation_mode
    )  # fmt: skip


def _describe(values: tuple, free: list[bool], index: int, key: list, filled: list[int]) -> bool:
    """Append what Triton specialises on to `key` and the rest to `filled`; return False for arguments unknown here."""
    for value, loose in zip(values, free, strict=True):
        kind = type(value)
        if kind is Tensor or kind is Parameter:
            # Triton refuses tensors of other devices
            if value.get_device() != index:
                return False
            pointer = value.data_ptr()
            key += (value.dtype, pointer % 16 == 0)
            filled.append(pointer)
        elif loose:
            if kind is not int or not -(2**63) <= value < 2**63:
                return False
            key.append(-(2**31) <= value < 2**31)
            filled.append(value)
        elif kind is int or value is None:
            key.append(value)
        elif kind is tuple:
            # a table, which may differ in each call
            if len(value) > LONGEST:
                return False
            key.append(value)
        elif kind is tl.dtype or isinstance(value, tuple):
            # long named tuples of constants are cached by their makers; the plan keeps them alive
            key.append(id(value))
        elif kind in (bool, float, str):
            key += (kind, value)
        else:
            return False
    return True


def _keep(key: tuple, form: Form, compiled: Any, values: tuple, constants: dict[str, Any]) -> None:
    """Keep the plan of a launch that has just been made, if this Triton is as expected."""
    names = getattr(getattr(getattr(compiled, "src", None), "fn", None), "arg_names", ())
    arguments = [(at, value, free) for at, value, free in zip(form.order, values, form.free, strict=True) if at >= 0]
    given = {**{names[at]: value for at, value, _ in arguments}, **constants} if names else {}
    target = getattr(getattr(compiled, "metadata", None), "target", None)
    if getattr(target, "backend", None) != "cuda" or given.keys() != set(names) or _hides_tensors(values):
        return
    filled = [at for at, value, free in arguments if free or isinstance(value, Tensor)]
    bound = [given[name] for name in names]
    for at in filled:
        bound[at] = None
    if len(_plans) >= MOST:
        _plans.clear()
    _plans[key] = Plan(compiled.run, compiled.function, compiled.packed_metadata, bound, filled, constants)


def _hides_tensors(values: tuple) -> bool:
    """Whether a tuple holds a tensor, whose address a plan would not renew."""
    return any(isinstance(v, tuple) and (any(isinstance(t, Tensor) for t in v) or _hides_tensors(v)) for v in values)
