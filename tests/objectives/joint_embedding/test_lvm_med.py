"""LVM-Med: what is matched with what, noise that does not depend on how a batch is split."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from medssl.data.synthetic.shapes import shape_samples
from medssl.models.encoder import Encoder
from medssl.models.timm_encoder import TimmEncoder
from medssl.objectives.joint_embedding.lvm_med import LVMMed
from medssl.training import Clock


class Pixels(Encoder):
    """A 4 x 4 map of pooled pixels: alike where images are alike."""

    in_channels = 1
    embedding_dim = 4

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.AvgPool2d(8), nn.Conv2d(1, 4, 1))

    def embed_with_map(self, images):
        found = self.network(images)
        return found.mean((2, 3)), found


def objective(**changes) -> LVMMed:
    torch.manual_seed(0)
    encoder = changes.pop("encoder", None) or TimmEncoder("test_convnext", in_channels=1)
    settings = {"graph_size": 4, "neighbours": 2, "projection_dim": 16, "size": 32}
    return LVMMed(encoder, **{**settings, "local_grid": 2, "local_pairs": 2, **changes})


def batch(method: LVMMed, count: int = 8) -> dict[str, torch.Tensor]:
    samples = shape_samples(count, seed=3)
    rows = [method.views(s, torch.Generator().manual_seed(n)) for n, s in enumerate(samples)]
    views = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    return {**views, "item": 1000 + torch.arange(count)}


def twice(views: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The first view of each image as the second too."""
    return {n: v[:, :1].repeat_interleave(2, 1) if v.ndim > 1 else v for n, v in views.items()}


@pytest.mark.parametrize("second_order", [False, True])
def test_two_equal_views_without_noise_are_matched_with_themselves(second_order: bool):
    method = objective(noise=(0.0, 0.0), second_order=second_order)
    views = batch(method)
    views = {
        name: v[:, :1].repeat_interleave(2, 1) if v.ndim > 1 else v for name, v in views.items()
    }
    found = method.loss(views)
    assert found["loss"] == 0
    assert found["matched"] == 1


def test_swapped_images_count_as_wrong():
    method = objective(noise=(0.0, 0.0), second_order=False)
    views = batch(method, 4)
    views = {
        name: v[:, :1].repeat_interleave(2, 1) if v.ndim > 1 else v for name, v in views.items()
    }
    for name in ("global", "global_place"):
        views[name][[0, 1], 1] = views[name][[1, 0], 1]
    assert method.loss(views)["loss"] == 0.5


def test_the_gradient_pulls_an_image_to_itself():
    """A step against the gradient raises the mean cosine of an image with its other view."""
    method = objective(noise=(1.0, 1.0))
    views = batch(method)

    def cosine() -> torch.Tensor:
        both = views["global"].transpose(0, 1).flatten(0, 1)
        first, second = F.normalize(method.projector(method.encoder(both)), dim=-1).chunk(2)
        together = first @ second.mT
        return together.diagonal().mean() - together.mean()

    before = cosine().item()
    for _ in range(20):
        method.zero_grad()
        method.loss(views)["loss"].backward()
        with torch.no_grad():
            for parameter in method.parameters():
                if parameter.grad is not None:
                    parameter -= 0.5 * parameter.grad
    assert cosine().item() > before


def test_a_batch_in_parts_has_the_noise_and_the_gradient_of_the_whole():
    method = objective()
    views = batch(method)
    method.loss(views)["loss"].backward()
    whole = [p.grad.clone() for p in method.parameters() if p.grad is not None]
    method.zero_grad()
    for part in (slice(0, 4), slice(4, 8)):
        (method.loss({name: view[part] for name, view in views.items()})["loss"] / 2).backward()
    parts = [p.grad for p in method.parameters() if p.grad is not None]
    assert any(gradient.any() for gradient in whole)
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)


def test_noise_changes_with_the_step_and_anneals():
    method = objective(noise=(2.0, 0.5))
    like, items = torch.zeros(2, 4, 4), torch.arange(8)
    first = method._drawn(like, items)
    assert first is not None
    method.after_step(Clock(samples_seen=8, total_samples=16, step=1))
    assert method.noise_scale.item() == pytest.approx(1.25)  # half of the cosine
    second = method._drawn(like, items)
    assert second is not None
    assert not torch.allclose(first / 2.0, second / 1.25)
    assert not torch.equal(first[0], first[1])
    many = objective(noise=(1.0, 1.0))._drawn(torch.zeros(1, 300, 300), torch.zeros(4).long())
    assert many is not None
    assert many.mean().item() == pytest.approx(
        0.5772, abs=0.02
    )  # Gumbel's mean is Euler's constant
    assert many.std().item() == pytest.approx(torch.pi / 6**0.5, abs=0.02)


def test_the_local_affinity_is_one_for_an_image_with_itself_and_less_with_another():
    method = objective(encoder=Pixels(), local_grid=4, local_pairs=4, scale=(1.0, 1.0), flip=0.0)
    pixels = torch.stack([s.images["image"].pixels for s in shape_samples(4, seed=5)])
    _, features = method.encoder.embed_with_map(pixels)
    place = torch.tensor([[1 / 32, 0, 0], [0, 1 / 32, 0]]).expand(8, 2, 3)
    local = method._local(torch.cat([features, features]), place, (32, 32))
    torch.testing.assert_close(local[0].diagonal(), torch.ones(4))
    assert (local[0] < 1 + 1e-5).all()


def test_the_watch_tells_a_constant_embedding_from_guessing():
    method = objective()
    assert method.collapsed({}) is None
    assert method.collapsed({"feature_spread": 0.5, "matched": 0.8}) is None
    said = method.collapsed({"feature_spread": 0.001, "matched": 0.25})
    assert said is not None
    assert said.startswith("collapsed")
    said = method.collapsed({"feature_spread": 0.5, "matched": 0.26})
    assert said is not None
    assert said.startswith("not learning yet")


def test_arguments_and_batches_that_make_no_graph_are_refused():
    with pytest.raises(ValueError, match="each of 4 nodes can have 1 to 3 neighbours, got 4"):
        objective(neighbours=4)
    with pytest.raises(ValueError, match="noise must not be negative"):
        objective(noise=(-1.0, 0.0))
    method = objective()
    with pytest.raises(ValueError, match="a batch of 6 is no multiple of graph_size 4"):
        method.loss(batch(method, 6))
