"""A converted model is trained like any other: Trainer, LoRA, checkpointing, DDP, FSDP2, compile, copies."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoModelForCausalLM

import retrofit
from retrofit.configs import HSAConfig, MAHAConfig

IDS = torch.arange(2 * 96).view(2, 96) % 97 + 1

_made: dict[str, Any] = {}


@pytest.fixture(params=["hsa", "maha"])
def model(request: pytest.FixtureRequest, tiny_llama: Callable) -> Any:
    """A fresh copy of a converted model that is sparse on IDS."""
    if request.param not in _made:
        config = request.getfixturevalue(f"tiny_{request.param}")
        made = tiny_llama()
        retrofit.convert(made, config)
        _made[request.param] = made
    return copy.deepcopy(_made[request.param])


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def _gradients(model: Any) -> dict[str, Tensor]:
    model.zero_grad()
    model(IDS, labels=IDS, use_cache=False).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def _assert_same(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, atol=1e-6, rtol=1e-4, msg=name)


def test_every_base_weight_gets_a_gradient(model: Any) -> None:
    gradients = _gradients(model.train())
    base = {name for name, _ in model.named_parameters() if ".retrofit." not in name}
    assert base <= gradients.keys()
    assert all(bool(gradients[name].any()) for name in base)


def test_trainer_and_its_checkpoint(model: Any, tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    before = copy.deepcopy(model)
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=2,
        save_steps=1,
        per_device_train_batch_size=1,
        learning_rate=1e-2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    data = [{"input_ids": row, "labels": row} for row in IDS]
    trainer = Trainer(model=model, args=arguments, train_dataset=data)
    trainer.train()
    expected = model.eval()(IDS).logits
    assert not torch.allclose(expected, before(IDS).logits)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-2")
    assert len(retrofit.sites(loaded)) == 2
    assert torch.equal(loaded(IDS).logits, expected)
    resumed = Trainer(model=before, args=arguments, train_dataset=data)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    torch.testing.assert_close(resumed.model.eval()(IDS).logits, expected)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(model: Any, use_reentrant: bool) -> None:
    model.train()
    expected = _gradients(model)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    _assert_same(_gradients(model), expected)


def _lora(model: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(target_modules=["q_proj"], r=4, task_type="CAUSAL_LM"))


def _train(model: Any, steps: int = 2) -> None:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=1.0)
    for _ in range(steps):
        optimizer.zero_grad()
        model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
        optimizer.step()


def test_lora_after_conversion(model: Any) -> None:
    before = model(IDS).logits
    adapted = _lora(model)
    assert torch.equal(adapted(IDS).logits, before)
    trainable = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    assert len(trainable) == 4 and all("q_proj.lora" in name for name in trainable)
    _train(adapted)
    after = adapted(IDS).logits
    assert not torch.allclose(after, before)
    with adapted.disable_adapter():
        assert torch.equal(adapted(IDS).logits, before)
    torch.testing.assert_close(adapted.merge_and_unload()(IDS).logits, after, atol=1e-4, rtol=1e-3)


def test_lora_before_conversion(tiny_llama: Callable, tiny_hsa: HSAConfig) -> None:
    adapted = _lora(tiny_llama())
    report = retrofit.convert(adapted.base_model.model, tiny_hsa)
    assert len(report.converted) == 2
    before = adapted(IDS).logits
    _train(adapted)
    after = adapted(IDS).logits
    assert not torch.allclose(after, before)
    with adapted.disable_adapter():
        assert torch.equal(adapted(IDS).logits, before)


def test_a_deep_copy_is_independent(model: Any) -> None:
    expected = model(IDS).logits
    twin = copy.deepcopy(model)
    assert torch.equal(twin(IDS).logits, expected)
    _train(twin)
    assert not torch.allclose(twin(IDS).logits, expected)
    assert torch.equal(model(IDS).logits, expected)
    retrofit.revert(twin)
    assert not retrofit.sites(twin)
    assert len(retrofit.sites(model)) == 2
    assert torch.equal(model(IDS).logits, expected)
    ours = {parameter.data_ptr() for parameter in model.parameters()}
    assert not ours & {parameter.data_ptr() for parameter in twin.parameters()}


@pytest.mark.usefixtures("one_process")
def test_ddp(model: Any) -> None:
    model.train()
    expected = _gradients(model)
    wrapped = torch.nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    model.zero_grad()
    wrapped(IDS, labels=IDS, use_cache=False).loss.backward()
    got = {name: p.grad for name, p in model.named_parameters() if name in expected}
    _assert_same(got, expected)


@pytest.mark.usefixtures("one_process")
def test_fsdp2(model: Any) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model.train()
    expected = _gradients(model)
    logits = model(IDS).logits.detach()
    mesh = init_device_mesh("cpu", (1,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    torch.testing.assert_close(model(IDS).logits, logits)
    got = {name: gradient.full_tensor() for name, gradient in _gradients(model).items()}
    _assert_same({name: got[name] for name in expected}, expected)


def test_compiles_whole_with_gradients(model: Any) -> None:
    gradients = _gradients(model)
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    got = _gradients(compiled)
    _assert_same({name.removeprefix("_orig_mod."): gradient for name, gradient in got.items()}, gradients)


def test_casting(model: Any) -> None:
    logits = model.to(torch.bfloat16)(IDS).logits
    assert logits.dtype == torch.bfloat16 and bool(logits.isfinite().all())


@pytest.mark.parametrize(
    "config",
    [
        {"summaries": True, "pooling": "learned"},
        {"pooling": "attention"},
        {"aggregation": "nash", "dilated_branch": True},
    ],
    ids=str,
)
def test_autocast(
    tiny_llama: Callable, tiny_hsa: HSAConfig, tiny_maha: MAHAConfig, config: dict[str, Any]
) -> None:
    model = tiny_llama().train()
    retrofit.convert(model, replace(tiny_maha if "aggregation" in config else tiny_hsa, **config))
    expected = model(IDS, use_cache=False).logits
    with torch.autocast("cpu", torch.bfloat16):
        output = model(IDS, labels=IDS, use_cache=False)
    output.loss.backward()
    error = (output.logits.float() - expected).norm() / expected.norm()
    assert float(error.detach()) < 0.05
    assert all(p.grad is None or p.grad.dtype == torch.float32 for p in model.parameters())
