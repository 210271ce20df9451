"""Tokens by gates on their keys: what stock models compute whose attention mask leaves them out."""

from types import SimpleNamespace

import pytest
import torch
from architectures import PECULIAR, SIZES
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from planner.ir.errors import InputError
from planner.ir.lowering import lower_model
from planner.models.running.masked import MASKED, Gates, MaskedExecutor

# Without heads that a plan could switch; with sinks; with a mask by keyword; with attention that is
# written out, capped or of latent keys.
KINDS = ["llama", "olmo2", "bitnet", "diffllama", "gpt_oss", "doge", "gemma2", "deepseek_v3"]
# A scan beside attention, or in its place; attention past transformers' functions.
REFUSED = {
    "falcon_h1": "FalconH1DecoderLayer mixes them in a way of its own",
    "minimax": "layer 1: its MiniMaxDecoderLayer mixes them",
    "gpt_neo": "GPTNeoSelfAttention computes its attention itself",
    "bloom": "BloomBlock mixes them in a way of its own",
}
OF_GPT = {
    "gpt_neo": {
        "vocab_size": 128,
        "hidden_size": 64,
        "num_layers": 2,
        "num_heads": 4,
        "attention_types": [[["global"], 2]],
    },
    "bloom": {"vocab_size": 128, "hidden_size": 64, "n_layer": 2, "n_head": 4},
}


def built(kind):
    """(a random model of some architecture, its Graph); its sinks matter too."""
    if kind in PECULIAR:
        config, _ = PECULIAR[kind]()
    else:
        config = CONFIG_MAPPING[kind](**OF_GPT.get(kind, SIZES))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 or "sinks" in name:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(noise / max(1, parameter[0].numel()) ** 0.5)
    return model, lower_model(model, kind)


def asked():
    """(ids, which tokens stay), shape (2, 11)."""
    ids = torch.randint(3, 120, (2, 11), generator=torch.Generator().manual_seed(1))
    keep = torch.ones(2, 11)
    keep[0, [2, 5, 6]] = 0
    keep[1, [1, 9]] = 0
    return ids, keep


@pytest.mark.parametrize("kind", KINDS)
def test_gates_are_the_attention_mask_that_leaves_tokens_out(kind):
    model, graph = built(kind)
    ids, keep = asked()
    whole, places = torch.ones_like(ids), torch.arange(11).expand(2, -1)
    found = {}
    for how, gates in {
        "everything": torch.ones_like(keep),
        "some": keep,
        "some, learned": keep.clone().requires_grad_(),
    }.items():
        with MaskedExecutor(model, graph).using(Gates(tokens={0: gates})):
            found[how] = model(ids, attention_mask=whole, position_ids=places).logits
    stock = model(ids, attention_mask=whole, position_ids=places).logits
    cut = model(ids, attention_mask=keep.long(), position_ids=places).logits
    stays = keep.bool()
    assert (cut[stays] - stock[stays]).norm() > 0.05 * stock[stays].norm()
    torch.testing.assert_close(found["everything"], stock, rtol=1e-4, atol=1e-5)
    for how in ("some", "some, learned"):
        torch.testing.assert_close(found[how][stays], cut[stays], rtol=1e-4, atol=1e-5)
    (gradient,) = torch.autograd.grad(found["some, learned"][stays].square().sum(), gates)
    # Also of tokens that are left out.
    assert (gradient[:, :-2] != 0).all()


@pytest.mark.parametrize("kind", REFUSED)
def test_layers_whose_tokens_see_one_another_otherwise_are_refused(kind):
    model, graph = built(kind)
    ids, keep = asked()
    with (
        pytest.raises(InputError, match=REFUSED[kind]),
        MaskedExecutor(model, graph).using(Gates(tokens={0: keep})),
    ):
        model(ids)


@pytest.mark.parametrize("causal", [True, False, None])
def test_attention_without_a_mask_is_causal_where_stock_attention_is(causal):
    block = torch.nn.Module()
    block.is_causal, block.num_key_value_groups = True, 2
    block.config = SimpleNamespace(gates=lambda: torch.ones(2, 5))
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, n, 5, 8, generator=generator) for n in (4, 2, 2))
    found, expected = (
        ALL_ATTENTION_FUNCTIONS[name](block, query, key, value, None, is_causal=causal)[0]
        for name in (MASKED, "sdpa")
    )
    torch.testing.assert_close(found, expected)
