"""Methods on volumes: boxes in mm and a network that takes volumes."""

from pathlib import Path

import pytest
import torch

from medssl.data.augment import Augmentation
from medssl.data.boxes import Boxes, MultiBox
from medssl.data.image import Image
from medssl.data.modality import Modality
from medssl.data.sample import Sample
from medssl.models.text import TextEncoder
from medssl.models.vit3d import ViT3DEncoder
from medssl.objectives.image_text.convirt import ConVIRT
from medssl.objectives.joint_embedding.dino import DINO
from medssl.objectives.joint_embedding.lvm_med import LVMMed
from medssl.objectives.masked.dinov2 import DINOv2
from medssl.stream import Stream, batches
from medssl.training import TrainingPlan, train

HEAD = {"prototypes": 16, "hidden_dim": 32, "bottleneck_dim": 16, "momentum": 0.9}


def boxes(small: int = 2) -> MultiBox:
    return MultiBox(
        large=Boxes(count=2, size=(8, 16, 16), side_mm=(20, 30)),
        small=Boxes(count=small, size=(4, 8, 8), side_mm=(8, 12)),
        augmentation=Augmentation(),
    )


def encoder() -> ViT3DEncoder:
    torch.manual_seed(0)
    return ViT3DEncoder((8, 16, 16), patch_size=(4, 8, 8), embedding_dim=24, depth=2, num_heads=2)


def volumes(count: int = 4) -> list[Sample]:
    generator = torch.Generator().manual_seed(0)
    affine = torch.diag(torch.tensor([3.0, 1.0, 1.0, 1.0], dtype=torch.float64))
    return [
        Sample(
            item=f"volume{number}",
            images={
                "image": Image(
                    pixels=torch.randn(1, 12, 32, 32, generator=generator) + number % 2,
                    axes="DHW",
                    modality=Modality.MR,
                    affine=affine,
                    frame="patient",
                    spacing=(3.0, 1.0, 1.0),
                )
            },
            report=f"Volume {number} is {'bright' if number % 2 else 'dark'}.",
            group=f"patient{number}",
        )
        for number in range(count)
    ]


METHODS = {
    "DINO": lambda: DINO(encoder(), views=boxes(), **HEAD),
    "DINOv2": lambda: DINOv2(encoder(), views=boxes(), hidden_probability=1.0, **HEAD),
    "LVMMed": lambda: LVMMed(
        encoder(), graph_size=4, neighbours=2, local_grid=2, local_pairs=3, views=boxes(0)
    ),
    "ConVIRT": lambda: ConVIRT(
        encoder(),
        text=TextEncoder(vocabulary_size=300, width=16, depth=1, heads=2, length=16),
        dim=8,
        crop=boxes(0),
    ),
}


@pytest.mark.parametrize("method", METHODS)
def test_a_method_trains_on_volumes(method: str, tmp_path: Path):
    objective = METHODS[method]()
    before = [p.detach().clone() for p in objective.export()["image"].parameters()]
    plan = TrainingPlan(total_samples=8, batch_size=4, learning_rate=1e-3)
    result = train(objective, volumes(), plan, workdir=tmp_path, device="cpu", workers=0)
    assert result["finished"]
    after = objective.export()["image"].parameters()
    assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_hidden_patches_of_a_volume_reach_the_student_alone():
    objective = DINOv2(encoder(), views=boxes(), hidden_probability=1.0, **HEAD).eval()
    stream = Stream(volumes(), batch_size=4, one_per="item", seed=0)
    size = {"start": 0, "stop": 4, "batch_size": 4, "workers": 0, "pin_memory": False}
    _, views = next(batches(volumes(), objective.views, stream, **size))
    hidden = objective._masks(4, views["global"].shape[3:])
    assert hidden.shape == (8, 2 * 2 * 2)
    assert hidden.any(1).all()
    asked: list[torch.Tensor | None] = []
    tokens = ViT3DEncoder.tokens
    for network in (objective.encoder, objective.teacher):
        network.tokens = lambda images, mask=None, of=network: (
            asked.append(mask),
            tokens(of, images, mask),
        )[1]
    objective.loss(views)
    large = [mask for mask in asked if mask is not None]
    assert len(large) == 1
    assert torch.equal(large[0], hidden)


def test_places_of_volumes_are_compared_where_they_lie():
    """Two boxes of each volume at one place: LVM-Med's local affinity is highest there."""
    objective = METHODS["LVMMed"]()
    torch.manual_seed(1)
    features = torch.randn(4, 6, 2, 2, 2)  # of four images, each place of its own
    both = torch.cat([features, features])
    same = torch.eye(3, 4).expand(8, 2, 3, 4)[:, 0]
    local = objective._local(both, same, (8, 16, 16))
    assert torch.equal(local[0].argmax(1), torch.arange(4))
    torch.testing.assert_close(local[0].diagonal(), torch.ones(4))
    assert local[0][~torch.eye(4, dtype=torch.bool)].max() < 0.9
