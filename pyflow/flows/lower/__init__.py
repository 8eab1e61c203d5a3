"""From layers to instructions: one function for each class of layers, parts of conditioners and base distributions.

A look at a layer (a rule) reads what does not depend on the input, and returns a function that writes the instructions
for some columns in one direction. Classes are found by their exact type, those of other packages by their name, since
pyflow imports none of them. A file for each package, `nets.py` for what conditioners are made of.
"""

from __future__ import annotations

# these fill the tables
from . import autoregressive as autoregressive
from . import couplings as couplings
from . import nets as nets
from . import nflows as nflows
from . import normflows as normflows
from . import own as own
from . import zuko as zuko
from .look import RULES, STACKS, Layers, Look, NoInstruction, children, register

__all__ = ["RULES", "STACKS", "Layers", "Look", "NoInstruction", "children", "register"]
