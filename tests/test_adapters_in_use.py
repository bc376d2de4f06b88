"""An adapter from the options to the records: heads, routers, indexes, signals and results."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import families
import lora
import pytest
import routers
import torch

from routehead_plugins import (
    Document,
    DocumentIndex,
    FrozenLM,
    HeadRoutedAttentionReranker,
    HeadSet,
)
from routehead_plugins.backbone import Adapter
from routehead_plugins.errors import (
    HeadError,
    IndexMismatchError,
    InputError,
    ModelLoadError,
    RouterMismatchError,
)
from routehead_plugins.io import Collection
from routehead_plugins.layouts import LateLayout
from routehead_plugins.options import RerankerOptions
from routehead_plugins.selection import FixedHeads, Router
from routehead_plugins.signals import collect_signals
from routehead_plugins.signals.store import llm_settings
from routehead_plugins.training import detect

QUERY = "which wolf ran?"
DOCUMENTS = ["a wolf ran over the hill", "rain", "seven grey stones by a river"]


@pytest.fixture(scope="module")
def llm() -> FrozenLM:
    return FrozenLM(families.tiny_model("llama"), families.tiny_tokenizer(), name="tiny")


@pytest.fixture(scope="module")
def adapted(llm: FrozenLM) -> FrozenLM:
    return llm.with_adapter(lora.random_adapter(llm, name="folder/aligned"))


@pytest.fixture
def folder(adapted: FrozenLM, tmp_path: Path) -> Path:
    assert adapted.adapter is not None
    adapted.adapter.save_pretrained(tmp_path / "aligned")
    return tmp_path / "aligned"


def test_the_label_is_a_short_name_and_the_beginning_of_the_fingerprint(adapted: FrozenLM) -> None:
    assert adapted.adapter is not None
    assert adapted.adapter_label == f"aligned-{adapted.adapter.fingerprint[:12]}"


def test_the_reranker_loads_the_adapter_that_its_options_name(model: str, folder: Path) -> None:
    options: dict[str, Any] = {"heads": "all", "dtype": "float32", "layout": "late"}
    plain = HeadRoutedAttentionReranker.from_pretrained(model, **options)
    expected = HeadRoutedAttentionReranker(plain.llm.with_adapter(folder), layout="late")
    for adapter in (folder, str(folder), Adapter.from_pretrained(folder)):
        reranker = HeadRoutedAttentionReranker.from_pretrained(model, adapter=adapter, **options)
        assert reranker.score(QUERY, DOCUMENTS) == expected.score(QUERY, DOCUMENTS)
        assert reranker.score(QUERY, DOCUMENTS) != plain.score(QUERY, DOCUMENTS)


def test_without_heads_and_router_the_heads_beside_the_adapter_are_read(
    model: str, folder: Path
) -> None:
    own = HeadRoutedAttentionReranker.from_pretrained(model, adapter=folder)
    assert own.rerank(QUERY, DOCUMENTS).heads == own.llm.heads
    label = Adapter.from_pretrained(folder).label
    heads = HeadSet.parse("2-1,1-0")
    replace(heads, model="tiny", adapter=label, layout="late").save(folder / "heads.json")
    chosen = HeadRoutedAttentionReranker.from_pretrained(model, adapter=folder)
    assert chosen.layout.name == "late"
    assert list(chosen.rerank(QUERY, DOCUMENTS).heads) == list(heads)
    assert chosen.llm.heads.last_layer == 2  # no deeper layer is loaded
    other = HeadRoutedAttentionReranker.from_pretrained(model, adapter=folder, heads="0-1")
    assert str(other.rerank(QUERY, DOCUMENTS).heads) == "0-1"


@pytest.mark.parametrize(
    ("adapter", "error", "message"),
    [
        ("nowhere", ModelLoadError, "adapter='nowhere' is not a folder"),
        (7, InputError, "adapter=7 is a int; give an Adapter, its folder or its id on the Hub"),
    ],
)
def test_options_that_name_no_adapter_are_refused(
    model: str, adapter: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        HeadRoutedAttentionReranker.from_pretrained(model, adapter=adapter)


def test_options_with_equal_adapters_are_equal(folder: Path) -> None:
    one, other = (RerankerOptions(adapter=Adapter.from_pretrained(folder)) for _ in range(2))
    assert one == other
    assert one != RerankerOptions()


def test_results_name_the_adapter(llm: FrozenLM, adapted: FrozenLM) -> None:
    ranking = HeadRoutedAttentionReranker(adapted).rerank(QUERY, DOCUMENTS)
    assert ranking.adapter == adapted.adapter_label
    assert HeadRoutedAttentionReranker(llm).rerank(QUERY, DOCUMENTS).adapter is None


def test_head_sets_record_the_adapter_and_refuse_another(
    llm: FrozenLM, adapted: FrozenLM, tmp_path: Path
) -> None:
    label = adapted.adapter_label
    heads = HeadSet([(2, 1)], model="tiny", adapter=label)
    heads.save(tmp_path / "heads.json")
    assert HeadSet.load(tmp_path / "heads.json") == heads
    HeadRoutedAttentionReranker(adapted, FixedHeads(heads)).score(QUERY, DOCUMENTS)
    # Under another name, it is the same adapter.
    renamed = replace(heads, adapter="renamed-" + str(label)[-12:])
    HeadRoutedAttentionReranker(adapted, FixedHeads(renamed)).score(QUERY, DOCUMENTS)
    wrong = [
        (llm, heads, f"chosen with the adapter '{label}', but the LLM has no adapter"),
        (
            adapted,
            replace(heads, adapter=None),
            f"no adapter, but the LLM has the adapter '{label}",
        ),
        (adapted, replace(heads, adapter="x-000000000000"), "with the adapter 'x-000000000000'"),
    ]
    for reader, chosen, message in wrong:
        with pytest.raises(HeadError, match=message):
            HeadRoutedAttentionReranker(reader, FixedHeads(chosen)).score(QUERY, DOCUMENTS)
    # A plain list of heads can be tried with any.
    HeadRoutedAttentionReranker(adapted, FixedHeads(HeadSet([(2, 1)]))).score(QUERY, DOCUMENTS)


def test_an_index_names_the_adapter_that_it_was_made_with(
    llm: FrozenLM, adapted: FrozenLM, tmp_path: Path
) -> None:
    chosen = FixedHeads(HeadSet([(2, 1)]))
    with HeadRoutedAttentionReranker(adapted, chosen, layout="late").index_builder(
        tmp_path / "index"
    ) as builder:
        list(builder.add([Document(text) for text in DOCUMENTS]))
    layout = LateLayout(documents=DocumentIndex(tmp_path / "index"))
    HeadRoutedAttentionReranker(adapted, chosen, layout=layout).score(QUERY, DOCUMENTS)
    other = llm.with_adapter(lora.random_adapter(llm, seed=2, name="other"))
    for reader, named in ((llm, r"\(weights \w{8}\); load"), (other, "adapter other-")):
        with pytest.raises(IndexMismatchError, match=f"adapter aligned-.*{named}"):
            HeadRoutedAttentionReranker(reader, chosen, layout=layout).score(QUERY, DOCUMENTS)


def test_a_router_records_the_adapter_and_refuses_another(
    llm: FrozenLM, adapted: FrozenLM, tmp_path: Path
) -> None:
    plain = routers.fixed([1.0, 0.5])
    heads = replace(plain.heads, model="tiny", adapter=adapted.adapter_label)
    router = replace(plain, heads=heads)
    router.save_pretrained(tmp_path)
    loaded = Router.from_pretrained(tmp_path)
    assert loaded.heads.adapter == adapted.adapter_label
    with pytest.raises(RouterMismatchError, match=r"adapter 'aligned-.*but the LLM has no adapter"):
        loaded.select(QUERY, llm)


def test_heads_that_are_detected_with_an_adapter_record_it(
    adapted: FrozenLM, tmp_path: Path
) -> None:
    texts = dict(zip(("d0", "d1", "d2"), DOCUMENTS, strict=True))
    collection = Collection(
        "tiny",
        tmp_path,
        {key: Document(text, key) for key, text in texts.items()},
        {"q": QUERY},
        {"q": {"d0": 1}},
        {"q": {"d1": 3.0, "d0": 2.0, "d2": 1.0}},
    )
    signals = collect_signals(collection, adapted, LateLayout(), tmp_path / "signals")
    assert signals.adapter == adapted.adapter_label
    assert detect(signals, "ndcg", 2).adapter == adapted.adapter_label
    with pytest.raises(InputError, match=r"signals of adapter None cannot be joined"):
        _ = signals + replace(signals, adapter=None)


def test_signals_are_kept_apart_by_adapter(llm: FrozenLM, adapted: FrozenLM) -> None:
    assert "adapter" not in llm_settings(llm)
    assert adapted.adapter is not None
    assert llm_settings(adapted)["adapter"] == adapted.adapter.fingerprint
    assert torch.equal(  # and nothing else of the two differs
        HeadRoutedAttentionReranker(llm).signals(QUERY, DOCUMENTS),
        HeadRoutedAttentionReranker(adapted.with_adapter(None)).signals(QUERY, DOCUMENTS),
    )
