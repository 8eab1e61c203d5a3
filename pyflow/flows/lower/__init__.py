"""From layers to instructions: one function for each class of layers, parts of conditioners and base distributions.

A look at a layer (a rule) reads what does not depend on the input, and returns a function that writes the instructions
for some columns in one direction. Classes are found by their exact type, those of other packages by their name, since
pyflow imports none of them. A file for each package, `nets.py` for what conditioners are made of.
"""

from __future__ import annotations

from . import couplings, nets, nflows, normflows, own
from .look import BASES, RULES, STACKS, Layers, Look, NoInstruction, children, named, register

__all__ = [
    "BASES", "RULES", "STACKS", "Layers", "Look", "NoInstruction", "children", "couplings", "named", "nets", "nflows", "normflows",
    "own", "register",
]  # fmt: skip
