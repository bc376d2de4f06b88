"""Queries that `routehead align` learns from: their candidates, teacher scores and pools."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from routehead_plugins.cli.align_arguments import AlignArguments
from routehead_plugins.cli.runtime import check_bm25, err, progress, signals_folder, with_candidates
from routehead_plugins.cli.training_data import judged_queries_of, load_texts, training_parts
from routehead_plugins.errors import InputError
from routehead_plugins.io import Collection
from routehead_plugins.options import RerankerOptions

if TYPE_CHECKING:
    from torch import Tensor

    from routehead_plugins.alignment import AlignmentExample
    from routehead_plugins.signals import Teacher

# Fewer queries say nothing about what held-out ones gain.
_LEAST_QUERIES = 20
# Looks at more held-out queries, and a choice of heads on more queries, take longer than they help.
_MOST_HELD_OUT, _MOST_FOR_HEADS = 200, 400


@dataclass(frozen=True)
class Data:
    """Examples by part and query id, which of them are held out, and the others in random order."""

    parts: Sequence[Collection]
    scores: Sequence[Mapping[str, Tensor]]
    examples: Mapping[tuple[int, str], AlignmentExample]
    held_out: frozenset[tuple[int, str]]
    shuffled: Sequence[tuple[int, str]]

    @property
    def learned(self) -> list[tuple[int, str]]:
        """Keys of the examples to learn from."""
        return [key for key in self.examples if key not in self.held_out]

    @property
    def for_heads(self) -> list[tuple[int, str]]:
        """Keys of the examples that heads are chosen on."""
        return sorted(self.shuffled[:_MOST_FOR_HEADS])

    @classmethod
    def of(
        cls,
        parts: Sequence[Collection],
        scores: Sequence[Mapping[str, Tensor]],
        arguments: AlignArguments,
    ) -> Data:
        """Make examples of all queries that can be learned from, and hold some out.

        Raises:
            InputError: They are too few.
        """
        examples = dict(_examples(parts, scores, arguments))
        if len(examples) < _LEAST_QUERIES:
            raise InputError(
                f"{len(examples)} queries can be learned from, but at least {_LEAST_QUERIES} are "
                "needed; give more queries, a teacher, or --synthesize, such as 500."
            )
        keys = list(examples)
        random.Random(f"held out {arguments.seed}").shuffle(keys)
        count = min(_MOST_HELD_OUT, max(2, math.ceil(arguments.held_out * len(keys))))
        return cls(parts, scores, examples, frozenset(keys[:count]), keys[count:])


def _examples(
    parts: Sequence[Collection], scores: Sequence[Mapping[str, Tensor]], arguments: AlignArguments
) -> Iterator[tuple[tuple[int, str], AlignmentExample]]:
    from routehead_plugins.alignment import AlignmentExample
    from routehead_plugins.signals import non_blank_candidates

    for number, (part, scored) in enumerate(zip(parts, scores, strict=True)):
        for query_id, query in part.topics.items():
            documents = non_blank_candidates(part, query_id, arguments.hits)
            judgments = part.qrels.get(query_id, {})
            grades = [float(max(0, judgments.get(str(doc.id), 0))) for doc in documents]
            judged = arguments.preference > 0 and len(set(grades)) > 1
            teacher = scored.get(query_id)
            if len(documents) > 1 and (judged or teacher is not None):
                yield (
                    (number, query_id),
                    AlignmentExample(
                        query,
                        [document.text for document in documents],
                        grades if len(set(grades)) > 1 else None,
                        None if teacher is None else teacher.tolist(),
                    ),
                )


def gather_parts(
    arguments: AlignArguments, options: RerankerOptions, keep: Callable[[], None]
) -> list[Collection]:
    """Return judged queries, phrases and written queries, with their candidates."""
    from routehead_plugins.backbone import FrozenLM

    phrases = arguments.phrases is not None
    collections = [load_texts(path, arguments, phrases=phrases) for path in arguments.collection]
    judged = [_own_queries(collection, arguments) for collection in collections]
    parts = [part for part in judged if part is not None]
    if arguments.phrases is not None:
        parts += [_phrases(part, arguments.phrases, arguments) for part in collections]
    if arguments.synthesize is None:
        return parts
    check_bm25()
    name = arguments.writer or options.model
    with err.status(f"Loading {name} ..."):
        writer = FrozenLM.from_options(replace(options, model=name))
    return parts + [
        part
        for collection in collections
        for _, part in training_parts(collection, None, writer, arguments, keep)
    ]


def _phrases(collection: Collection, count: int, arguments: AlignArguments) -> Collection:
    """Draw phrases of a corpus as queries, with candidates."""
    from routehead_plugins.signals import phrase_queries

    drawn = phrase_queries(collection, count, seed=arguments.seed)
    return with_candidates(drawn, drawn.topics, arguments.hits)


def _own_queries(collection: Collection, arguments: AlignArguments) -> Collection | None:
    """Return a collection's own queries with candidates; with a teacher, unjudged ones as well."""
    if arguments.teacher is None or not arguments.judged or not collection.topics:
        return judged_queries_of(collection, arguments)
    ids = list(collection.topics)
    random.Random(f"{arguments.seed} {collection.name}").shuffle(ids)
    chosen = set(ids[: arguments.queries])
    topics = {key: query for key, query in collection.topics.items() if key in chosen}
    return with_candidates(replace(collection, topics=topics), topics, arguments.hits)


def load_teacher(arguments: AlignArguments, options: RerankerOptions) -> Teacher | None:
    """Load the teacher, if there is one."""
    from routehead_plugins.backbone import FrozenLM
    from routehead_plugins.signals import load_teacher as load

    if arguments.teacher is None or not arguments.distillation:
        return None
    with err.status(f"Loading {arguments.teacher} ..."):
        own = FrozenLM.from_options(options) if arguments.teacher == "likelihood" else None
        return load(
            arguments.teacher,
            own,
            device=options.device,
            max_doc_tokens=options.max_doc_tokens,
            local_files_only=options.local_files_only,
        )


def teacher_scores(
    parts: Sequence[Collection],
    teacher: Teacher | None,
    arguments: AlignArguments,
    keep: Callable[[], None],
) -> tuple[list[Mapping[str, Tensor]], float]:
    """Return the scores of each part, none without a teacher, and their temperature."""
    from routehead_plugins.signals import collect_teacher

    if teacher is None:
        return [{} for _ in parts], 1.0
    folder = arguments.signals or signals_folder()
    scores: list[Mapping[str, Tensor]] = []
    for part in parts:
        name, total = part.name, len(part.topics)
        with progress(f"{name}: {teacher.name}", total, keep) as advance:
            scores.append(
                collect_teacher(part, teacher, folder, hits=arguments.hits, advance=advance)
            )
    chosen = arguments.temperature
    return scores, teacher.temperature if chosen is None else chosen


def in_pools(
    examples: list[AlignmentExample], teacher: Teacher | None, arguments: AlignArguments
) -> list[AlignmentExample]:
    """Gather examples into pools, if that is asked for.

    Raises:
        InputError: The teacher is no bi-encoder.
    """
    from routehead_plugins.alignment import pooled
    from routehead_plugins.signals import EncoderTeacher

    if arguments.pool is None:
        return examples
    if not isinstance(teacher, EncoderTeacher):
        raise InputError(
            f"--teacher={arguments.teacher} scores pairs one by one; for --pool, give a "
            "bi-encoder, such as minilm."
        )
    with err.status("Gathering pools ..."):
        return pooled(
            examples,
            teacher,
            queries=arguments.pool,
            documents=arguments.hits,
            seed=arguments.seed,
        )
