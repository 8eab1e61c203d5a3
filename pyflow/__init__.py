"""pyflow: fused kernels for generative modelling in PyTorch, each held to a plain-torch reference."""

from . import _backend
from . import ops as ops
from . import sde as sde
from . import stats as stats
from ._backend import backend as backend
from ._version import __version__ as __version__
from ._warmup import warmup as warmup

_backend.finish()
