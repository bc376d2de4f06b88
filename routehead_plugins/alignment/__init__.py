"""LoRA adapters trained through the tap, so that attention ranks what matters (HeadRank)."""

from routehead_plugins.alignment.card import alignment_card
from routehead_plugins.alignment.config import AlignmentConfig, LossWeights
from routehead_plugins.alignment.examples import AlignmentExample
from routehead_plugins.alignment.pools import pooled
from routehead_plugins.alignment.result import Alignment, Gain
from routehead_plugins.alignment.run import Progress, align

__all__ = [
    "Alignment",
    "AlignmentConfig",
    "AlignmentExample",
    "Gain",
    "LossWeights",
    "Progress",
    "align",
    "alignment_card",
    "pooled",
]
