"""Everything private that pyflow takes from torch, each with its reason; all of it seen on torch 2.11 and 2.13.

A torch that lacks one of these names fails here.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor
from torch._subclasses import FakeTensor as FakeTensor  # tensors without values; the public API makes them only
from torch.autograd import forward_ad
from torch.utils._python_dispatch import is_traceable_wrapper_subclass as is_traceable_wrapper_subclass
from torch.utils._pytree import tree_flatten as tree_flatten  # there is no public one
from torch.utils._pytree import tree_unflatten as tree_unflatten

F = TypeVar("F", bound=Callable[..., Any])

# Types without a public name.
Overload: TypeAlias = torch._ops.OpOverload
Schema: TypeAlias = torch._C.FunctionSchema

# The innermost torch.func transform, or None. The public API has no such question, and dynamo traces this one.
transform = torch._C._functorch.peek_interpreter_stack

# A guard that runs an operator's kernel without its autograd key, which is Python and costs as much as a kernel.
BelowAutograd = torch._C._AutoDispatchBelowAutograd

# Whether an argument requires a gradient, also within lists; a loop in Python costs ten times as much.
any_requires_grad = torch._C._any_requires_grad

# Id of the backward that this thread runs, or -1. The public API shows it only to hooks.
backward_id = torch._C._current_graph_task_id

# The autograd node that this thread runs in a backward, or None. torch's own hooks of modules ask it too.
current_node = torch._C._current_autograd_node

# The number that the next node of this thread gets.
next_node_number = torch._C._autograd._get_sequence_nr

_innermost_saving_hooks = torch._C._autograd._top_saved_tensors_default_hooks


def checkpoint_frame() -> object | None:
    """Return the frame of the checkpoint (use_reentrant=False) that runs or recomputes, None if there is none on top.

    Its hooks of saved tensors hold the frame, the same in a forward and its recomputation; torch asks nobody for it.
    """
    hooks = _innermost_saving_hooks(False)
    if not hooks or getattr(hooks[0], "__module__", "") != "torch.utils.checkpoint":
        return None
    pack = inspect.unwrap(hooks[0])
    held = dict(zip(pack.__code__.co_freevars, pack.__closure__ or (), strict=True))
    if "frame" in held:
        return held["frame"].cell_contents
    return held["target_frame_ref"].cell_contents() if "target_frame_ref" in held else None


# Disables autocast for every device type at once.
DisableAutocast = torch._C._DisableAutocast

# Whether a hook of every module is registered. The public API only adds and removes them.
any_global_module_hook = torch.nn.modules.module._has_any_global_hook

# A view that autograd takes for a tensor of its own: a view that its functions return cannot be changed in place.
unsafe_view = torch.ops.aten._unsafe_view.default

# Number of active dispatch modes (fake tensors, FLOP counters, ...).
dispatch_modes = torch._C._len_torch_dispatch_stack

# Whether torch.jit.trace records; its public name asks about scripts first.
tracing = torch._C._is_tracing

_profiling = torch._C._autograd._profiler_enabled


def dispatcher_is_watched() -> bool:
    """Whether a dispatch mode, a trace or the profiler follows what the dispatcher runs."""
    return dispatch_modes() > 0 or tracing() or _profiling()


def is_batched_gradient(grad: Tensor) -> bool:
    """Whether torch.autograd.grad was called with is_grads_batched, whose vmap is not torch.func's."""
    return torch._C._functorch.is_legacy_batchedtensor(grad)


def compiler_error() -> type[Exception]:
    """The errors of torch.compile, which has been called: importing dynamo takes seconds."""
    from torch._dynamo.exc import TorchDynamoException

    return TorchDynamoException


def outside_graphs(reason: str) -> Callable[[F], F]:
    """Keep a function and what it calls out of compiled graphs: torch.compiler.disable without importing dynamo."""
    frames = torch._C._dynamo.eval_frame
    skip = frames._FrameAction.SKIP

    def decorate(function: F) -> F:
        # calls from a graph break it, with the reason; frames of the function, and those below them, are not compiled
        vars(function).update(_torchdynamo_disable=True, _torchdynamo_disable_msg=reason)
        frames.set_code_exec_strategy(function.__code__, frames._FrameExecStrategy(skip, skip))
        return function

    return decorate


def evaluated_while_traced(function: Callable) -> Callable:
    """Make dynamo call the function while it traces: torch.compiler.assume_constant_result without importing dynamo."""
    vars(function)["_dynamo_marked_constant"] = True
    return function


@evaluated_while_traced
def under_transform() -> bool:
    """Whether a torch.func transform is active; dynamo takes the answer of `transform` to be an object."""
    return transform() is not None


@evaluated_while_traced
def under_transform_without_rule() -> bool:
    """Whether forward-mode AD or a torch.func transform other than vmap is active; operators have a vmap rule only."""
    if forward_ad._current_level >= 0:
        return True
    if transform() is None:
        return False
    vmap = torch._C._functorch.TransformType.Vmap
    return any(level.key() != vmap for level in torch._C._functorch.get_interpreter_stack())


def exporting() -> bool:
    """Whether torch.export traces: dynamo of torch 2.11 folds is_exporting() to true in every compilation."""
    return torch.compiler._is_exporting_flag


def forward_mode() -> bool:
    """Whether forward-mode AD is active."""
    return forward_ad._current_level >= 0


def has_hooks(module: torch.nn.Module) -> bool:
    """Whether calls of a module run hooks of its own."""
    forward = module._forward_hooks or module._forward_pre_hooks
    return bool(forward or module._backward_hooks or module._backward_pre_hooks)


def entry(overload: Overload) -> Callable[..., Any]:
    """Return the dispatcher's own entry of an operator: OpOverload.__call__ adds a Python frame."""
    return overload._op


def apply_of(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """Return `function.apply` without its Python part, which serves transforms and default arguments."""
    inherited: Any = super(torch.autograd.Function, function)
    return inherited.apply


@functools.cache
def dense_keys(device: str) -> frozenset[int]:
    """Return the dispatch keys of the device's dense tensors: no wrapper, no lazy negation, no other layout."""
    with torch.inference_mode():
        inference = torch.empty(0, device=device)
    with torch.inference_mode(False):
        return frozenset(keys_of(t) for t in (inference, torch.empty(0, device=device)))


def keys_of(tensor: Tensor) -> int:
    return torch._C._dispatch_keys(tensor).raw_repr()


def makes_graph() -> bool:
    """Whether make_fx records a graph of real tensors."""
    return dispatch_modes() > 0 and torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None


# the class of the parametrization that torch's spectral norm registers
SPECTRAL_NORM = "torch.nn.utils.parametrizations._SpectralNorm"


def is_compiled(module: Any) -> bool:
    """Whether torch.compile has made the object, or its calls are compiled by `module.compile()`."""
    return type(module).__module__.startswith("torch._dynamo.") or vars(module).get("_compiled_call_impl") is not None
