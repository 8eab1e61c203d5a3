"""Statistics: probabilities, estimates and tests."""

from .sector import SectorEstimate, sector_probability, sector_probability_mc

__all__ = ["SectorEstimate", "sector_probability", "sector_probability_mc"]
