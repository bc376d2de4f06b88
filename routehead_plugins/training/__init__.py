"""Learn head sets and routers from stored signals, without running the LLM."""

from routehead_plugins.training.detection import METHODS, check_detection, detect, single_head_ndcg
from routehead_plugins.training.fit import (
    PARTS,
    STRENGTHS,
    Base,
    FitOptions,
    check_fit,
    clearly_better,
    corrected,
    fit_router,
    static_base,
    static_l1,
    usable,
)
from routehead_plugins.training.head_search import LabelOptions
from routehead_plugins.training.inspection import Inspection, Use, sampled
from routehead_plugins.training.model_card import router_card
from routehead_plugins.training.offline import (
    each_ndcg,
    offline_scores,
    routed_scores,
    with_first_stage,
)
from routehead_plugins.training.pseudo_labels import (
    choose_labels,
    label_choices,
    label_reliability,
)
from routehead_plugins.training.weights import check_weights, fit_weights, split_folds

__all__ = [
    "METHODS",
    "PARTS",
    "STRENGTHS",
    "Base",
    "FitOptions",
    "Inspection",
    "LabelOptions",
    "Use",
    "check_detection",
    "check_fit",
    "check_weights",
    "choose_labels",
    "clearly_better",
    "corrected",
    "detect",
    "each_ndcg",
    "fit_router",
    "fit_weights",
    "label_choices",
    "label_reliability",
    "offline_scores",
    "routed_scores",
    "router_card",
    "sampled",
    "single_head_ndcg",
    "split_folds",
    "static_base",
    "static_l1",
    "usable",
    "with_first_stage",
]
