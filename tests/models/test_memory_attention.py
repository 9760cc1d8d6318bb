import math

import numpy as np
import pytest
import torch
from timm.models.vision_transformer import Block
from torch import nn

from medssl.models.memory_attention import (
    GatedLevels,
    MemoryAttention,
    MemoryBlock,
    MeshedBlock,
    MeshedDecoder,
)


def filled(module: nn.Module, *, seed: int = 0) -> nn.Module:
    """Every parameter drawn anew, in float64."""
    generator = torch.Generator().manual_seed(seed)
    module.double()
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return module


def attend(queries, keys, values, heads):
    """Attention of (N, E) to (n, E) by loops over heads and rows."""
    width = queries.shape[1] // heads
    found = np.zeros_like(queries)
    for head in range(heads):
        part = slice(head * width, (head + 1) * width)
        for row in range(len(queries)):
            logits = [queries[row, part] @ key[part] / math.sqrt(width) for key in keys]
            weights = np.exp(logits) / np.exp(logits).sum()
            found[row, part] = sum(w * v[part] for w, v in zip(weights, values, strict=True))
    return found


def linear(layer: nn.Linear, rows: np.ndarray) -> np.ndarray:
    return rows @ layer.weight.detach().numpy().T + layer.bias.detach().numpy()


def test_a_query_that_prefers_nothing_gets_the_mean_of_the_values_and_of_the_memory():
    attention = MemoryAttention(2, 1, num_memory=1)
    with torch.no_grad():
        attention.qkv.weight.copy_(torch.cat([torch.zeros(4, 2), torch.eye(2)]))
        attention.qkv.bias.zero_()
        attention.proj.weight.copy_(torch.eye(2))
        attention.proj.bias.zero_()
        attention.memory_values.copy_(torch.tensor([[4.0, 5.0]]))
    found = attention(torch.tensor([[[2.0, 0.0], [0.0, 4.0]]]))
    # (2 + 0 + 4) / 3 and (0 + 4 + 5) / 3 for both tokens; the memory asks nothing itself
    torch.testing.assert_close(found, torch.tensor([[[2.0, 3.0], [2.0, 3.0]]]))


def test_a_query_along_the_memory_key_gets_the_memory_value():
    attention = MemoryAttention(1, 1, num_memory=4)
    with torch.no_grad():
        attention.qkv.weight.copy_(torch.tensor([[1.0], [0.0], [0.0]]))
        attention.qkv.bias.zero_()
        attention.proj.weight.fill_(1.0)
        attention.proj.bias.zero_()
        attention.memory_keys.copy_(torch.tensor([[math.log(2)], [0.0], [0.0], [0.0]]))
        attention.memory_values.copy_(torch.tensor([[3.0], [0.0], [0.0], [0.0]]))
    # logits of a token of 1: its own 0, the memory's log 2 and three 0; the value is sqrt(4) * 3
    found = attention(torch.ones(1, 1, 1))
    torch.testing.assert_close(found, torch.full((1, 1, 1), 2 / 6 * 6.0))


@pytest.mark.parametrize(("heads", "rows"), [(1, 3), (2, 3), (3, 5), (2, 0)])
def test_memory_attention_is_that_of_loops(heads, rows):
    attention = filled(MemoryAttention(6, heads, num_memory=rows))
    tokens = torch.randn(2, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    keys = math.sqrt(6 / heads) * attention.memory_keys.detach().numpy()
    values = math.sqrt(rows) * attention.memory_values.detach().numpy()
    for found, item in zip(attention(tokens), tokens.numpy(), strict=True):
        q, k, v = np.split(linear(attention.qkv, item), 3, axis=1)
        expected = attend(q, np.vstack([k, keys]), np.vstack([v, values]), heads)
        np.testing.assert_allclose(
            found.detach().numpy(), linear(attention.proj, expected), atol=1e-12
        )


def test_without_memory_it_is_the_attention_of_torch():
    attention = filled(MemoryAttention(8, 2))
    reference = nn.MultiheadAttention(8, 2, batch_first=True).double()
    reference.load_state_dict(
        {
            "in_proj_weight": attention.qkv.weight,
            "in_proj_bias": attention.qkv.bias,
            "out_proj.weight": attention.proj.weight,
            "out_proj.bias": attention.proj.bias,
        }
    )
    tokens = torch.randn(3, 5, 8, dtype=torch.float64)
    torch.testing.assert_close(attention(tokens), reference(tokens, tokens, tokens)[0])


def test_the_memory_in_use_begins_with_unit_variance():
    torch.manual_seed(0)
    attention = MemoryAttention(64, 4, num_memory=400)
    assert attention.memory_keys.std().item() == pytest.approx(1 / math.sqrt(16), rel=0.02)
    assert attention.memory_values.std().item() == pytest.approx(1 / math.sqrt(400), rel=0.02)


def test_the_memory_is_learnt():
    attention = MemoryAttention(4, 2, num_memory=3)
    attention(torch.randn(1, 2, 4)).square().sum().backward()
    assert attention.memory_keys.grad.abs().min() > 0
    assert attention.memory_values.grad.abs().min() > 0


def gates_alone(num_levels: int) -> GatedLevels:
    """Attention that hands on its values, of two channels, and gates that are half open."""
    levels = GatedLevels(2, 2, 1, num_levels=num_levels)
    with torch.no_grad():
        for parameter in levels.parameters():
            parameter.zero_()
        levels.keys_values.weight[2:] = torch.eye(2)
        levels.proj.weight.copy_(torch.eye(2))
    return levels


def test_levels_are_weighed_by_their_gates_and_the_root_of_their_number():
    levels = gates_alone(4)
    with torch.no_grad():
        levels.gates[1].bias.fill_(math.log(3))  # open by 3 / 4
    values = [torch.tensor([[[1.0, 2.0]]]), torch.tensor([[[4.0, 8.0]]])] + 2 * [
        torch.zeros(1, 1, 2)
    ]
    # (1 / 2 * 1 + 3 / 4 * 4) / sqrt(4) and (1 / 2 * 2 + 3 / 4 * 8) / sqrt(4)
    found = levels(torch.randn(1, 3, 2), values)
    torch.testing.assert_close(found, torch.tensor([1.75, 3.5]).expand(1, 3, 2))


def test_a_gate_sees_the_token_first_and_then_what_it_found():
    levels = gates_alone(1)
    with torch.no_grad():
        levels.gates[0].weight[0] = torch.tensor([1.0, 0.0, 0.0, 0.0])  # of the token
        levels.gates[0].weight[1] = torch.tensor([0.0, 0.0, 0.0, 1.0])  # of what it found
    token, level = torch.tensor([[[-math.log(4), 9.0]]]), torch.tensor([[[5.0, math.log(4)]]])
    # sigmoid(-log 4) = 1 / 5 and sigmoid(log 4) = 4 / 5
    expected = torch.tensor([[[1.0, 0.8 * math.log(4)]]])
    torch.testing.assert_close(levels(token, [level]), expected)


def test_gated_levels_are_those_of_loops():
    module = filled(GatedLevels(4, 6, 2, num_levels=2))
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randn(1, 5, 4, dtype=torch.float64, generator=generator)
    shown = [torch.randn(1, 3, 6, dtype=torch.float64, generator=generator) for _ in range(2)]
    total = np.zeros((5, 4))
    for gate, level in zip(module.gates, shown, strict=True):
        keys, values = np.split(linear(module.keys_values, level[0].numpy()), 2, axis=1)
        found = attend(linear(module.queries, tokens[0].numpy()), keys, values, 2)
        found = linear(module.proj, found)
        logits = linear(gate, np.hstack([tokens[0].numpy(), found]))
        total += found / (1 + np.exp(-logits))
    np.testing.assert_allclose(
        module(tokens, shown)[0].detach().numpy(), total / math.sqrt(2), atol=1e-12
    )


def test_a_block_without_memory_is_that_of_timm():
    torch.manual_seed(0)
    block, reference = MemoryBlock(12, 3, num_memory=0), Block(12, 3, qkv_bias=True)
    state = {name: torch.randn_like(value) for name, value in reference.state_dict().items()}
    reference.load_state_dict(state)
    missing, unexpected = block.load_state_dict(state, strict=False)
    assert unexpected == []
    assert missing == ["attn.memory_keys", "attn.memory_values"]  # which have no element
    tokens = torch.randn(2, 7, 12)
    torch.testing.assert_close(block(tokens), reference(tokens), atol=1e-5, rtol=1e-5)


def test_a_meshed_block_whose_levels_are_shut_is_a_plain_one():
    torch.manual_seed(0)
    block, plain = MeshedBlock(8, 12, 2, num_levels=2), MemoryBlock(8, 2, num_memory=0)
    plain.load_state_dict(
        {name: value for name, value in block.state_dict().items() if "levels" not in name}
    )
    tokens, levels = torch.randn(1, 6, 8), [torch.randn(1, 4, 12) for _ in range(2)]
    assert (block(tokens, levels) - plain(tokens)).abs().max() > 1e-3
    nn.init.zeros_(block.levels.proj.weight)
    nn.init.zeros_(block.levels.proj.bias)
    torch.testing.assert_close(block(tokens, levels), plain(tokens))


def test_every_level_reaches_the_decoder_whatever_its_scale():
    torch.manual_seed(0)
    decoder = MeshedDecoder(8, 12, 2, depth=2, num_levels=3)
    tokens, levels = torch.randn(1, 6, 8), [torch.randn(1, 4, 12) for _ in range(3)]
    found = decoder(tokens, levels)
    for i in range(3):
        changed = [*levels[:i], levels[i].flip(1).roll(1, dims=2), *levels[i + 1 :]]
        assert (decoder(tokens, changed) - found).abs().max() > 1e-4
        scaled = [*levels[:i], 100 * levels[i], *levels[i + 1 :]]
        torch.testing.assert_close(decoder(tokens, scaled), found, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="shorter"):
        decoder(tokens, levels[:2])


def test_heads_that_do_not_divide_the_width_are_refused():
    with pytest.raises(
        ValueError, match=r"num_heads \(3\) must divide the width of the tokens \(8\)"
    ):
        MemoryAttention(8, 3)
