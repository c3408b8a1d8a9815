"""PEFT: LoRA and LoRA+ on a tiny random model; the frozen weights stay, the loss arrives, each group has its lr."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("transformers")
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from transformers import LlamaConfig, LlamaForCausalLM

from emonavi import EmoFact, EmoLynx, EmoNavi

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # peft and transformers among themselves
TOKENS = torch.randint(0, 32, (6, 9), generator=torch.Generator().manual_seed(3))


def adapted():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=32, max_position_embeddings=16, **sizes))
    return get_peft_model(llama, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))


def loss_of(model):
    """Worked out from the logits, so that it is not the loss that the model itself reports."""
    logits = model(input_ids=TOKENS).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits.reshape(-1, 32), TOKENS[:, 1:].reshape(-1))


def train(model, optimizer, steps=8):
    for _ in range(steps):
        with torch.no_grad():
            true = float(loss_of(model))
        model(input_ids=TOKENS, labels=TOKENS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        assert optimizer.emotion.loss == pytest.approx(true, rel=1e-5)


@pytest.mark.parametrize("sibling", [EmoNavi, EmoFact, EmoLynx])
def test_lora(sibling):
    model = adapted()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    start = float(loss_of(model).detach())
    optimizer = sibling(model.parameters(), lr=1e-2)  # all of them: the frozen ones have no gradient
    train(model, optimizer)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if "lora" in name}
    assert float(loss_of(model).detach()) < start
    assert len(optimizer.state) == len(moved)


@pytest.mark.parametrize("sibling", [EmoNavi, EmoFact, EmoLynx])
def test_lora_plus(sibling):
    model = adapted()
    optimizer = create_loraplus_optimizer(model, optimizer_cls=sibling, lr=1e-4, loraplus_lr_ratio=16)
    assert isinstance(optimizer, sibling)
    lrs = [group["lr"] for group in optimizer.param_groups if group["params"]]
    assert sorted(set(lrs)) == pytest.approx([1e-4, 16e-4])
    train(model, optimizer)
    rates = [r for g, r in zip(optimizer.param_groups, optimizer.effective_lr, strict=True) if g["params"]]
    assert max(rates) == pytest.approx(16 * min(rates))
    assert optimizer.emotion.steps == 8  # one emotion for all groups, advanced once a step
