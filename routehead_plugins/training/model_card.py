"""The model card of a trained router: what a user should know before trusting it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from routehead_plugins import __version__
from routehead_plugins.selection import Router

_ROUTING = (
    "It knows the kinds of queries above. For others it falls back to static weights,",
    "fitted on the same queries: measure it on your own (`routehead evaluate`).",
)
_STATIC = (
    "It chooses the same heads for every query, fitted on the kinds of queries above: no",
    "correction by query was clearly better. Measure it on your own (`routehead evaluate`).",
)


def router_card(router: Router, parts: Sequence[Mapping[str, Any]], command: str) -> str:
    """Write a router's card, in Markdown.

    Args:
        router: With its description.
        parts: What it was trained on: ``name``, ``kind`` and number of ``queries`` of each part.
        command: What made it.
    """
    heads, space, description = router.heads, router.space, router.description or {}
    model = heads.model or "an unnamed LLM"
    if Path(model).exists():  # where it lies on a disk is nobody's business
        model = Path(model).name
    rows = [f"| {part['name']} | {part['kind']} | {part['queries']} |" for part in parts]
    held_out = description.get("held_out_ndcg@10")
    measured = []
    if isinstance(held_out, Mapping):
        measured = [
            "## Measured",
            "",
            f"nDCG@10 on the {description.get('held_out_queries')} queries held out to choose the "
            "strength of the correction (of the kinds it was trained on; no test):",
            "",
            "| correction | nDCG@10 |",
            "| --- | --- |",
            *(f"| {name} | {figure} |" for name, figure in held_out.items()),
            "",
            _chosen(description.get("strength")),
            "",
        ]
    return "\n".join(
        [
            "---",
            "library_name: routehead-plugins",
            "tags: [re-ranking, attention-heads, routehead]",
            "---",
            "",
            f"# Head router for {model}",
            "",
            "Names, per query, the attention heads of a frozen LLM by which documents are ranked",
            "(RouteHead, arXiv 2604.24608). It is of no use without that LLM, and does not change",
            "it.",
            "",
            "```python",
            "from routehead_plugins import HeadRoutedAttentionReranker",
            "",
            "reranker = HeadRoutedAttentionReranker.from_pretrained(",
            f'    "{model}", router="path/of/this/folder"',
            ")",
            "```",
            "",
            "## Trained on",
            "",
            "| collection | queries from | queries |",
            "| --- | --- | --- |",
            *rows,
            "",
            f"with routehead-plugins {__version__}:",
            "",
            "```",
            command,
            "```",
            "",
            "## What it does",
            "",
            f"- layout: {heads.layout}; documents were cut at {router.max_doc_tokens} tokens",
            f"- objective: {description.get('objective')}; heads are read as {router.reading}, "
            f"signals {heads.recipe.aggregation}",
            *_labels(description.get("labels")),
            f"- weight of the retrieval score: {heads.recipe.first_stage_weight}",
            *(
                [f"- queries are embedded after layer {space.layer}, {space.pooling}"]
                * router.routes
            ),
            "",
            *measured,
            "## Limits",
            "",
            *(_ROUTING if router.routes else _STATIC),
            "",
        ]
    )


def _labels(found: object) -> list[str]:
    """What pseudo-labels are worth, where they were learned and measured."""
    if not isinstance(found, Mapping):
        return []
    how = f"- labels: {found.get('utility')}, shrinkage {found.get('shrinkage')}"
    if "kept" not in found:
        return [f"{how}; their reliability could not be measured"]
    figures = [f"{found[name]:.4f}" for name in ("found", "kept", "static", "chance")]
    return [
        f"{how}; nDCG@10 of {found['queries']} queries: {figures[0]} where searched; on other "
        f"documents {figures[1]}, one set for all {figures[2]}, random sets {figures[3]}"
    ]


def _chosen(strength: object) -> str:
    if strength is None:
        return "None was clearly better than the static weights: this router is static."
    return f"Chosen: {strength}."
