"""Statistics: probabilities, estimates and tests of arrays or tensors."""

from .compare import RepresentationComparison, compare_representations
from .hsic import HSIC, hsic
from .hsic_test import HSICTest, hsic_test
from .independence import Hsic, IndependenceTestOutput
from .sector import SectorEstimate, sector_probability, sector_probability_mc

__all__ = [
    "HSIC",
    "HSICTest",
    "Hsic",
    "IndependenceTestOutput",
    "RepresentationComparison",
    "SectorEstimate",
    "compare_representations",
    "hsic",
    "hsic_test",
    "sector_probability",
    "sector_probability_mc",
]
