"""Looking up a memory by cosines, shrinking and entropy, by hand."""

import math

import pytest
import torch

from anomaly.base import NormalData
from anomaly.examples import smooth_pictures
from anomaly.reconstruction.memae import MemAE, MemorizedReconstruction, Memory, entropy, shrunk
from anomaly.valid import WholeImage
from medssl.data.sample import collate
from medssl.models.conv_autoencoder import AutoencoderShape
from medssl.training import TrainingPlan

TINY = AutoencoderShape(channels=(8, 16), latent_dim=4)


def memory_of(*rows, threshold=0.0):
    memory = Memory(len(rows), len(rows[0]), shrink_threshold=threshold)
    memory.rows.data = torch.tensor(rows)
    return memory


def views_of(samples):
    rows = [WholeImage()(sample, torch.Generator()) for sample in samples]
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def test_weights_are_the_softmax_of_the_cosines():
    memory = memory_of([1.0, 0.0], [0.0, 2.0], [-5.0, 0.0])
    mixtures, weights = memory(torch.tensor([[3.0, 4.0]]))
    powers = [math.exp(0.6), math.exp(0.8), math.exp(-0.6)]
    expected = torch.tensor([powers]) / sum(powers)
    torch.testing.assert_close(weights, expected)
    (a, b, c) = expected[0].tolist()
    torch.testing.assert_close(mixtures, torch.tensor([[a - 5 * c, 2 * b]]))


def test_the_length_of_a_query_does_not_matter():
    memory = Memory(20, 6)
    queries = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(memory(queries)[0], memory(100 * queries)[0])


def test_shrinking_drops_small_weights_and_shares_out_the_rest():
    weights = torch.tensor([[0.5, 0.3, 0.15, 0.05]])
    torch.testing.assert_close(shrunk(weights, 0.2), torch.tensor([[0.625, 0.375, 0.0, 0.0]]))
    torch.testing.assert_close(shrunk(weights, 0.0), weights)


def test_a_weight_at_the_threshold_is_dropped():
    assert shrunk(torch.tensor([0.5, 0.25, 0.25]), 0.25).tolist() == [1.0, 0.0, 0.0]


def test_weights_that_are_all_too_small_give_no_mixture():
    memory = memory_of([1.0, 0.0], [0.0, 1.0], threshold=0.6)
    mixtures, weights = memory(torch.tensor([[1.0, 1.0]]))
    assert mixtures.tolist() == [[0.0, 0.0]]
    assert weights.tolist() == [[0.0, 0.0]]


def test_no_weight_is_larger_than_that_of_the_only_row_that_agrees():
    memory = memory_of([2.0, 0.0], *[[-1.0, 0.0]] * 9)
    _, weights = memory(torch.tensor([[1.0, 0.0]]))
    assert float(weights.detach().max()) == pytest.approx(0.4509, abs=1e-4)
    with pytest.raises(ValueError, match="above 0.45"):
        Memory(10, 2, shrink_threshold=0.4510)
    Memory(10, 2, shrink_threshold=0.4508)


def test_the_threshold_is_one_slots_share_by_default():
    assert Memory(25, 4).shrink_threshold == pytest.approx(0.04)
    assert Memory(25, 4, shrink_threshold=0.0025).shrink_threshold == 0.0025


@pytest.mark.parametrize("grid", [(3, 5), (2, 3, 4)])
def test_every_position_is_looked_up_on_its_own(grid):
    memory = Memory(20, 6)
    queries = torch.randn(2, 6, *grid, generator=torch.Generator().manual_seed(0))
    mixtures, weights = memory(queries)
    assert weights.shape == (2, *grid, 20)
    one = memory(queries[(1, slice(None), *(n - 1 for n in grid))][None])
    last = tuple(n - 1 for n in grid)
    torch.testing.assert_close(mixtures[(1, slice(None), *last)], one[0][0])
    torch.testing.assert_close(weights[(1, *last)], one[1][0])


def test_entropy_is_that_of_the_mean_position():
    even, sure = torch.full((4,), 0.25), torch.tensor([0.0, 1.0, 0.0, 0.0])
    assert float(entropy(even[None])) == pytest.approx(math.log(4))
    assert float(entropy(sure[None])) == pytest.approx(0.0, abs=1e-6)
    both = torch.stack([even, even, even, sure]).reshape(2, 2, 4)
    assert float(entropy(both)) == pytest.approx(0.75 * math.log(4))


def test_the_loss_is_the_squared_error_and_the_weighted_entropy():
    views = views_of(smooth_pictures(3))
    trainable = MemorizedReconstruction(TINY, Memory(10, 4), entropy_weight=0.5)
    found = trainable.loss(views)
    errors, weights = trainable.errors(views["image"])
    means = [errors[i][valid].mean() for i, valid in enumerate(views["valid"])]
    expected = torch.stack(means).mean() + 0.5 * entropy(weights)
    torch.testing.assert_close(found["loss"], expected)


def test_halves_of_a_batch_have_its_gradient_on_average():
    samples = smooth_pictures(4)
    trainable = MemorizedReconstruction(TINY, Memory(10, 4), entropy_weight=0.5)

    def gradient(part):
        trainable.zero_grad()
        trainable.loss(views_of(part))["loss"].backward()
        return trainable.memory.rows.grad.clone()

    halves = (gradient(samples[:2]) + gradient(samples[2:])) / 2
    torch.testing.assert_close(gradient(samples), halves, rtol=1e-3, atol=1e-6)


def test_an_image_leaves_no_trace_of_its_own_in_what_is_rebuilt():
    """Only weights of the memory pass; with equal rows every image is rebuilt alike."""
    trainable = MemorizedReconstruction(TINY, Memory(10, 4), entropy_weight=0.0)
    trainable.memory.rows.data[:] = torch.tensor([1.0, 2.0, 3.0, 4.0])
    trainable.memory.shrink_threshold = 0.0
    images = views_of(smooth_pictures(2))["image"]
    rebuilt = trainable.decoder(trainable.memory(trainable.encoder(images))[0], (64, 48))
    torch.testing.assert_close(rebuilt[0], rebuilt[1])


def test_training_brings_the_error_of_normals_down():
    samples = smooth_pictures(8)[1:]
    plan = TrainingPlan(total_samples=8, batch_size=8, learning_rate=3e-3)
    longer = TrainingPlan(total_samples=400, batch_size=8, learning_rate=3e-3)
    short, long = (
        MemAE(network=TINY, num_memory=50, plan=p).fit(NormalData(samples)) for p in (plan, longer)
    )
    batch = collate(samples)
    assert long.predict(batch).score.mean() < 0.7 * short.predict(batch).score.mean()


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"num_memory": 1}, "at least 2"),
        ({"num_memory": 10, "shrink_threshold": 0.5}, "no weight of 10 latents is above 0.45"),
    ],
)
def test_a_memory_that_gives_nothing_is_refused(given, told):
    with pytest.raises(ValueError, match=told):
        MemAE(network=TINY, **given)
