"""Float64 references, written from the formulas (the design's section 1 and 3, the rule files' docstrings).

Plain and slow on purpose, in numpy, one tensor at a time. Nothing here may import ``emonavi``.
"""

from .emotion import PresetFeeling, first_drive, running_mean
from .fact import FactReference
from .lynx import LynxReference
from .navi import NaviReference
from .shadow import PresetShadow

__all__ = [
    "FactReference",
    "LynxReference",
    "NaviReference",
    "PresetFeeling",
    "PresetShadow",
    "first_drive",
    "running_mean",
]
