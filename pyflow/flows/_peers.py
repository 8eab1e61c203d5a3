"""Flows of other packages: the methods of their classes, run on an object that has their layers fused."""

from __future__ import annotations

import copyreg
import functools
from collections.abc import Iterable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from .._classes import named, own_class, own_method
from ._run import BASE, repeated
from .lower.zuko import FLOWS


class Stand:
    """Stands for a flow in the methods of its class, and has what the flow has.

    Args:
        fused: the module that holds the flow.
    """

    def __init__(self, fused: Any) -> None:
        self._fused = fused

    def __getattr__(self, name: str) -> Any:
        flow = self._fused.flow
        found = getattr(own_class(type(flow)), name, None)
        # what every module has is the flow's
        if not isinstance(found, FunctionType) or name in vars(flow) or found is getattr(nn.Module, name, None):
            return getattr(flow, name)
        # dynamo does not trace MethodType
        return found.__get__(self)

    def _density(self, x: Any, context: Any, inverse: bool) -> Tensor | None:
        """Return the log-density of x by one program, None if the layers or the base distribution have to run."""
        result = self._fused._program(x, () if context is None else (context,), inverse, BASE)
        return None if result is None else result[1]


class _Layers:
    """The layers of a flow as one."""

    def __init__(self, fused: Any, layers: Iterable[nn.Module]) -> None:
        self.fused, self.layers = fused, [*layers]

    def forward(self, x: Any, **named: Any) -> tuple[Any, Any]:
        return self._call(x, named, False)

    def inverse(self, x: Any, **named: Any) -> tuple[Any, Any]:
        return self._call(x, named, True)

    __call__ = forward

    def inverse_of_draws(self, x: Any, context: Any) -> tuple[Any, Any]:
        """Return the inverse of x (R, n, ...), n draws for each row of the context."""
        rows, n = x.flatten(0, 1), x.shape[1]
        result = self.fused._program(rows, (context,), True, None, n) if len(context) == len(x) else None
        if result is None:
            result = self._run(rows, {"context": context.repeat_interleave(n, 0)}, True)
        return result[0].unflatten(0, x.shape[:2]), result[1].unflatten(0, x.shape[:2])

    def _call(self, x: Any, named: dict[str, Any], inverse: bool) -> tuple[Any, Any]:
        result = self.fused._program(x, tuple([each for each in named.values() if each is not None]), inverse)
        return self._run(x, named, inverse) if result is None else result

    def _run(self, x: Any, named: dict[str, Any], inverse: bool) -> tuple[Any, Any]:
        """Return what the layers do one after the other."""
        total: Any = 0
        for layer in reversed(self.layers) if inverse else self.layers:
            x, logdet = layer.inverse(x, **named) if inverse else layer(x, **named)  # type: ignore[operator]
            total = total + logdet
        return x, total


class _Nflows(Stand):
    @property
    def _transform(self) -> _Layers:
        return _Layers(self._fused, [self._fused.flow._transform])

    def _log_prob(self, inputs: Tensor, context: Tensor | None) -> Tensor:
        context = self._embedding_net(context)
        nats = self._density(inputs, context, inverse=False)
        if nats is None:
            noise, logdet = self._transform(inputs, context=context)
            nats = self._distribution.log_prob(noise, context=context) + logdet
        return nats

    def _sample(self, num_samples: int, context: Tensor | None) -> Tensor:
        context = self._embedding_net(context)
        return self._inverse(self._distribution.sample(num_samples, context=context), context)[0]

    def sample_and_log_prob(self, num_samples: int, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        context = self._embedding_net(context)
        noise, nats = self._distribution.sample_and_log_prob(num_samples, context=context)
        samples, logdet = self._inverse(noise, context)
        return samples, nats - logdet

    def _inverse(self, noise: Any, context: Any) -> tuple[Any, Any]:
        layers = self._transform
        return layers.inverse(noise, context=None) if context is None else layers.inverse_of_draws(noise, context)


class _Glasflow(Stand):
    @property
    def _transform(self) -> _Layers:
        return _Layers(self._fused, [self._fused.flow._transform])

    def log_prob(self, inputs: Any, conditional: Any = None) -> Tensor:
        nats = self._density(inputs, conditional, inverse=False)
        return own_class(type(self._fused.flow)).log_prob(self, inputs, conditional) if nats is None else nats


class _Normflows(Stand):
    @property
    def flows(self) -> list[_Layers]:
        return [_Layers(self._fused, self._fused.flow.flows)]

    def log_prob(self, x: Any) -> Tensor:
        return self._or_layers("log_prob", self._density(x, None, inverse=True), x)

    def forward_kld(self, x: Any) -> Tensor:
        return self._or_layers("forward_kld", _kld(self._density(x, None, inverse=True)), x)

    def _or_layers(self, method: str, result: Tensor | None, *args: Any) -> Tensor:
        return getattr(own_class(type(self._fused.flow)), method)(self, *args) if result is None else result


class _ConditionalNormflows(_Normflows):
    def log_prob(self, x: Any, context: Any = None) -> Tensor:
        return self._or_layers("log_prob", self._density(x, context, inverse=True), x, context)

    def forward_kld(self, x: Any, context: Any = None) -> Tensor:
        return self._or_layers("forward_kld", _kld(self._density(x, context, inverse=True)), x, context)


class _Zuko(Stand):
    def forward(self, c: Any = None) -> Any:
        module = self._fused.flow
        # a module with hooks runs as it is
        flow = own_method(type(module), "forward")(module, c)
        flow.transform = Transform(self._fused, flow.transform, c, base=flow.base)
        flow.__class__ = _with_density(flow.__class__)
        return flow

    __call__ = forward


class Transform(torch.distributions.Transform):
    """The layers of a flow of zuko as one transform.

    Args:
        fused: the module that holds the flow.
        own: what it does, by zuko.
        context: (*, C) or None.
        inverse: whether it is the inverse of the layers.
        base: the base distribution that a flow has made with it.
    """

    def __init__(self, fused: Any, own: Any, context: Any, inverse: bool = False, base: Any = None) -> None:
        super().__init__()
        self.fused, self.own, self.context, self.inverse = fused, own, context, inverse
        self.base, self.of_base = base, [] if base is None else _tensors_of_base(fused)

    def has_density(self, base: Any) -> bool:
        """Whether the program's density is that of this base distribution."""
        return base is self.base and [*map(id, self.of_base)] == [*map(id, _tensors_of_base(self.fused))]

    @property
    def inv(self) -> Transform:
        return Transform(self.fused, self.own.inv, self.context, not self.inverse)

    @property
    def bijective(self) -> bool:  # type: ignore[override]
        return bool(self.own.bijective)

    @property
    def sign(self) -> Any:
        return self.own.sign

    def call_and_ladj(self, x: Any) -> tuple[Tensor, Tensor]:
        result = self.program(x)
        return self.own.call_and_ladj(x) if result is None else result

    def program(self, x: Any, prior: str | None = None) -> tuple[Tensor, Tensor] | None:
        """Return y and logdet of x (*, D), None if the layers have to run; with a prior nothing and log-density."""
        if not isinstance(x, Tensor) or x.is_nested or x.dim() == 0:
            return None
        rows, lead, repeats = x, x.shape[:-1], 1
        given: tuple[Tensor, ...] = ()
        if self.context is not None:
            context = self.context
            if not isinstance(context, Tensor) or context.is_nested or context.dim() == 0:
                return None
            if context.shape[:-1] != lead:
                try:
                    lead = torch.broadcast_shapes(lead, context.shape[:-1])
                # zuko raises its own error
                except RuntimeError:
                    return None
                rows = rows.expand(*lead, -1)
            context, repeats = repeated(context, lead)
            given = (context,)
        result = self.fused._program(_rows(rows), given, self.inverse, prior, repeats)
        if result is None:
            return None
        y, logdet = result
        return y if prior else y.reshape(*lead, x.shape[-1]), logdet.reshape(lead)

    def _call(self, x: Any) -> Tensor:
        result = self.program(x)
        return self.own(x) if result is None else result[0]

    def _inverse(self, y: Any) -> Tensor:
        return self.inv(y)

    def log_abs_det_jacobian(self, x: Any, y: Any) -> Tensor:
        result = self.program(x)
        return self.own.log_abs_det_jacobian(x, y) if result is None else result[1]

    def forward_shape(self, shape: Any) -> Any:
        return self.own.forward_shape(shape)

    def inverse_shape(self, shape: Any) -> Any:
        return self.own.inverse_shape(shape)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _pickled(self.own, type(self.own))

    def __repr__(self) -> str:
        return repr(self.own)

    def __getattr__(self, name: str) -> Any:
        # a copy has no attributes at first
        if name.startswith("_") or "own" not in vars(self):
            raise AttributeError(name)
        return getattr(self.own, name)


class _Density:
    """A distribution of zuko that asks for its log-density by one program."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _pickled(self, type(self).__mro__[2])

    def log_prob(self: Any, x: Any) -> Tensor:
        transform = self.transform
        # somebody may have put another transform or base there, or other tensors into the module since
        if type(transform) is not Transform or not transform.has_density(self.base):
            return super().log_prob(x)  # type: ignore[misc]
        result = transform.program(x, BASE)
        # an x without density, or with a density of 0, may be an error
        if result is None or (self.base._validate_args and not bool(result[1].isfinite().all())):
            return super().log_prob(x)  # type: ignore[misc]
        nats: Tensor = result[1]
        return nats.expand(torch.broadcast_shapes(nats.shape, self.batch_shape))


def _tensors_of_base(fused: Any) -> list[Any]:
    base = fused.flow.base
    return [*base._parameters.values(), *base._buffers.values()]


@functools.cache
def _with_density(kind: Any) -> type:
    return type(kind.__name__, (_Density, kind), {"__module__": kind.__module__})


def _pickled(what: Any, kind: type) -> tuple[Any, ...]:
    """Return what a pickle or a copy has of an object: one of zuko's class."""
    # Python 3.10 has no object.__getstate__
    state = what.__getstate__() if hasattr(what, "__getstate__") else vars(what)
    return copyreg._reconstructor, (kind, object, None), state  # type: ignore[attr-defined]


def _rows(x: Tensor) -> Tensor:
    return x if x.dim() == 2 else x.reshape(x.shape[:-1].numel(), x.shape[-1])


def _kld(nats: Tensor | None) -> Tensor | None:
    # normflows adds in the default dtype
    return None if nats is None else -torch.mean(nats.to(torch.get_default_dtype()))


STANDS: dict[str, type[Stand]] = {
    "nflows.flows.base.Flow": _Nflows,
    "nflows.flows.realnvp.SimpleRealNVP": _Nflows,
    "nflows.flows.autoregressive.MaskedAutoregressiveFlow": _Nflows,
    "glasflow.flows.realnvp.RealNVP": _Glasflow,
    "glasflow.flows.nsf.CouplingNSF": _Glasflow,
    "normflows.core.NormalizingFlow": _Normflows,
    "normflows.core.ConditionalNormalizingFlow": _ConditionalNormflows,
    **dict.fromkeys(FLOWS, _Zuko),
}


def stand_of(flow: object) -> type[Stand] | None:
    """Return what stands for a flow of another package, None for another object."""
    return STANDS.get(named(type(flow)))
