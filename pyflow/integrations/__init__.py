"""Classes of other packages on pyflow's ops: `accelerate` a model, or import the module of the package you use."""

from . import _diffusers as _diffusers
from . import _flows as _flows
from . import _layers as _layers
from . import _spectral as _spectral
from . import _vector_quantize as _vector_quantize
from ._accelerate import accelerate as accelerate
from ._patch import patch as patch
from ._patch import unpatch as unpatch
