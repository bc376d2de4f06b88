"""Model cards of trained routers: what a user should know before relying on one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from routehead_plugins import __version__
from routehead_plugins.selection import Router

_TEMPLATE = Path(__file__).parents[1] / "assets" / "router_card.md"


def router_card(router: Router, parts: Sequence[Mapping[str, Any]], command: str) -> str:
    """Write a router's model card, in Markdown.

    Args:
        router: The router, with its description.
        parts: The training data: ``name``, ``kind`` and number of ``queries`` of each part.
        command: The command that trained it.
    """
    description = router.description or {}
    llm = router.heads.model or "an unnamed LLM"
    if Path(llm).exists():  # a local path means nothing to others, and may be private
        llm = Path(llm).name
    card = ModelCard.from_template(
        ModelCardData(
            library_name="routehead-plugins", tags=["re-ranking", "attention-heads", "routehead"]
        ),
        template_path=str(_TEMPLATE),
        llm=llm,
        router=router,
        heads=router.heads,
        description={"objective": None, "strength": None, **description},
        labels=description.get("labels"),
        held_out=description.get("held_out_ndcg@10"),
        parts=parts,
        command=command,
        version=__version__,
    )
    return f"{card}\n"
