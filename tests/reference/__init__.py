"""Float64 references, written from the formulas (in the docstrings of the rule files and of the emotions).

Plain and slow on purpose, in numpy, one tensor at a time. Nothing here may import ``emonavi``.
"""

from .clan import ClanReference
from .emotion import PresetFeeling, first_drive, running_mean
from .fact import FactReference
from .lynx import LynxReference
from .navi import NaviReference
from .neco import NecoReference
from .shadow import PresetShadow
from .zeal import ZealReference

__all__ = [
    "ClanReference",
    "FactReference",
    "LynxReference",
    "NaviReference",
    "NecoReference",
    "PresetFeeling",
    "PresetShadow",
    "ZealReference",
    "first_drive",
    "running_mean",
]
