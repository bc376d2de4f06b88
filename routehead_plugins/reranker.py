"""The re-ranker, composed of a frozen LLM, a selector, a layout and a readout."""

from __future__ import annotations

import asyncio
import math
import os
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Unpack

import torch
from torch import Tensor
from tqdm import tqdm

from routehead_plugins.backbone import Adapter, FrozenLM, check_finite, check_max_doc_tokens
from routehead_plugins.cross_encoder import CrossEncoderMethods
from routehead_plugins.data import (
    Document,
    Ranking,
    ScoredDocument,
    Span,
    TextSpan,
    Usage,
    as_documents,
    as_list,
    check_count,
    check_flag,
    check_text,
    check_top_n,
)
from routehead_plugins.errors import InputError, TruncationWarning, class_name
from routehead_plugins.heads import HeadSet
from routehead_plugins.index import (
    DocumentIndex,
    IndexBuilder,
    IndexConfig,
    IndexReport,
    SearchHit,
    open_documents,
    read_all,
)
from routehead_plugins.layouts import (
    LateLayout,
    LateTails,
    Layout,
    ReadOptions,
    check_layout,
    check_null_share,
    get_layout,
    make_layout,
)
from routehead_plugins.options import OptionValues, RerankerOptions
from routehead_plugins.scoring import (
    Chunking,
    Excerpt,
    LongTexts,
    Passage,
    Readout,
    Refinement,
    Reweighting,
    TokenAttention,
    apart,
    evidence_spans,
    excerpt_documents,
    residuals,
    without_copies,
)
from routehead_plugins.selection import AllHeads, Router, Selector, choose_selector

# Calibrated attention mass lies between -1 and 1: no document that was read scores lower.
BLANK_SCORE = -1.0


class HeadRoutedAttentionReranker(CrossEncoderMethods):
    """Re-ranker of documents by the attention that chosen heads of a frozen LLM pay to them.

    Safe to use from several threads at once; nothing given to it is changed.

    Attributes:
        llm: The frozen LLM.
        selector: Choice of the heads for each query.
        layout: Arrangement of documents and query.
        readout: Options for turning attention into scores.
        refinement: Second reading of the best documents; ``None`` for none.
        long_texts: What becomes of long documents and queries.
    """

    def __init__(
        self,
        backbone: FrozenLM,
        selector: Selector | None = None,
        *,
        layout: Layout | str | None = None,
        calibrate: bool = True,
        null_share: float = 1.0,
        drop_outliers: bool = True,
        reweighting: Reweighting | None = None,
        first_stage_weight: float | None = None,
        max_doc_tokens: int | None = None,
        drop_query_copies: bool = False,
        refinement: Refinement | None = None,
        long_texts: LongTexts | None = None,
    ) -> None:
        """Compose a re-ranker from objects.

        Args:
            backbone: The frozen LLM.
            selector: Chooses the heads; every head by default.
            layout: A layout or its name; by default the one the heads were chosen for, if any, or
                ``"sequential"``.
            calibrate: Whether to subtract the attention of a query without content, "N/A".
            null_share: With an instruction, the share of the calibration that uses the null query
                with the instruction; the rest omits it (arXiv 2609.17764).
            drop_outliers: Whether to drop tokens that draw the attention of the null query.
            reweighting: Weights on tokens and documents (ReAttn); none by default.
            first_stage_weight: Weight of the candidates' own scores, where all carry one,
                standardised per query; ``None`` takes the one fitted with the heads, or 0.
            max_doc_tokens: Longer documents are cut here, the query never is.
            drop_query_copies: Whether passages of documents that repeat the query are left out
                before the LLM reads them; see ``RerankerOptions``.
            refinement: Re-ranks the best documents once more; none by default.
            long_texts: What becomes of long documents, and of texts that do not fit the LLM's
                context; by default these are cut.

        Raises:
            InputError: A setting is out of range or of another type, or the heads were chosen for
                another layout.
        """
        _check_parts(backbone, selector, layout)
        _check_optional(reweighting, Reweighting)
        _check_optional(refinement, Refinement)
        _check_optional(long_texts, LongTexts)
        self.refinement = refinement
        self.long_texts = LongTexts() if long_texts is None else long_texts
        self.calibrate = check_flag("calibrate", calibrate)
        self.null_share = check_null_share(null_share)
        self.max_doc_tokens = check_max_doc_tokens(max_doc_tokens)
        self.drop_query_copies = check_flag("drop_query_copies", drop_query_copies)
        self.readout = Readout(drop_outliers, reweighting, first_stage_weight)
        self.llm = backbone
        self.selector = AllHeads() if selector is None else selector
        if layout is None or isinstance(layout, str):
            layout = get_layout(self.selector.layout if layout is None else layout)
        check_layout(layout, self.selector.layout)
        self.layout = layout
        if self.documents is not None:
            self._check_whole("reads an index")

    @classmethod
    def from_pretrained(
        cls, model: str = "embedded", **options: Unpack[OptionValues]
    ) -> HeadRoutedAttentionReranker:
        """Load an LLM by name and compose a re-ranker.

        Args:
            model: ``"embedded"``, a Hub id, a local directory, or a ``.gguf`` file.
            **options: ``heads``, ``router``, ``device``, ``dtype``, ``layout``,
                ``document_cache``, ``window``, ``stride``, ``max_doc_tokens``,
                ``first_stage_weight``, ``drop_query_copies``, ``documents``, ``refine``,
                ``long_documents``, ``chunk_tokens``, ``chunk_stride``, ``chunk_aggregation``,
                ``on_too_long``,
                ``adapter``, ``local_files_only``, ``revision``, ``token``, ``cache_dir``,
                ``trust_remote_code`` and ``model_kwargs``; see ``RerankerOptions``.

        Raises:
            InputError: An argument cannot be used.
            HeadError: The heads are misspelled, or the LLM does not have them.
            ModelLoadError: No LLM of that name can be loaded.
            MissingExtraError: A package that this kind of model needs is not installed.
            UnsupportedModelError: The LLM has no attention to read.
        """
        return cls.from_options(RerankerOptions(model, **options))

    @classmethod
    def from_options(
        cls,
        options: RerankerOptions,
        llm: FrozenLM | None = None,
        selector: Selector | None = None,
    ) -> HeadRoutedAttentionReranker:
        """Compose a re-ranker from options; see ``from_pretrained`` for the errors.

        Args:
            options: How the LLM is loaded and read.
            llm: The LLM of these options, if it is already loaded.
            selector: The selector of these options, where it is chosen already.
        """
        options, documents = open_documents(_with_adapter(options, llm))
        selector = choose_selector(options) if selector is None else selector
        layout = make_layout(options, selector.layout, documents)
        check_layout(layout, selector.layout)
        second = _second_options(options, layout)
        again = None if second is None else choose_selector(second)
        if llm is None:
            selectors = [selector] if again is None else [selector, again]
            llm = FrozenLM.from_options(options, partial(_layers, selectors, documents))
        selector.check(llm)
        refinement = None
        if second is not None and again is not None and options.refine is not None:
            refinement = Refinement(cls.from_options(second, llm, again), options.refine)
        reranker = cls(
            llm,
            selector,
            layout=layout,
            first_stage_weight=options.first_stage_weight,
            max_doc_tokens=options.max_doc_tokens,
            drop_query_copies=options.drop_query_copies,
            refinement=refinement,
            long_texts=_long_texts(options),
        )
        if documents is not None:
            reranker.check_documents()
        return reranker

    @property
    def documents(self) -> DocumentIndex | None:
        """The document index that is read; ``None`` if there is none."""
        store = getattr(self.layout, "documents", None)
        return store if isinstance(store, DocumentIndex) else None

    def check_documents(self) -> None:
        """Check before the first query that the document index, if any, can be read.

        Raises:
            IndexMismatchError: It was made for something else; the message names both sides.
        """
        layout, index = self.layout, self.documents
        if index is not None and isinstance(layout, LateLayout):
            heads = self._all_candidates()
            index.check(self.llm, layout.frame(self.llm), heads, self.max_doc_tokens)

    def rerank(
        self,
        query: str,
        documents: Iterable[str | Document],
        top_n: int | None = None,
        *,
        instruction: str | None = None,
        spans: bool = False,
    ) -> Ranking:
        """Rank documents by relevance to a query.

        Args:
            query: The query.
            documents: Candidates, best first if they have an order; not modified. Blank ones
                rank last, and so do those of which the tokenizer drops every character.
            top_n: Number of documents to return; ``None`` for all. All are scored either way.
            instruction: A sentence or two on which documents are relevant to this query.
            spans: Whether to find the passages of each returned document that carry its score.

        Returns:
            The documents, best first; ties keep the order of the candidates.

        Raises:
            InputError: The query is blank or has no tokens, ``top_n`` is below 1, a candidate is
                not a text, or another argument has a wrong type.
            PromptTooLongError: The candidates do not fit the LLM's context, and are not to be cut,
                or are too many for one prompt.
            RouteHeadError: The scores are not finite.
            UnsupportedModelError: Spans are wanted, or documents are to be divided, and the
                tokenizer records no offsets.
        """
        top_n = check_top_n(top_n)
        candidates = as_documents(documents)
        if check_flag("spans", spans):
            self.llm.encoder.check_offsets()
        asked = self._ask(query, instruction)
        scores, read = self._scores(asked, candidates)
        if self.refinement is not None:
            scores = self.refinement.refined(scores, query, candidates, instruction)
        # sorted() is stable, so that ties keep the order of the candidates.
        order = sorted(range(len(candidates)), key=lambda index: -scores[index])[:top_n]
        evidence = self._spans(read, set(order)) if spans and read else {}
        hits = [
            ScoredDocument(index, scores[index], candidates[index], evidence.get(index, ()))
            for index in order
        ]
        name, adapter = self.layout.name, self.llm.adapter_label
        usage = Usage() if read is None else read.usage
        return Ranking(query, tuple(hits), asked.heads, name, adapter, usage)

    def score(
        self,
        query: str,
        documents: Iterable[str | Document],
        *,
        instruction: str | None = None,
    ) -> list[float]:
        """Score documents, in the order given; see ``rerank`` for the errors."""
        candidates = as_documents(documents)
        scores, _ = self._scores(self._ask(query, instruction), candidates)
        if self.refinement is None:
            return scores
        return self.refinement.refined(scores, query, candidates, instruction)

    def rerank_batch(
        self,
        requests: Iterable[tuple[str, Iterable[str | Document]]],
        top_n: int | None = None,
        *,
        show_progress: bool = False,
    ) -> list[Ranking]:
        """Rank the candidates of several queries.

        Args:
            requests: Pairs of a query and its candidates.
            top_n: Number of documents to return for each query; ``None`` for all.
            show_progress: Whether to draw a progress bar on standard error.

        Raises:
            InputError: A request is not such a pair, or see ``rerank``; raised before the first
                query is read.
            PromptTooLongError: See ``rerank``.
            RouteHeadError: See ``rerank``.
        """
        top_n = check_top_n(top_n)
        pairs = [
            _checked_request(f"requests[{index}]", request)
            for index, request in enumerate(
                as_list(requests, "requests", "pairs of a query and its documents")
            )
        ]
        disable = not check_flag("show_progress", show_progress)
        bar = tqdm(pairs, desc="Re-ranking", unit="query", disable=disable)
        return [self.rerank(query, documents, top_n) for query, documents in bar]

    async def arerank(
        self,
        query: str,
        documents: Iterable[str | Document],
        top_n: int | None = None,
        *,
        instruction: str | None = None,
        spans: bool = False,
    ) -> Ranking:
        """Rank documents off the event loop; see ``rerank``."""
        return await asyncio.to_thread(
            self.rerank, query, documents, top_n, instruction=instruction, spans=spans
        )

    def signals(
        self, query: str, documents: Iterable[str | Document], heads: HeadSet | None = None
    ) -> Tensor:
        """Score documents by each head on its own, for detectors and routers to learn from.

        Documents are read as they are, also where copies of the query are dropped from scores.

        Args:
            query: The query.
            documents: The candidates, each with tokens to read.
            heads: The heads to read; those the selector chooses by default.

        Returns:
            Shape (heads, documents), float32, in the order of the heads and of the documents.

        Raises:
            InputError: The query or a document is blank or has no tokens, or an argument has a
                wrong type.
            HeadError: The LLM does not have these heads.
            PromptTooLongError: The candidates do not fit the LLM's context.
            RouteHeadError: The signals are not finite.
        """
        check_text("query", query)
        if heads is not None and not isinstance(heads, HeadSet):
            raise InputError(
                f"heads is a {class_name(heads)}; "
                'give a HeadSet, such as HeadSet.parse("13-18,13-1").'
            )
        candidates = as_documents(documents)
        for index, document in enumerate(candidates):
            if document.is_blank:
                raise InputError(f"documents[{index}] is blank and has no signals; leave it out.")
        readable = self._readable([document.text for document in candidates])
        missing = set(range(len(candidates))).difference(readable)
        if missing:
            raise InputError(
                f"documents[{min(missing)}] has no tokens, since the tokenizer drops its "
                "characters, and so no signals; leave it out."
            )
        asked = self._ask(query) if heads is None else self._asked(query, heads)
        asked.heads.check_within(self.llm.heads, self.llm.name)
        if not candidates:
            return torch.empty(len(asked.heads), 0, dtype=torch.float32, device="cpu")
        texts = [document.text for document in candidates]
        signals = self.readout.signals(self._read(asked, texts))
        check_finite(signals, self.llm.name, self.llm.dtype)
        return signals

    def index(
        self,
        documents: Iterable[Document],
        folder: str | os.PathLike[str],
        *,
        dtype: str = "int8",
        budget: float = 1.0,
        show_progress: bool = False,
    ) -> IndexReport:
        """Run documents once and keep their keys on disk, for ``documents`` of later re-rankers.

        Documents that the index has are left as they are, and those of a known id and another text
        are replaced. A run that was stopped goes on where it was.

        Args:
            documents: Documents, with or without ids; any number, a batch at a time is in memory.
            folder: Folder of the index; made if it is missing.
            dtype: Number format of the keys: ``"int8"`` or ``"float16"``.
            budget: Share of each document's tokens to keep.
            show_progress: Whether to draw a progress bar on standard error.

        Returns:
            What became of the documents.

        Raises:
            InputError: The layout is another one, an id occurs twice, an argument cannot be used,
                the folder cannot be written, or another builder uses it.
            IndexMismatchError: The index was made for something else; the message names both.
            IndexDamagedError: The index is damaged.
            PromptTooLongError: A document does not fit the LLM's context, and is not to be cut.
        """
        with self.index_builder(folder, dtype=dtype, budget=budget) as builder:
            disable = not check_flag("show_progress", show_progress)
            with tqdm(desc="Indexing", unit="document", disable=disable) as bar:
                for count in builder.add(documents):
                    bar.update(count)
        return builder.report

    def index_builder(
        self, folder: str | os.PathLike[str], *, dtype: str = "int8", budget: float = 1.0
    ) -> IndexBuilder:
        """Prepare an index builder for this LLM, these heads and this prompt; see ``index``."""
        self._check_whole("writes an index")
        if not isinstance(self.layout, LateLayout):
            raise InputError(
                f"layout={self.layout.name!r} keeps no documents on disk; give layout='late'."
            )
        config = IndexConfig.of(
            self.llm,
            self.layout.frame(self.llm),
            self._all_candidates(),
            max_doc_tokens=self.max_doc_tokens,
            dtype=dtype,
            budget=budget,
            routed=bool(getattr(self.selector, "routes", False)),
        )
        cut = self.long_texts.on_too_long == "cut"
        return IndexBuilder(folder, self.llm, self.layout, config, cut=cut)

    def search(
        self,
        query: str,
        k: int = 10,
        *,
        instruction: str | None = None,
        first_stage: Mapping[str, float] | None = None,
    ) -> list[SearchHit]:
        """Rank all documents of the index, without a first stage.

        The scores are those that ``rerank`` would give if all of them were its candidates. Takes
        time in proportion to the number of documents, and is meant for small corpora.

        Args:
            query: The query.
            k: Number of documents to return.
            instruction: See ``rerank``.
            first_stage: Retrieval scores by document id, such as BM25's, to be fused as in
                ``rerank``; documents that it lacks get its lowest score. ``None`` for no fusion.

        Raises:
            InputError: There is no index, or an argument cannot be used.
            IndexMismatchError: The index was made for something else.
            IndexDamagedError: A document was damaged.
            PromptTooLongError: The query is longer than the layout has room for.
        """
        count, layout, index = check_count("k", k), self.layout, self.documents
        if index is None or not isinstance(layout, LateLayout):
            raise InputError("there is no index to search; load the re-ranker with documents=.")
        if self.readout.reweighting is not None:
            raise InputError("reweighting compares the tokens of candidates; leave it out.")
        asked = self._ask(query, instruction)
        heads, tails = asked.heads, asked.tails
        if tails is None:
            tails = layout.tails(self.llm, query, heads, asked.options)
        self._warn_of_cuts(0, 0, tails.pieces.query_is_cut)
        numbers, sums = read_all(index, self.llm, layout, tails, heads, self.readout)
        if not numbers:
            return []
        lowest = min(first_stage.values(), default=None) if first_stage else None
        names = [index.id_of(number) for number in numbers] if first_stage else []
        retrieval = [(first_stage or {}).get(name or "", lowest) for name in names]
        scores = self.readout.combined(sums, heads.recipe, retrieval or [None] * len(numbers))
        check_finite(scores, self.llm.name, self.llm.dtype)
        # Stable, so that ties keep the order of the index.
        best = scores.argsort(descending=True, stable=True)[:count].tolist()
        return [SearchHit(index.id_of(numbers[i]), float(scores[i]), numbers[i]) for i in best]

    def _ask(self, query: str, instruction: str | None = None) -> _Asked:
        """Choose the heads, once the texts that the LLM reads for it are checked."""
        check_text("query", query)
        if instruction is not None:
            check_text("instruction", instruction)
        selector, layout = self.selector, self.layout
        if isinstance(selector, Router) and isinstance(layout, LateLayout):
            layer = selector.tail_layer
            if layer is not None:  # the pass that reads the query also embeds it
                asked = self._asked(query, selector.heads, instruction)
                tails = layout.tails(self.llm, query, asked.heads, asked.options, layer)
                heads = selector.select_by(tails.embedding(selector.space.pooling), self.llm)
                return replace(asked, heads=heads, tails=tails)
        return self._asked(query, selector.select(query, self.llm), instruction)

    def _asked(self, query: str, heads: HeadSet, instruction: str | None = None) -> _Asked:
        return _Asked(query, heads, self._read_options(heads, instruction))

    def _check_whole(self, what: str) -> None:
        """Check that documents are read as they are.

        Raises:
            InputError: They are divided.
        """
        if self.long_texts.chunking is not None:
            raise InputError(
                f"long_documents='chunk' divides documents, but this re-ranker {what} of whole "
                "ones; leave it out, and index passages if documents are long."
            )

    def _readable(self, texts: Sequence[str]) -> list[int]:
        """Return the indices of the texts that have tokens to read."""
        indices = [index for index, text in enumerate(texts) if text.strip()]
        texts, layout = [texts[index] for index in indices], self.layout
        if isinstance(layout, LateLayout):
            has_tokens = layout.has_tokens(self.llm, texts)
        else:
            has_tokens = self.llm.encoder.has_tokens(texts)
        return [index for index, has in zip(indices, has_tokens, strict=True) if has]

    def _passages(self, excerpts: Sequence[Excerpt]) -> list[Passage]:
        """Return what is read of documents, without texts that have no tokens."""
        chunking, encoder = self.long_texts.chunking, self.llm.encoder
        passages = []
        for index, excerpt in enumerate(excerpts):
            spans = [Span(0, len(excerpt.text))]
            if chunking is not None and excerpt.text.strip():
                offsets = encoder.offsets(excerpt.text)[: self.max_doc_tokens]
                text = excerpt.text
                if self.max_doc_tokens is not None and len(offsets) == self.max_doc_tokens:
                    text = text[: offsets[-1][1]]
                spans = chunking.divide(text, offsets)
            passages += [Passage(index, excerpt, span) for span in spans]
        return [passages[i] for i in self._readable([passage.text for passage in passages])]

    def _read(self, asked: _Asked, texts: Sequence[str]) -> TokenAttention:
        layout, heads, options = self.layout, asked.heads, asked.options
        if asked.tails is not None and isinstance(layout, LateLayout):
            attention = layout.read_behind(asked.tails, self.llm, texts, heads, options)
        else:
            attention = layout.read(self.llm, asked.query, texts, heads, options)
        self._warn_of_cuts(len(attention.cut), len(texts), attention.query_is_cut)
        return attention

    def _read_options(self, heads: HeadSet, instruction: str | None) -> ReadOptions:
        return ReadOptions(
            calibrate=self.calibrate,
            instruction=instruction,
            null_share=1.0 if instruction is None else self.null_share,
            max_doc_tokens=self.max_doc_tokens,
            candidates=self._candidates(heads),
            cut=self.long_texts.on_too_long == "cut",
        )

    def _all_candidates(self) -> HeadSet:
        """Return every head that a query may read, with the recipe if it is always the same."""
        find = getattr(self.selector, "candidates", None)  # a caller's selector may lack it
        heads: HeadSet = self.selector.select("", self.llm) if find is None else find(self.llm)
        return heads

    def _candidates(self, heads: HeadSet) -> HeadSet | None:
        """Return every head that a query may read, if these heads are among them."""
        find = getattr(self.selector, "candidates", None)  # a caller's selector may lack it
        candidates: HeadSet | None = None if find is None else find(self.llm)
        if candidates is None or all(head in candidates for head in heads):
            return candidates
        return None

    def _scores(
        self, asked: _Asked, documents: Sequence[Document]
    ) -> tuple[list[float], _Reading | None]:
        """Score every document in the order given; also return what was read, if anything was."""
        excerpts = [Excerpt(document.text) for document in documents]
        if self.drop_query_copies:
            excerpts = [without_copies(asked.query, document.text) for document in documents]
            documents = excerpt_documents(documents, excerpts)
        passages = self._passages(excerpts)
        if not passages:
            return [BLANK_SCORE] * len(documents), None
        reading = _Reading(passages, self._read(asked, [passage.text for passage in passages]))
        read_scores = self._read_scores(reading, asked, documents)
        # Fused scores have no fixed floor: blank documents then go below the lowest, which may be
        # so large that one less is the same number.
        lowest = float(read_scores.min())
        below = min(lowest - 1.0, math.nextafter(lowest, -math.inf))
        scores = [BLANK_SCORE if lowest > BLANK_SCORE else below] * len(documents)
        for index, score in zip(reading.documents, read_scores.tolist(), strict=True):
            scores[index] = score
        return scores, reading

    def _read_scores(
        self, reading: _Reading, asked: _Asked, documents: Sequence[Document]
    ) -> Tensor:
        """Score the documents that were read."""
        recipe, chunking, indices = asked.heads.recipe, self.long_texts.chunking, reading.documents
        sums = self.readout.sums(reading.attention, recipe)
        if chunking is not None:
            order = {index: number for number, index in enumerate(indices)}
            sums = sums.gathered(chunking, [order[p.document] for p in reading.passages])
        first_stage = [documents[index].score for index in indices]
        scores = self.readout.combined([sums], recipe, first_stage)
        check_finite(scores, self.llm.name, self.llm.dtype)
        return scores

    def _warn_of_cuts(self, cut: int, count: int, query_is_cut: bool) -> None:
        """Warn of texts that did not fit the LLM's context, once for a list."""
        texts = [f"{cut} of {count} documents"] if cut else []
        texts += ["the query"] if query_is_cut else []
        if not texts:
            return
        advice = "shorten it" if not cut else "long_documents='chunk' reads documents whole"
        if cut and self.layout.name == "sequential":
            advice = "layout='parallel' has more room"
        warnings.warn(
            f"{' and '.join(texts)} did not fit the context of {self.llm.name!r}, and only the "
            f"beginning was read; {advice}.",
            TruncationWarning,
            stacklevel=5,
        )

    def _spans(self, read: _Reading, wanted: Set[int]) -> dict[int, tuple[TextSpan, ...]]:
        """Find the evidence in the wanted ones of the documents that were read."""
        tokens = residuals(read.attention.query, read.attention.null).tolist()
        evidence: dict[int, list[TextSpan]] = {}
        for number, (passage, span) in enumerate(
            zip(read.passages, read.attention.spans, strict=True)
        ):
            if passage.document in wanted:
                offsets = self.llm.encoder.offsets(passage.text)
                kept = read.attention.kept[number] if read.attention.kept else None
                offsets = offsets[: span.size] if kept is None else [offsets[i] for i in kept]
                spans = evidence_spans(passage.text, offsets, tokens[span.start : span.end])
                evidence.setdefault(passage.document, []).extend(
                    TextSpan(*passage.original(one.start, one.end), one.score) for one in spans
                )
        return {index: apart(spans) for index, spans in evidence.items()}


@dataclass(frozen=True)
class _Asked:
    """A query, the heads to read for it, and its tails if they were run to choose the heads."""

    query: str
    heads: HeadSet
    options: ReadOptions
    tails: LateTails | None = None


@dataclass(frozen=True)
class _Reading:
    """What was read: documents, or their passages, and the attention to them."""

    passages: list[Passage]
    attention: TokenAttention

    @property
    def documents(self) -> list[int]:
        """Indices of the documents, ascending."""
        return list(dict.fromkeys(passage.document for passage in self.passages))

    @property
    def usage(self) -> Usage:
        """How much that was."""
        attention = self.attention
        return Usage(
            query_tokens=len(attention.query_ids),
            document_tokens=sum(span.size for span in attention.spans),
            passages=len(self.passages),
            documents_cut=len({self.passages[index].document for index in attention.cut}),
            query_cut=attention.query_is_cut,
        )


def _long_texts(options: RerankerOptions) -> LongTexts:
    """Return what the options say of long texts."""
    if options.long_documents == "truncate":
        return LongTexts(None, options.on_too_long)
    defaults = Chunking()
    tokens = defaults.tokens if options.chunk_tokens is None else options.chunk_tokens
    chunking = Chunking(tokens, options.chunk_stride, options.chunk_aggregation)
    return LongTexts(chunking, options.on_too_long)


def _second_options(options: RerankerOptions, layout: Layout) -> RerankerOptions | None:
    """Return the options of a second reading of the best documents, if one is wanted.

    Raises:
        InputError: The first reading is not in the late layout.
    """
    if options.refine is None:
        return None
    if layout.name != "late":
        raise InputError(
            f"refine={options.refine} is for the late layout, but layout={layout.name!r}; leave "
            "one of them out."
        )
    return replace(
        options,
        heads=None,
        router=None,
        layout="parallel",
        documents=None,
        first_stage_weight=None,
        refine=None,
    )


def _layers(selectors: Sequence[Selector], documents: DocumentIndex | None, num_layers: int) -> int:
    """Return how many layers to load: those of the heads, and of all keys in the index."""
    layers = max(selector.layers(num_layers) for selector in selectors)
    return layers if documents is None else max(layers, documents.columns.last_layer + 1)


def _with_adapter(options: RerankerOptions, llm: FrozenLM | None) -> RerankerOptions:
    """Load the adapter of the options, for the heads that come with it."""
    adapter = options.adapter
    if llm is not None and adapter is None:
        return options if llm.adapter is None else replace(options, adapter=llm.adapter)
    if not isinstance(adapter, str):
        return options
    loaded = Adapter.from_pretrained(adapter, **options.hub)
    return replace(options, adapter=loaded)


def _check_optional(part: object, kind: type) -> None:
    """Check an object that may be left out."""
    if part is not None and not isinstance(part, kind):
        name = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", kind.__name__).lower()
        raise InputError(
            f"{name} is a {class_name(part)}; give a {kind.__name__}, or None for none."
        )


def _check_parts(backbone: object, selector: object, layout: object) -> None:
    """Check the objects that a re-ranker is composed of."""
    if not isinstance(backbone, FrozenLM):
        raise InputError(
            f"backbone is a {class_name(backbone)}; give a FrozenLM, such as FrozenLM(model, "
            "tokenizer), or load one by name with from_pretrained."
        )
    lacks = not hasattr(selector, "select") or not hasattr(selector, "layout")
    if selector is not None and (lacks or isinstance(selector, type)):
        raise InputError(
            f"selector is a {class_name(selector)}; give a selector, such as FixedHeads(heads), "
            "or None for all heads."
        )
    lacks = not hasattr(layout, "read") or not hasattr(layout, "name")
    if layout is not None and not isinstance(layout, str) and (lacks or isinstance(layout, type)):
        raise InputError(
            f"layout is a {class_name(layout)}; give a layout, its name, or None for the one that "
            "the heads were chosen for."
        )


def _checked_request(name: str, request: Any) -> tuple[str, list[Document]]:
    """Check a pair of a query and its documents."""
    if not isinstance(request, tuple | list) or len(request) != 2:
        raise InputError(
            f"{name} is a {class_name(request)}; give a pair of a query and its documents."
        )
    query, documents = request
    check_text(f"{name}[0]", query)
    return query, as_documents(documents, f"{name}[1]")
