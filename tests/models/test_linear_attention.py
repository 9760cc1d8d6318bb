import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from medssl.models.linear_attention import LinearBlock, NoisyDecoder, linear_attention


def test_it_equals_the_quadratic_form():
    query, key, value = torch.randn(3, 2, 4, 7, 5, dtype=torch.float64).numpy()

    def phi(x: np.ndarray) -> np.ndarray:
        return np.where(x > 0, x + 1, np.exp(np.minimum(x, 0)))

    expected = np.zeros_like(value)
    for b, head, i in np.ndindex(2, 4, 7):
        weights = np.array([phi(query[b, head, i]) @ phi(key[b, head, j]) for j in range(7)])
        expected[b, head, i] = weights / weights.sum() @ value[b, head]

    found = linear_attention(*(torch.from_numpy(one) for one in (query, key, value)))
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-10)


def test_tokens_with_one_value_give_that_value():
    query, key = torch.randn(2, 1, 6, 4)
    value = torch.tensor([1.0, -2.0]).expand(1, 6, 2)
    torch.testing.assert_close(linear_attention(query, key, value), value)


def test_a_block_attends_head_by_head_and_adds():
    block = LinearBlock(6, num_heads=2).double()
    tokens = torch.randn(2, 5, 6, dtype=torch.float64)
    query, key, value = block.qkv(F.layer_norm(tokens, (6,))).split(6, dim=2)
    heads = [linear_attention(query[..., s], key[..., s], value[..., s]) for s in _HALVES]
    after = tokens + block.project(torch.cat(heads, dim=2))
    expected = after + block.mlp(F.layer_norm(after, (6,)))
    torch.testing.assert_close(block(tokens), expected)


_HALVES = (slice(0, 3), slice(3, 6))


def test_heads_that_do_not_divide_the_width_are_refused():
    with pytest.raises(ValueError, match=r"num_heads \(4\) must divide .* \(6\)"):
        LinearBlock(6, num_heads=4)


def test_blocks_answer_one_after_the_other():
    decoder = NoisyDecoder(8, depth=3, num_heads=2, dropout=0.2).eval()
    tokens = torch.randn(2, 5, 8)
    given = decoder(tokens)
    assert len(given) == 3
    torch.testing.assert_close(given[2], decoder.blocks[2](given[1]))
    torch.testing.assert_close(given[0], decoder.blocks[0](decoder.bottleneck(tokens)))


def test_noise_is_added_while_it_learns_only():
    decoder = NoisyDecoder(8, depth=1, num_heads=2, dropout=0.5)
    tokens = torch.randn(2, 5, 8)
    assert not decoder(tokens)[0].equal(decoder(tokens)[0])
    decoder.eval()
    assert decoder(tokens)[0].equal(decoder(tokens)[0])
    rates = [module.p for module in decoder.modules() if isinstance(module, nn.Dropout)]
    assert rates == [0.5] * 3
