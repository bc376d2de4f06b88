"""LoRA adapters trained through the tap, so that attention ranks what matters (HeadRank)."""

from routehead_plugins.alignment.align import Progress, align
from routehead_plugins.alignment.config import AlignmentConfig, LossWeights
from routehead_plugins.alignment.examples import AlignmentExample
from routehead_plugins.alignment.result import Alignment, Gain

__all__ = [
    "Alignment",
    "AlignmentConfig",
    "AlignmentExample",
    "Gain",
    "LossWeights",
    "Progress",
    "align",
]
