"""Attention over frozen tokens, against torch's attention, scikit-learn, and a needle in noise."""

import pytest
import torch
from torch import nn

from medssl.probes.attentive import AttentiveProbe


def needles(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """32 tokens of noise, one of which, anywhere, is marked in channel 0 and says the class."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(2, (count,), generator=generator)
    tokens = torch.randn(count, 32, 16, generator=generator)
    places = torch.randint(32, (count,), generator=generator)
    tokens[torch.arange(count), places, 0] = 5
    tokens[torch.arange(count), places, 1] = 2.0 * labels - 1
    return tokens, labels


def accuracy(scores: torch.Tensor, labels: torch.Tensor) -> float:
    return (scores.argmax(1) == labels).float().mean().item()


def test_a_needle_is_found_that_the_mean_of_the_tokens_hides():
    from sklearn.linear_model import LogisticRegression

    tokens, labels = needles(200, 0)
    unseen, expected = needles(200, 1)
    of_mean = LogisticRegression().fit(tokens.mean(1).numpy(), labels.numpy())
    assert of_mean.score(unseen.mean(1).numpy(), expected.numpy()) < 0.7
    assert accuracy(AttentiveProbe().fit(tokens, labels).scores(unseen), expected) > 0.95


def test_a_probe_is_cross_attention_to_one_query_and_a_linear_classifier():
    """torch's attention with E / H dimensions per head, its projections folded in by hand."""
    torch.manual_seed(0)
    width, heads, classes = 12, 3, 4
    attention = nn.MultiheadAttention(width, heads, batch_first=True)
    classifier, query = nn.Linear(width, classes), torch.randn(1, 1, width)
    nn.init.normal_(attention.in_proj_bias)
    tokens = torch.randn(5, 7, width)
    with torch.no_grad():
        answer, _ = attention(query.expand(5, 1, width), tokens, tokens)
        expected = classifier(answer[:, 0]).softmax(1)
        to_query, to_keys, to_values = attention.in_proj_weight.chunk(3)
        asked = to_query @ query[0, 0] + attention.in_proj_bias[:width]
        read = classifier.weight @ attention.out_proj.weight  # (K, E)
        probe = AttentiveProbe(heads=heads)
        parts = [slice(4 * head, 4 * head + 4) for head in range(heads)]
        probe.queries_ = torch.stack([asked[p] @ to_keys[p] / 2 for p in parts])  # sqrt(E / H) = 2
        probe.weight_ = torch.stack([read[:, p] @ to_values[p] for p in parts], dim=1)
        probe.bias_ = classifier(attention.out_proj.bias) + read @ attention.in_proj_bias[-width:]
    torch.testing.assert_close(probe.scores(tokens), expected)


def test_of_one_token_it_is_the_logistic_regression_of_scikit_learn():
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    generator = torch.Generator().manual_seed(0)
    features = torch.randn(90, 5, generator=generator) * torch.tensor([1, 2, 3, 4, 5]) + 7
    labels = (features[:, :2] + torch.randn(90, 2, generator=generator)).gt(8).sum(1)
    scaler = StandardScaler().fit(features)
    reference = LogisticRegression(C=1 / (0.05 * 90), tol=1e-8, max_iter=1000)
    reference.fit(scaler.transform(features), labels)
    expected = torch.from_numpy(reference.predict_proba(scaler.transform(features))).float()
    probe = AttentiveProbe(heads=1, penalty=0.05).fit(features[:, None], labels)
    torch.testing.assert_close(probe.scores(features[:, None]), expected, atol=1e-3, rtol=0)


def test_the_order_of_the_tokens_means_nothing():
    tokens, labels = needles(40, 2)
    probe = AttentiveProbe(heads=2).fit(tokens, labels)
    torch.testing.assert_close(probe.scores(tokens), probe.scores(tokens.flip(1)))


def test_the_units_of_the_channels_mean_nothing():
    tokens, labels = needles(100, 2)
    unit, origin = torch.linspace(0.1, 5, 16), torch.linspace(-3, 3, 16)
    scores = AttentiveProbe(heads=2).fit(tokens, labels).scores(tokens)
    tokens = tokens * unit + origin
    again = AttentiveProbe(heads=2).fit(tokens, labels).scores(tokens)
    torch.testing.assert_close(again, scores, atol=0.01, rtol=0)


def test_a_large_penalty_leaves_nothing_but_the_frequency_of_the_classes():
    tokens, labels = needles(100, 2)
    probe = AttentiveProbe(penalty=1e4).fit(tokens, labels)
    frequency = labels.float().mean()
    torch.testing.assert_close(probe.scores(tokens)[:, 1], frequency.expand(100), atol=0.01, rtol=0)
    assert probe.queries_.abs().max() < 1e-4


def test_a_constant_channel_does_no_harm():
    tokens, labels = needles(200, 0)
    unseen, expected = needles(100, 1)
    tokens[..., 5] = unseen[..., 5] = 0.1
    assert accuracy(AttentiveProbe().fit(tokens, labels).scores(unseen), expected) > 0.95


def test_what_cannot_be_learnt_from_is_refused():
    tokens, labels = needles(8, 0)
    with pytest.raises(ValueError, match=r"expected tokens \(S, N, E\), got \(8, 16\)"):
        AttentiveProbe().fit(tokens[:, 0], labels)
    with pytest.raises(ValueError, match="one label per row"):
        AttentiveProbe().fit(tokens, labels[:4])
    with pytest.raises(ValueError, match=r"a row of every class and at least two, got \[0\]"):
        AttentiveProbe().fit(tokens, 0 * labels)
    with pytest.raises(ValueError, match="1 of 8 rows of features hold NaN"):
        AttentiveProbe().fit(tokens.index_fill(0, torch.tensor([3]), torch.nan), labels)


@pytest.mark.parametrize("arguments", [{"heads": 0}, {"penalty": 0.0}])
def test_hyperparameters_out_of_range_are_refused(arguments):
    with pytest.raises(ValueError, match="heads must be at least 1 and penalty positive"):
        AttentiveProbe(**arguments)
