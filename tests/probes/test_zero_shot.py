"""Classes by their names."""

import pytest
import torch
import torch.nn.functional as F

from medssl.models.text import SharedSpace, TextEncoder
from medssl.probes.zero_shot import zero_shot


def space() -> SharedSpace:
    torch.manual_seed(0)
    text = TextEncoder(vocabulary_size=300, width=16, depth=1, heads=2, length=8)
    text.learn(["normal lungs", "opacity on the left", "an opacity"])
    return SharedSpace(text, embedding_dim=4, dim=6)


def test_an_image_at_the_mean_direction_of_the_prompts_is_of_that_class():
    shared = space()
    prompts = [["normal lungs"], ["opacity on the left", "an opacity"]]
    shared.eval()
    with torch.no_grad():
        means = [F.normalize(shared.sentences(of).mean(0), dim=-1) for of in prompts]
    shared.train()
    found = zero_shot(torch.stack(means), prompts, shared, temperature=0.01)
    assert found.argmax(1).tolist() == [0, 1]
    torch.testing.assert_close(found.sum(1), torch.ones(2))
    cosine = float(means[0] @ means[1])
    odds = torch.exp(torch.tensor((1 - cosine) / 0.01))
    torch.testing.assert_close(found[0, 0], odds / (1 + odds))
    assert shared.training


def test_a_class_without_a_prompt_is_refused():
    with pytest.raises(ValueError, match="every class needs at least one prompt"):
        zero_shot(torch.zeros(1, 6), [["normal"], []], space())
