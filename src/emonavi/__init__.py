"""PyTorch optimizers that listen to the loss."""

from emonavi.clan import EmoClan
from emonavi.emotion import Emotion
from emonavi.fact import EmoFact
from emonavi.intake import observe
from emonavi.lynx import EmoLynx
from emonavi.monitor import Snapshot
from emonavi.navi import EmoNavi
from emonavi.neco import EmoNeco
from emonavi.optimizer import EmoOptimizer
from emonavi.registry import available, create
from emonavi.release import gradient_release
from emonavi.wrap import Emotional
from emonavi.zeal import EmoZeal

__all__ = [
    "EmoClan",
    "EmoFact",
    "EmoLynx",
    "EmoNavi",
    "EmoNeco",
    "EmoOptimizer",
    "EmoZeal",
    "Emotion",
    "Emotional",
    "Snapshot",
    "available",
    "create",
    "gradient_release",
    "observe",
]
__version__ = "0.1.0"
