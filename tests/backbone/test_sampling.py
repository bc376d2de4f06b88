"""Sampling in one padded batch against one plain forward per token, and what is written with it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import families
import pytest
import reference
import torch
from torch import Tensor
from transformers import PreTrainedModel

from routehead_plugins import FrozenLM
from routehead_plugins.backbone.sampling import Ids, sample
from routehead_plugins.errors import UnsupportedModelError
from routehead_plugins.signals.synthesize import STYLES

WINDOW = 24
PREFIX: Ids = (40, 41, 90, 7, 200, 13)
PROMPTS: list[Ids] = [(60, 61, 62, 63), (99,), (8, 150, 33, 33, 201, 14, 15, 90, 111)]
LONG = tuple(range(30, 60))
FULL = [
    family
    for family, config in families.CONFIGS.items()
    if getattr(config, "sliding_window", None) is None
]


def build(family: str) -> PreTrainedModel:
    """A tiny model with an output projection of its own: a shared one repeats the last token."""
    model = families.tiny_model(family)
    own = torch.nn.Linear(32, families.VOCABULARY, bias=False)
    torch.nn.init.normal_(own.weight, std=0.3, generator=torch.Generator().manual_seed(0))
    model.set_output_embeddings(own)
    return model


def never(_: Ids) -> bool:
    return False


@torch.no_grad()
def logits(model: PreTrainedModel, ids: Ids) -> Tensor:
    """Of the token behind a sequence, shape (vocabulary,)."""
    output: Any = model(torch.tensor([ids]), use_cache=False)
    found: Tensor = output.logits[0, -1]
    return found


def alone(
    model: PreTrainedModel, prompt: Ids, max_tokens: int, ended: Callable[[Ids], bool] = never
) -> Ids:
    """The likeliest tokens behind one sequence: no batch, no padding, no cache."""
    found: Ids = ()
    while len(found) < max_tokens and not (found and ended(found)):
        found = (*found, int(logits(model, prompt + found).argmax()))
    return found


def draw(
    model: PreTrainedModel,
    prompts: Sequence[Ids] = PROMPTS,
    *,
    prefix: Ids = PREFIX,
    max_tokens: int = 8,
    temperature: float = 0,
    seed: int = 0,
    ended: Callable[[Ids], bool] = never,
) -> list[Ids]:
    return sample(
        model,
        prefix,
        prompts,
        max_tokens=max_tokens,
        temperature=temperature,
        generator=torch.Generator().manual_seed(seed),
        ended=ended,
    )


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return build("llama")


@pytest.mark.parametrize("family", families.CONFIGS)
def test_prompts_of_any_length_are_continued_as_each_would_be_alone(family: str) -> None:
    model = build(family)
    expected = [alone(model, PREFIX + prompt, 8) for prompt in PROMPTS]
    assert len(PREFIX) + max(map(len, PROMPTS)) + 8 < WINDOW
    assert all(len(set(ids)) >= 4 for ids in expected)
    assert draw(model) == expected


@pytest.mark.parametrize("family", FULL)
def test_a_long_prefix_changes_nothing_without_a_window(family: str) -> None:
    model = build(family)
    expected = [alone(model, LONG + prompt, 8) for prompt in PROMPTS]
    assert draw(model, prefix=LONG) == expected


@pytest.mark.parametrize("family", sorted(families.CONFIGS.keys() - set(FULL)))
def test_prompts_of_one_length_may_reach_beyond_a_window(family: str) -> None:
    model = build(family)
    prompts = [prompt * (12 // len(prompt)) for prompt in (PROMPTS[0], PROMPTS[1], (9, 8, 7))]
    expected = [alone(model, LONG + prompt, 8) for prompt in prompts]
    assert all(len(set(ids)) >= 4 for ids in expected)
    assert draw(model, prompts, prefix=LONG) == expected


def test_no_prompts_give_no_continuations(model: PreTrainedModel) -> None:
    assert draw(model, []) == []


@pytest.mark.parametrize("max_tokens", [0, 1, 5])
def test_no_more_tokens_are_sampled_than_asked_for(model: PreTrainedModel, max_tokens: int) -> None:
    assert draw(model, max_tokens=max_tokens) == [ids[:max_tokens] for ids in draw(model)]


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_a_row_that_ended_stops_and_the_others_go_on(
    model: PreTrainedModel, temperature: float
) -> None:
    whole = draw(model, temperature=temperature)
    stopped = draw(model, temperature=temperature, ended=lambda ids: ids == whole[1][:3])
    assert stopped == [whole[0], whole[1][:3], whole[2]]


def test_a_row_is_judged_after_every_token_until_it_ended(model: PreTrainedModel) -> None:
    whole = draw(model)
    asked: list[Ids] = []

    def ended(ids: Ids) -> bool:
        asked.append(ids)
        return len(ids) == 2 and ids != whole[2][:2]

    draw(model, max_tokens=3, ended=ended)
    one, two, three = whole
    assert asked == [one[:1], two[:1], three[:1], one[:2], two[:2], three[:2], three[:3]]


def test_nothing_is_run_once_all_rows_ended(model: PreTrainedModel) -> None:
    passes: list[int] = []
    handle = model.register_forward_pre_hook(
        lambda _, __, given: passes.append(given["input_ids"].shape[1]), with_kwargs=True
    )
    try:
        draw(model, ended=lambda ids: len(ids) == 2)
    finally:
        handle.remove()
    # The prefix once, the longest prompt, one token.
    assert passes == [6, 9, 1]


def test_the_same_seed_draws_the_same_and_another_one_does_not(model: PreTrainedModel) -> None:
    first = draw(model, temperature=1.0, seed=3)
    assert draw(model, temperature=1.0, seed=3) == first
    assert draw(model, temperature=1.0, seed=4) != first
    assert draw(model, temperature=0, seed=4) == draw(model, temperature=0, seed=3) != first


@pytest.mark.parametrize("temperature", [0.5, 1.5])
def test_tokens_are_drawn_as_often_as_the_softmax_says(
    model: PreTrainedModel, temperature: float
) -> None:
    prompt, draws = PROMPTS[0], 4000
    found = draw(model, [prompt] * draws, max_tokens=1, temperature=temperature)
    shares = torch.bincount(torch.tensor(found)[:, 0], minlength=families.VOCABULARY) / draws

    def distance(temperature: float) -> float:
        chances = (logits(model, PREFIX + prompt) / temperature).softmax(dim=-1)
        return float((shares - chances).abs().sum() / 2)

    assert distance(temperature) < 0.1
    assert min(distance(temperature / 2), distance(temperature * 2)) > 0.15


def test_sampling_leaves_the_model_and_the_random_numbers_of_others_alone() -> None:
    model = families.tiny_model("gemma2")
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    config, chance = model.config.to_dict(), torch.get_rng_state()
    draw(model, temperature=1.0)
    assert model.config.to_dict() == config
    assert torch.equal(torch.get_rng_state(), chance)
    assert model.state_dict().keys() == weights.keys()
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, weights[name])
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt-oss"])
def test_what_is_written_is_one_line_of_what_follows_the_prompt(family: str) -> None:
    model = build(family)
    llm = FrozenLM(model, families.tiny_tokenizer(), name=family)
    prompts = ["which", "a wolf"]
    # A first token that all texts have in common, then bytes.
    newline, prefix, *encoded = llm.encoder.encode(["\n", "seen: ", *prompts])

    def line(ids: Ids) -> str:
        return llm.encoder.decode(ids).strip().partition("\n")[0].strip()

    # Early releases of transformers ignore soft caps unless attention is eager.
    twin = reference.eager_twin(model)
    expected = [line(alone(twin, newline + prefix + prompt, 12)) for prompt in encoded]
    assert llm.write("seen: ", prompts, max_tokens=12, temperature=0, seed=0) == expected
    assert len(set(expected)) == 2


def test_tokens_are_decoded_without_control_tokens() -> None:
    tokenizer = families.tiny_tokenizer()
    encoder = FrozenLM(families.tiny_model("llama"), tokenizer).encoder
    ids = encoder.encode(["a wolf, é\n"])[0]
    controls = tuple(map(families.CONTROLS.index, ["<s>", "<|user|>", "<think>", "</s>"]))
    assert encoder.decode(controls[:3] + ids + controls[3:]) == "a wolf, é\n"
    assert encoder.decode(()) == ""


def test_writing_stops_at_a_line_break_behind_a_text_and_not_before_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    llm = FrozenLM(families.tiny_model("llama"), families.tiny_tokenizer(), name="tiny")
    script = llm.encoder.encode(["\n a b \n"])[0]
    lengths: list[int] = []

    def scripted(*_: object, ended: Callable[[Ids], bool], **__: object) -> list[Ids]:
        lengths.extend(n for n in range(1, len(script) + 1) if ended(script[:n]))
        return [script + llm.encoder.encode(["next"])[0], script[:2], ()]

    monkeypatch.setattr("routehead_plugins.backbone.text_tasks.sample", scripted)
    assert llm.write("seen: ", ["x"], max_tokens=9, temperature=0, seed=0) == ["a b", "", ""]
    assert lengths == [len(script)]


def test_the_embedded_llm_names_what_a_passage_is_about(embedded: FrozenLM) -> None:
    search = STYLES[1]
    passages = [
        "The Eiffel Tower was finished in 1889, in time for the World's Fair in Paris, and was the "
        "tallest tower of the world until 1930.",
        "Coffee plants grow best in the shade of taller trees on warm mountain slopes, where the "
        "cherries ripen slowly and are picked by hand.",
    ]
    prompts = [search.prompt(passage) for passage in passages]
    found = embedded.write(search.prefix, prompts, max_tokens=12, temperature=0, seed=0)
    tower, coffee = (text.casefold() for text in found)
    assert "eiffel tower" in tower
    assert "coffee" in coffee
    assert "\n" not in tower + coffee
    assert max(len(tower), len(coffee)) < 40


def test_the_embedded_llm_writes_the_same_for_the_same_seed(embedded: FrozenLM) -> None:
    def write(seed: int) -> list[str]:
        prompts = ["Animal:", "A plant:"]
        return embedded.write("Wolf\n", prompts, max_tokens=6, temperature=1.0, seed=seed)

    first = write(1)
    assert write(1) == first
    assert write(2) != first


def test_an_llm_without_its_last_layers_cannot_write() -> None:
    model: Any = families.tiny_model("llama")
    del model.model.layers[2:]
    shallow = FrozenLM(model, families.tiny_tokenizer(), name="shallow")
    with pytest.raises(UnsupportedModelError) as error:
        shallow.write("seen: ", ["x"], max_tokens=1, temperature=0, seed=0)
    assert str(error.value) == (
        "'shallow' was loaded without its last layers or its output projection and cannot write; "
        "load the whole causal LLM."
    )
