"""Launches of kernels that were launched before with arguments of the same kind, without Triton's own binder.

`JITFunction.run` spends 20 us (H200 machine) on finding the compiled kernel. A plan keeps it under a key at least as
fine as Triton's: integers by value, tensors by dtype and alignment, tuples by what they hold. Pointers, `Words` and
`do_not_specialize` integers are not part of a plan; they are filled in at each launch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import triton.language as tl
from torch import Tensor
from torch.nn import Parameter
from triton import knobs
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction, KernelParam

MOST = 4096  # plans; all are dropped before there are more
LONGEST = 16  # tuple that is compared by value
TENSORS = (Tensor, Parameter)
PLAIN, LOOSE, CONSTANT = range(3)  # how Triton specialises a parameter: on its kind, on its type alone, on its value

_plans: dict[tuple, Plan] = {}
_forms: dict[tuple, Form] = {}


class Words(tuple):
    """Integers that change from launch to launch; all have the same specialisation.

    Triton compiles anew for 1, for multiples of 16 and for each width of an integer, and `do_not_specialize` does not
    reach into tuples. So the integers are odd, and too large for 32 bits.
    """

    __slots__ = ()


class Kept(tuple):
    """Integers that a launcher keeps for many launches: a plan knows them by identity."""

    __slots__ = ()


def words(value: int) -> Words:
    """Return the low and the high 32 bits of an integer, see `_tiles.word`."""
    # shifted by 32 bits, so that a kernel takes one register of the two, and filled up so that no word fits 32 bits
    low, high = value & 0xFFFFFFFF, value >> 32 & 0xFFFFFFFF
    return Words((
        (low << 32) + 0x80000003 if low < 0x80000000 else (low - 0x100000000 << 32) + 3,
        (high << 32) + 0x80000003 if high < 0x80000000 else (high - 0x100000000 << 32) + 3,
    ))  # fmt: skip


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
        self.kinds = [_kind(kernel.params[k]) if k >= 0 else CONSTANT for k in self.order]


def _kind(param: KernelParam) -> int:
    return CONSTANT if param.is_constexpr else LOOSE if param.do_not_specialize else PLAIN


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
    filled: list[object] = []
    if not _describe(values, form.kinds, -1 if index is None else index, key, filled):
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


def _describe(values: tuple, kinds: list[int], index: int, key: list, filled: list[object]) -> bool:
    """Append what Triton specialises on to `key` and the rest to `filled`; return False for arguments unknown here."""
    for value, kind in zip(values, kinds, strict=True):
        form = type(value)
        if form is tuple and value and isinstance(value[0], Tensor):
            tensor, at = value[0], value[-1]
            if len(value) != 2 or type(tensor) not in TENSORS or not (type(at) is tuple or type(at) is int):
                if not _describe_fields(value, index, key, filled):
                    return False
                continue
            # a view: the tensor and its strides
            if tensor.get_device() != index:
                return False
            pointer = tensor.data_ptr()
            key += (tuple, tensor.dtype, pointer % 16 == 0, at)
            filled.append((pointer, at))
        elif form is Tensor or form is Parameter:
            # Triton refuses tensors of other devices
            if value.get_device() != index:
                return False
            pointer = value.data_ptr()
            key += (value.dtype, pointer % 16 == 0)
            filled.append(pointer)
        elif kind == LOOSE:
            if form is not int or not -(2**63) <= value < 2**63:
                return False
            key.append(-(2**31) <= value < 2**31)
            filled.append(value)
        elif form is int or value is None:
            key.append(value)
        elif form is Words:
            key += (Words, len(value))
            filled.append(value)
        elif form is tuple:
            # a table, which may differ in each call
            if len(value) > LONGEST:
                return False
            key.append(value)
        elif form is tl.dtype or form is Kept or (kind == CONSTANT and isinstance(value, tuple)):
            # long named tuples of constants are cached by their makers; the plan keeps them alive
            key += (form, id(value))
        elif isinstance(value, tuple):
            if not _describe_fields(value, index, key, filled):
                return False
        elif form in (bool, float, str):
            key += (form, value)
        else:
            return False
    return True


def _describe_fields(value: tuple, index: int, key: list, filled: list[object]) -> bool:
    """`_describe` a tuple that is filled in as a whole, with pointers in place of tensors."""
    fields: list[object] = []
    key += (type(value), len(value))
    for field in value:
        form = type(field)
        if form is int or field is None:
            key.append(field)
            fields.append(field)
        elif form is Tensor or form is Parameter or form is Words:
            if not _describe((field,), ONE, index, key, fields):
                return False
        elif not isinstance(field, tuple) or not _describe_fields(field, index, key, fields):
            return False
    filled.append(tuple(fields))
    return True


ONE = [PLAIN]


def _is_filled(value: object, kind: int) -> bool:
    """Whether `_describe` leaves the value to each launch."""
    if kind == CONSTANT:
        return False
    if not isinstance(value, tuple) or isinstance(value, (Words, Kept)):
        return kind == LOOSE or isinstance(value, (Tensor, Words))
    return type(value) is not tuple or (len(value) > 0 and isinstance(value[0], Tensor))


def _keep(key: tuple, form: Form, compiled: Any, values: tuple, constants: dict[str, Any]) -> None:
    """Keep the plan of a launch that has just been made, if this Triton is as expected."""
    names = getattr(getattr(getattr(compiled, "src", None), "fn", None), "arg_names", ())
    arguments = [(at, value, kind) for at, value, kind in zip(form.order, values, form.kinds, strict=True) if at >= 0]
    given = {**{names[at]: value for at, value, _ in arguments}, **constants} if names else {}
    target = getattr(getattr(compiled, "metadata", None), "target", None)
    filled = [at for at, value, kind in arguments if _is_filled(value, kind)]
    fixed = [value for _, value, kind in arguments if not _is_filled(value, kind)]
    if getattr(target, "backend", None) != "cuda" or given.keys() != set(names) or _holds_tensors(fixed):
        return
    bound = [given[name] for name in names]
    for at in filled:
        bound[at] = None
    if len(_plans) >= MOST:
        _plans.clear()
    _plans[key] = Plan(compiled.run, compiled.function, compiled.packed_metadata, bound, filled, constants)


def _holds_tensors(values: Sequence[object]) -> bool:
    """Whether a tuple holds a tensor, whose address a plan would not renew."""
    return any(isinstance(v, Tensor) or (isinstance(v, tuple) and _holds_tensors(v)) for v in values)
