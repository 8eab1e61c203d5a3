"""pyflow: fused kernels for generative modelling in PyTorch, each tested against a plain-torch reference."""

import re as _re

from torch import __version__ as _with

if [int(_n) for _n in _re.findall(r"\d+", _with)[:2]] < [2, 11]:
    raise ImportError(f"pyflow needs torch 2.11 or newer, this is {_with}: pip install 'torch>=2.11'")

from . import _backend, _operators
from . import energy as energy
from . import flows as flows
from . import nn as nn
from . import ops as ops
from . import sde as sde
from . import stats as stats
from . import train as train
from ._backend import BackendUnavailable as BackendUnavailable
from ._backend import backend as backend
from ._version import __version__ as __version__
from ._warmup import warmup as warmup
from .integrations import accelerate as accelerate
from .integrations import patch as patch
from .integrations import unpatch as unpatch
from .integrations._patch import patch_as_asked as _patch_as_asked

_operators.check_complete()
_backend.finish()
_patch_as_asked()
