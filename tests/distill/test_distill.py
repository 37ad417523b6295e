from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from retrofit.api import convert, dense, sites
from retrofit.configs import DenseConfig, HSAConfig, MAHAConfig
from retrofit.distill import DistillConfig, distill
from retrofit.errors import ConfigError, DataError

LENGTH = 160


@pytest.fixture
def ids(text: Callable[[int], str]) -> Tensor:
    return torch.tensor([min(ord(character), 127) for character in text(4 * LENGTH)])


@pytest.fixture
def configs(tiny_hsa: HSAConfig, tiny_maha: MAHAConfig) -> dict[str, Any]:
    return {
        "hsa": dataclasses.replace(tiny_hsa, pooling="learned"),
        "hsa-summaries": dataclasses.replace(tiny_hsa, pooling="attention", summaries=True),
        "maha": tiny_maha,
    }


@pytest.fixture(scope="module")
def cache() -> dict[str, Any]:
    """Converted models by name; only copies are handed out."""
    return {}


@pytest.fixture
def build(
    tiny_llama: Callable[..., Any], configs: dict[str, Any], cache: dict[str, Any]
) -> Callable[[str], Any]:
    """A factory of converted models whose attention matters to their logits."""

    def built(name: str) -> Any:
        if name not in cache:
            model = tiny_llama(initializer_range=0.2)
            convert(model, configs[name])
            cache[name] = model
        return copy.deepcopy(cache[name])

    return built


def settings(**options: Any) -> DistillConfig:
    return DistillConfig(**{"length": LENGTH, "steps": 3, "learning_rate_2": 1e-2, **options})


def changed(model: Any, before: dict[str, Tensor]) -> set[str]:
    after = model.state_dict()
    assert list(after) == list(before)
    return {name for name in before if not torch.equal(after[name], before[name])}


def divergence(model: Any, teacher: Any, ids: Tensor) -> float:
    """KL of the converted model's logits from the teacher's dense ones, computed plainly."""
    windows = ids[: ids.numel() // LENGTH * LENGTH].view(-1, LENGTH)
    with torch.no_grad():
        with dense(teacher):
            taught = teacher(windows).logits.log_softmax(-1)
        ours = model(windows).logits.log_softmax(-1)
    return float((taught.exp() * (taught - ours)).sum(-1).mean())


@pytest.mark.parametrize("name", ["hsa", "hsa-summaries", "maha"])
def test_stage_1_lowers_its_loss_and_trains_only_the_targets(
    build: Callable[[str], Any], ids: Tensor, name: str
) -> None:
    model = build(name)
    before = copy.deepcopy(model.state_dict())
    report = distill(model, ids, settings(stage="1", steps=12, learning_rate=1e-2, batch_size=4))
    (stage,) = report.stages
    assert stage.stage == 1
    assert stage.last_loss < stage.first_loss
    names = changed(model, before)
    assert names
    assert all(".retrofit." in name for name in names), names
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert not any(site.tap for _, site in sites(model))


@pytest.mark.parametrize("name", ["hsa", "maha"])
@pytest.mark.parametrize(
    "options",
    [
        {"trainable": "lora"},
        {"trainable": "lora", "teacher": "copy", "teacher_device": "cpu"},
        {"trainable": "all", "teacher": "copy", "learning_rate_2": 1e-3, "batch_size": 4},
        {
            "trainable": "all",
            "teacher": "logits",
            "attention_weight": 0.0,
            "teacher_top": 100,
            "learning_rate_2": 1e-3,
            "batch_size": 4,
        },
    ],
    ids=["lora", "lora-copy", "all-copy", "all-logits"],
)
def test_stage_2_brings_the_logits_to_the_teachers(
    build: Callable[[str], Any], ids: Tensor, tmp_path: Path, name: str, options: dict[str, Any]
) -> None:
    model = build(name)
    teacher = copy.deepcopy(model)
    before = copy.deepcopy(model.state_dict())
    apart = divergence(model, teacher, ids)
    report = distill(model, ids, settings(stage="2", steps=12, **options), output=tmp_path / "run")
    assert report.stages[0].trained == (
        sum(p.numel() for p in model.parameters())
        if options["trainable"] == "all"
        else sum(p.numel() for _, s in sites(model) for p in s.retrofit.parameters())
        + 2 * 8 * (2 * 128 + 2 * 96)
    )
    assert divergence(model, teacher, ids) < 0.9 * apart
    names = changed(model, before)
    projections = {f"model.layers.{i}.self_attn.{p}_proj.weight" for i in range(2) for p in "qkvo"}
    if options["trainable"] == "lora":
        assert {name for name in names if ".retrofit." not in name} == projections
    else:
        assert projections < names
        assert "model.layers.1.mlp.up_proj.weight" in names
    assert not hasattr(model, "peft_config")


def test_trainable_own_leaves_the_weights_alone(build: Callable[[str], Any], ids: Tensor) -> None:
    model = build("maha")
    before = copy.deepcopy(model.state_dict())
    distill(model, ids, settings(stage="2", trainable="own"))
    names = changed(model, before)
    assert names
    assert all(".retrofit." in name for name in names), names


def test_both_stages_run_in_order_and_report_what_they_did(build: Callable[[str], Any], ids: Tensor) -> None:
    seen: list[dict[str, Any]] = []
    report = distill(build("maha"), ids, settings(steps=2, steps_2=3, accumulation=2), progress=seen.append)
    assert [(record["stage"], record["step"]) for record in seen] == [(1, 0), (1, 1), (2, 0), (2, 1), (2, 2)]
    assert tuple(seen) == report.losses
    assert report.tokens == 5 * 2 * LENGTH
    assert report.sequences == 4
    assert report.to_dict()["stages"][1]["steps"] == 3
    last = seen[-1]
    assert last["loss"] == pytest.approx(last["attention"] + last["logits"])


def test_a_shared_teacher_says_what_a_copy_says(build: Callable[[str], Any], ids: Tensor) -> None:
    losses = [
        [
            record["loss"]
            for record in distill(build("maha"), ids, settings(stage="2", teacher=teacher)).losses
        ]
        for teacher in ("shared", "copy")
    ]
    assert losses[0] == losses[1]


def test_gradient_checkpointing_changes_nothing(build: Callable[[str], Any], ids: Tensor) -> None:
    losses = []
    for checkpointing in (False, True):
        model = build("maha")
        report = distill(model, ids, settings(stage="2", gradient_checkpointing=checkpointing))
        assert not any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
        assert not model.training
        losses.append([record["loss"] for record in report.losses])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_accumulated_batches_are_one_batch(build: Callable[[str], Any], ids: Tensor) -> None:
    models, losses = [], []
    for size, accumulation in ((4, 1), (1, 4)):
        model = build("maha")
        report = distill(model, ids, settings(stage="2", steps=2, batch_size=size, accumulation=accumulation))
        models.append(model)
        losses.append([record["logits"] for record in report.losses])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_bfloat16_computes_in_it_and_keeps_float32_parameters(
    build: Callable[[str], Any], ids: Tensor
) -> None:
    model = build("maha")
    report = distill(model, ids, settings(steps=3, precision="bf16"))
    exact = distill(build("maha"), ids, settings(steps=3))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert report.losses != exact.losses
    assert report.losses[0]["loss"] == pytest.approx(exact.losses[0]["loss"], rel=0.1)


def test_adapters_can_stay(build: Callable[[str], Any], ids: Tensor) -> None:
    from peft.tuners.lora import LoraLayer

    options = settings(stage="2")
    merged, kept = build("maha"), build("maha")
    distill(merged, ids, options)
    distill(kept, ids, dataclasses.replace(options, merge_lora=False))
    assert sum(isinstance(module, LoraLayer) for module in kept.modules()) == 8
    window = ids[None, :LENGTH]
    with torch.no_grad():
        torch.testing.assert_close(kept(window).logits, merged(window).logits, rtol=1e-4, atol=1e-4)
    with pytest.raises(ConfigError, match="needs a model without adapters"):
        distill(kept, ids, options)


def test_an_error_leaves_no_adapters_behind(build: Callable[[str], Any], ids: Tensor) -> None:
    model = build("maha")
    keys = list(model.state_dict())

    def stop(record: dict[str, Any]) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        distill(model, ids, settings(stage="2"), progress=stop)
    assert list(model.state_dict()) == keys
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_the_callers_random_state_is_kept(build: Callable[[str], Any], ids: Tensor) -> None:
    model = build("maha")
    state = torch.get_rng_state()
    distill(model, ids, settings(steps=1))
    assert torch.equal(torch.get_rng_state(), state)


def test_stages_follow_from_what_the_target_can_learn(
    tiny_llama: Callable[..., Any], tiny_hsa: HSAConfig, ids: Tensor
) -> None:
    model = tiny_llama(initializer_range=0.2)
    convert(model, tiny_hsa)
    report = distill(model, ids, settings(steps=1))
    assert [stage.stage for stage in report.stages] == [2]
    for stage in ("1", "both"):
        with pytest.raises(ConfigError, match=r"pooling='mean' has none for it; convert with .*'learned'"):
            distill(model, ids, settings(stage=stage))
    with pytest.raises(ConfigError, match="trainable='own' found no parameters"):
        distill(model, ids, settings(stage="2", trainable="own"))


def test_what_cannot_be_distilled_is_refused(
    tiny_llama: Callable[..., Any], build: Callable[[str], Any], ids: Tensor, tmp_path: Path
) -> None:
    model = tiny_llama()
    with pytest.raises(ConfigError, match="needs a converted model"):
        distill(model, ids, settings())
    convert(model, DenseConfig())
    with pytest.raises(ConfigError, match="every site is DenseConfig"):
        distill(model, ids, settings())
    model = build("hsa")
    with pytest.raises(DataError, match="has 100 tokens, a sequence needs length=160"):
        distill(model, ids[:100], settings())
    with pytest.raises(DataError, match=r"leaves no query sparse.*up to position 72"):
        distill(model, ids, settings(length=72))
    with pytest.raises(DataError, match="at most the model's 4096 positions, got 5000"):
        distill(model, ids, settings(length=5000))
    with pytest.raises(DataError, match="needs a tokenizer"):
        distill(model, "pydoc_data.topics", settings())
    with pytest.raises(ConfigError, match="resume=True needs a folder"):
        distill(model, ids, settings(), resume=True)
    with pytest.raises(ConfigError, match=r"must be float32, got torch\.bfloat16"):
        distill(model.bfloat16(), ids, settings())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stage": "3"}, "stage must be one of 1, 2, both"),
        ({"trainable": "some"}, "trainable must be one of own, lora, all"),
        ({"precision": "fp16"}, "precision must be one of fp32, bf16"),
        ({"steps": 0}, "steps must be a whole number of at least 1"),
        ({"learning_rate": 0.0}, "learning_rate must be above 0"),
        ({"warmup": 1.0}, "warmup must be at least 0 and below 1"),
        ({"attention_weight": 0.0, "logits_weight": 0.0}, "stage 2 has no loss"),
        ({"trainable": "all"}, "teacher='shared' needs frozen base weights"),
        ({"trainable": "all", "teacher": "logits"}, "keeps no attention outputs"),
    ],
)
def test_contradictory_settings(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DistillConfig(**options)


def test_attention_dropout_does_not_stop_distillation(
    tiny_llama: Callable[..., Any], tiny_hsa: HSAConfig, ids: Tensor
) -> None:
    model = tiny_llama(attention_dropout=0.5)
    convert(model, tiny_hsa)
    distill(model, ids, settings(stage="2", steps=1))
    assert all(site.original.attention_dropout == 0.5 for _, site in sites(model))
