"""Model cards of trained adapters: what a user should know before relying on one."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from routehead_plugins import __version__
from routehead_plugins.alignment.result import Alignment

_TEMPLATE = Path(__file__).parents[1] / "assets" / "adapter_card.md"


def alignment_card(alignment: Alignment, command: str) -> str:
    """Write an adapter's model card, in Markdown.

    Args:
        alignment: The adapter, with what held-out queries gained.
        command: The command that trained it.
    """
    llm = alignment.llm
    if Path(llm).exists():  # a local path means nothing to others, and may be private
        llm = Path(llm).name
    card = ModelCard.from_template(
        ModelCardData(
            library_name="peft", tags=["re-ranking", "attention-heads", "routehead", "lora"]
        ),
        template_path=str(_TEMPLATE),
        llm=llm,
        heads=alignment.heads,
        settings=alignment.settings,
        queries=alignment.queries,
        gain=alignment.gain,
        command=command,
        version=__version__,
    )
    return f"{card}\n"
