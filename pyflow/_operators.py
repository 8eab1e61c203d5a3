"""One object per operator: what torch is told of it, and how a call reaches its kernel.

`Operator.__call__` is the one short way past torch, for calls where it changes nothing. Compilation, transforms,
function modes, subclasses of Tensor and traces of gradients get the whole dispatcher. Other calls skip its autograd
key, which is Python: where a gradient is needed they apply an autograd function of their own, and the dispatcher only
runs the kernel (20 us less with a warm cache, 200 us after a large tensor has evicted it). On a GPU they skip that too,
unless a mode, a trace or the profiler watches: from the dispatcher into a Python launcher and back takes 30 us (H200
machine), six launches of a kernel.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import has_torch_function

from . import _backend, _torch
from ._autograd import Rules, Signature, eager_apply, first_order, second_order
from ._schemas import NAMED, SCHEMAS, library
from ._torch import (
    BelowAutograd,
    any_requires_grad,
    dispatcher_is_watched,
    is_batched_gradient,
    tracing,
    transform,
)
from ._vmap import one_by_one

OPERATORS: dict[str, Operator] = {}

Kinds = tuple[frozenset[type], ...]  # the types that a kernel takes for each argument

# the types that kernels take as they are; the dispatcher converts others, and a subclass may do something else
TENSORS, _LISTS = frozenset((Tensor, torch.nn.Parameter)), frozenset((list,))
_KINDS: dict[str, frozenset[type]] = {
    "Tensor": TENSORS, "List[Tensor]": _LISTS, "List[int]": frozenset((tuple, list)),
    "ScalarType": frozenset((torch.dtype,)), "int": frozenset((int,)), "SymInt": frozenset((int,)),
    "float": frozenset((float,)), "bool": frozenset((bool,)), "str": frozenset((str,)),
}  # fmt: skip


class Operator:
    """An operator: `operator(*args)` runs it, `operator.reference(*args)` is the same in plain torch.

    Attributes:
        family: the file name in ops/, reference/ and triton_kernels/.
        overload: the operator as torch knows it.
        cuda: whether csrc/cuda has a kernel.
        triton: whether triton_kernels has one.
    """

    def __init__(self, name: str, family: str, reference: Callable, cuda: bool, triton: bool) -> None:
        self.name, self.family, self.cuda, self.triton = name, family, cuda, triton
        self.overload: _torch.Overload = getattr(torch.ops.pyflow, name).default
        self.signature = Signature(self.overload._schema)
        self.reference = by_name(reference, self.signature.arguments)
        self.kinds = kinds_of(self.overload) if triton and torch.cuda.is_available() else None
        self._lists = self.signature.lists
        self._sized = [
            i for i, (argument, kind) in enumerate(self.signature.types.items())
            if kind in ("Tensor", "Optional[Tensor]") or argument == "size"
        ]  # fmt: skip
        self._entry = _torch.entry(self.overload)
        self._apply: Callable | None = None  # set by `differentiate`

    def __call__(self, *args: Any) -> Any:
        if torch.compiler.is_compiling() or transform() is not None or has_torch_function(args):
            return self.overload(*args)
        if self._lists and any(has_torch_function(args[i]) for i in self._lists):
            return self.overload(*args)
        if not torch.is_grad_enabled() or not any_requires_grad(*args):
            return self._run(args)
        if self._apply is None:
            return self.overload(*args)
        # a trace can save operators but not autograd functions
        return self._run(args, contextlib.nullcontext) if tracing() else self._apply(*args)

    def _run(self, args: tuple, guard: Callable[[], Any] = BelowAutograd) -> Any:
        """Run the kernel below autograd; on a GPU without the dispatcher, where it would pass on the arguments."""
        with guard():
            if self.kinds is not None and passes_on(args, self.kinds) and not dispatcher_is_watched():
                return self.launch(*args)
            return self._entry(*args)

    def pick(self, op: str, x: Tensor) -> Callable[..., Any]:
        """Return what the public function `op` calls for a tensor like x: the operator or its reference."""
        return self.reference if _backend.runs_reference(op, x, self.cuda, self.triton) else self

    def for_gradients(self, *grads: Tensor | None) -> Callable[..., Any]:
        """Return what a backward calls for these gradients: the reference under torch.autograd.grad's is_grads_batched,
        whose vmap has no rule for operators with lists of tensors."""
        return self.reference if any(g is not None and is_batched_gradient(g) for g in grads) else self

    def launch(self, *args: Any) -> Any:
        """Run the kernel for CUDA tensors: the Triton launcher or the CUDA operator, see `_backend.prefers_cuda`."""
        runs_cuda = self.cuda and _backend.prefers_cuda(self.family, lambda: self._largest(args))
        return (self.cuda_kernel if runs_cuda else self.triton_kernel)(*args)

    def _largest(self, args: tuple) -> int:
        """Return the number of elements of the largest tensor argument, or of a result whose size is an argument."""
        given = [args[i] for i in self._sized if args[i] is not None]
        return max(value.numel() if isinstance(value, Tensor) else math.prod(value) for value in given)

    @functools.cached_property
    def triton_kernel(self) -> Callable[..., Any]:
        return getattr(importlib.import_module(f"pyflow.triton_kernels.{self.family}"), self.name)

    @functools.cached_property
    def cuda_kernel(self) -> Callable[..., Any]:
        return getattr(_backend.cuda_operators(), self.name).default

    def differentiate(self, rules: Rules) -> None:
        torch.library.register_autograd(self.overload, rules.backward, setup_context=rules.setup, lib=library)
        self._apply = eager_apply(self.name, self.signature, self._run, rules)


def register(
    name: str,
    family: str,
    *,
    reference: Callable,
    fake: Callable,
    vmap: Callable = one_by_one,
    backward: Operator | Callable | None = None,
    keep: Callable[[tuple, Any], Sequence[Any]] | None = None,
    constant: Callable[[Any], Sequence[Tensor]] | None = None,
    cuda: bool = True,
    triton: bool = True,
) -> Operator:
    """Tell torch what an operator is, and return it.

    Args:
        name: in `SCHEMAS`.
        family: the file name in ops/, reference/ and triton_kernels/.
        reference: the operator in plain torch; called with the schema's arguments by name, numbers that stand for a
            name replaced by it. None in place of an output means that `fake` returns an empty one.
        fake: allocates the outputs; called with the schema's arguments in order.
        vmap: a rule of `_vmap`.
        backward, keep, constant: as for `_autograd.first_order`; the derivative of a `*_backward` operator is that of
            its reference.
        cuda: whether csrc/cuda has a kernel.
        triton: whether triton_kernels has one; without either a GPU runs the reference.
    """
    operator = OPERATORS[name] = Operator(name, family, reference, cuda, triton)
    library.impl(name, _kernel(operator, fake), "CompositeExplicitAutograd")
    if triton:
        library.impl(name, operator.launch, "CUDA")
    torch.library.register_fake(operator.overload, fake, lib=library)
    rule = functools.partial(vmap, operator.overload, operator.signature)
    torch.library.register_vmap(operator.overload, rule, lib=library)
    if backward is not None:
        operator.differentiate(first_order(operator.signature, backward, keep, constant))
    elif name.endswith("_backward"):
        operator.differentiate(second_order(operator.signature, operator.reference))
    return operator


def by_name(function: Callable[..., Any], arguments: Sequence[str]) -> Callable[..., Any]:
    """Return the function with arguments in order; a number that stands for a name is replaced by the name."""
    tables = [(name, NAMED.get(name)) for name in arguments]

    def call(*args: Any) -> Any:
        named = zip(tables, args, strict=True)
        return function(**{name: table[value] if table else value for (name, table), value in named})

    return call


def _kernel(operator: Operator, fake: Callable) -> Callable[..., Any]:
    """Return the reference as a kernel, with the layout that the fake promises."""

    def kernel(*args: Any) -> Any:
        with torch.no_grad():
            values = operator.reference(*args)
        outputs = fake(*args)
        if outputs is None:
            return None
        each = (outputs,) if isinstance(outputs, Tensor) else outputs
        for output, value in zip(each, (values,) if isinstance(values, Tensor) else values, strict=True):
            if value is not None:
                output.copy_(value)
        return outputs

    return kernel


def passes_on(args: tuple, kinds: Kinds) -> bool:
    """Whether the dispatcher would pass these arguments unchanged to the kernel for CUDA tensors.

    It does more for arguments of other types than the schema's, and for tensors that are not dense and in GPU memory,
    apart from numbers in 0-d CPU tensors.
    """
    gpu, cpu = _torch.dense_keys("cuda"), _torch.dense_keys("cpu")
    on_gpu = False
    for value, kind in zip(args, kinds, strict=True):
        if type(value) not in kind:
            return False
        for tensor in value if kind is _LISTS else (value,) if isinstance(value, Tensor) else ():
            keys = _torch.keys_of(tensor)
            if type(tensor) not in TENSORS:
                return False
            if keys in gpu:
                on_gpu = True
            elif keys not in cpu or tensor.dim():
                return False
    return on_gpu


def kinds_of(op: _torch.Overload) -> Kinds | None:
    """Return the types that the kernel takes for each argument; None if it writes, which the dispatcher counts."""
    names = [str(argument.real_type) for argument in op._schema.arguments]
    plain = [name.removeprefix("Optional[").removesuffix("]") if "Optional" in name else name for name in names]
    if op._schema.is_mutable or not _KINDS.keys() >= set(plain):
        return None
    return tuple(_KINDS[p] if p == n else _KINDS[p] | {type(None)} for p, n in zip(plain, names, strict=True))


def offer_interpreter() -> torch.library.Library:
    """Register the Triton kernels for CPU tensors, for threads that choose "triton" (the interpreter)."""
    interpreter = torch.library.Library("pyflow", "IMPL")
    for name, operator in OPERATORS.items():
        if not operator.triton:
            continue
        interpreter.impl(name, _interpretable(operator), "CPU", with_keyset=True, allow_override=True)
    return interpreter


def _interpretable(operator: Operator) -> Callable[..., Any]:
    """Return a CPU kernel that runs the Triton kernel in threads that chose it, else the compiled CPU kernel."""
    compiled = torch.library.get_kernel(operator.overload, "CPU")

    def launch(keys: Any, *args: Any) -> Any:
        if _backend.current() == "triton":
            return operator.triton_kernel(*args)
        return compiled.call_boxed(keys, *args)

    return launch


def check_complete() -> None:
    """Raise if a schema has no implementation. Called once all families are loaded."""
    if missing := SCHEMAS.keys() - OPERATORS.keys():
        raise RuntimeError(f"operators without an implementation: {sorted(missing)}")
