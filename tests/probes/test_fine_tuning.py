"""Fine-tuning: what is learnt, what moves, and what must not."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medssl.data.augment import Augmentation
from medssl.data.boxes import Boxes, MultiBox
from medssl.data.image import Image
from medssl.data.modality import Modality
from medssl.data.sample import Sample
from medssl.data.synthetic.shapes import shape_samples
from medssl.data.views import Crops, MultiCrop
from medssl.models.encoder import Encoder
from medssl.models.lora import add_lora
from medssl.models.timm_encoder import TimmEncoder
from medssl.models.vit import ViTEncoder
from medssl.models.vit3d import ViT3DEncoder
from medssl.probes.fine_tuning import FineTuning, layer_depths, train_last
from medssl.training import TrainingPlan, train

CALM = Augmentation(intensity_probability=0.3, noise_probability=0, blur_probability=0)
CROP = MultiCrop(
    large=Crops(count=1, size=32, scale=(0.8, 1.0)),
    small=Crops(count=0, size=1),
    augmentation=CALM,
)
BOX = MultiBox(
    large=Boxes(count=1, size=(8, 16, 16), side_mm=(20, 24)),
    small=Boxes(count=0, size=(1, 1, 1), side_mm=(1, 1)),
    augmentation=CALM,
)


def pictures(count: int, seed: int) -> tuple[list[Sample], dict[str, int]]:
    """Shapes anywhere, in noise; the class is whether the shape is bright or dark."""
    samples = shape_samples(count, seed=seed)
    return samples, {sample.item: int("dark" in (sample.report or "")) for sample in samples}


def volumes(count: int, seed: int) -> tuple[list[Sample], dict[str, int]]:
    """A bright or a dark cube anywhere, in noise; slices twice as thick as pixels are wide."""
    generator = torch.Generator().manual_seed(seed)
    samples, labels = [], {}
    for number in range(count):
        pixels = 0.5 * torch.randn(1, 12, 24, 24, generator=generator)
        d, h, w = (torch.rand(3, generator=generator) * torch.tensor([6, 12, 12])).int().tolist()
        pixels[0, d : d + 6, h : h + 12, w : w + 12] += 1 - 2 * (number % 2)
        image = Image(
            pixels=pixels,
            axes="DHW",
            modality=Modality.MR,
            affine=torch.diag(torch.tensor([2.0, 1, 1, 1], dtype=torch.float64)),
            frame="patient",
            spacing=(2.0, 1.0, 1.0),
        )
        samples.append(Sample(item=f"volume{number}", images={"image": image}))
        labels[f"volume{number}"] = number % 2
    return samples, labels


def network_of_volumes() -> ViT3DEncoder:
    torch.manual_seed(0)
    return ViT3DEncoder((8, 16, 16), patch_size=(4, 8, 8), embedding_dim=24, depth=3, num_heads=2)


def network_of_pictures() -> ViTEncoder:
    torch.manual_seed(0)
    return ViTEncoder("test_vit", image_size=32)


def residual_network() -> TimmEncoder:
    torch.manual_seed(0)
    return TimmEncoder("test_resnet", in_channels=1)


def trained(tuned: FineTuning, samples: Sequence[Sample], workdir: Path, steps: int = 2) -> None:
    plan = TrainingPlan(total_samples=16 * steps, batch_size=16, learning_rate=3e-3)
    result = train(tuned, samples, plan, workdir=workdir, device="cpu", workers=0)
    assert result["finished"]


def accuracy(tuned: FineTuning, samples: list[Sample], labels: dict[str, int]) -> float:
    expected = torch.tensor([labels[sample.item] for sample in samples])
    return (tuned.scores(samples).argmax(1) == expected).float().mean().item()


def moved(tuned: FineTuning, samples: Sequence[Sample], workdir: Path) -> set[str]:
    """Names of the parameters and buffers that a few steps change."""
    before = {name: tensor.clone() for name, tensor in tuned.state_dict().items()}
    trained(tuned, samples, workdir, steps=4)  # a classifier at zero moves first, and alone
    after = tuned.state_dict()
    return {name for name in before if not torch.equal(before[name], after[name])}


class Mean(Encoder):
    """The mean of the pixels, per channel, times one."""

    in_channels = 1
    embedding_dim = 1

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Linear(1, 1, bias=False)
        nn.init.ones_(self.network.weight)
        self.shapes: list[tuple[int, ...]] = []  # of what it was given

    def forward(self, images: Tensor) -> Tensor:
        self.shapes.append(tuple(images.shape))
        return self.network(images.flatten(2).mean(2))


def of_mean(crop: MultiCrop | MultiBox = CROP) -> FineTuning:
    """Logits 0 and 3 m - 1 of the mean m."""
    tuned = FineTuning(Mean(), labels={"a": 1}, classes=2, crop=crop)
    with torch.no_grad():
        tuned.head.weight.copy_(torch.tensor([[0.0], [3.0]]))
        tuned.head.bias.copy_(torch.tensor([0.0, -1.0]))
    return tuned


def test_a_network_for_pictures_learns_to_tell_unseen_ones(tmp_path):
    samples, labels = pictures(300, 0)
    tuned = FineTuning(residual_network(), labels=labels, classes=2, crop=CROP)
    trained(tuned, samples, tmp_path, steps=45)
    assert accuracy(tuned, *pictures(100, 1)) > 0.9


def test_a_network_for_volumes_learns_to_tell_unseen_ones(tmp_path):
    samples, labels = volumes(60, 0)
    tuned = FineTuning(network_of_volumes(), labels=labels, classes=2, crop=BOX)
    trained(tuned, samples, tmp_path, steps=30)
    assert accuracy(tuned, *volumes(40, 1)) > 0.9


@pytest.mark.parametrize("dimensions", [2, 3])
def test_with_lora_only_the_updates_and_the_classifier_move(dimensions, tmp_path):
    samples, labels = pictures(32, 0) if dimensions == 2 else volumes(32, 0)
    encoder = network_of_pictures() if dimensions == 2 else network_of_volumes()
    add_lora(encoder)
    crop = CROP if dimensions == 2 else BOX
    tuned = FineTuning(encoder, labels=labels, classes=2, crop=crop)
    expected = {name for name in tuned.state_dict() if name.endswith((".up", ".down"))}
    assert moved(tuned, samples, tmp_path) == expected | {"head.weight", "head.bias"}


def test_of_the_last_layers_nothing_before_moves_not_even_a_batch_norm(tmp_path):
    samples, labels = pictures(32, 0)
    tuned = FineTuning(train_last(residual_network(), 1), labels=labels, classes=2, crop=CROP)
    found = moved(tuned, samples, tmp_path)
    last = {
        name for name in tuned.state_dict() if name.startswith(("encoder.network.layer4", "head"))
    }
    assert found == last
    assert any(name.endswith("running_var") for name in found)


def test_where_all_is_trained_every_batch_norm_follows_the_batches(tmp_path):
    samples, labels = pictures(32, 0)
    tuned = FineTuning(residual_network(), labels=labels, classes=2, crop=CROP)
    assert moved(tuned, samples, tmp_path) == set(tuned.state_dict())


@pytest.mark.parametrize("make", [network_of_pictures, network_of_volumes])
def test_layers_of_a_transformer_are_its_blocks(make):
    encoder = make()
    depths = layer_depths(encoder)
    assert set(depths) == {name for name, _ in encoder.named_parameters()}
    blocks = len(encoder.network.blocks)
    for name, depth in depths.items():
        inside = 1 + int(name.split(".")[2]) if ".blocks." in name else 0
        assert depth == (blocks if name.startswith("network.norm") else inside)


def test_an_earlier_layer_learns_slower_by_the_decay():
    encoder = network_of_volumes()  # a stem and three blocks
    tuned = FineTuning(encoder, labels={"a": 0}, classes=2, crop=BOX, layer_decay=0.5)
    rate = {id(p): g.get("rate", 1) for g in tuned.parameter_groups() for p in g["params"]}
    assert len(rate) == len(list(tuned.parameters()))
    of = {name: rate[id(parameter)] for name, parameter in tuned.named_parameters()}
    assert of["encoder.network.pos_embed"] == 0.5**4
    assert of["encoder.network.blocks.0.attn.qkv.weight"] == 0.5**3
    assert of["encoder.network.norm.weight"] == of["encoder.network.blocks.2.norm1.bias"] == 0.5
    assert of["head.weight"] == of["head.bias"] == 1


def test_the_loss_is_the_cross_entropy_of_every_crop_with_its_own_label():
    images = torch.tensor([[0.0, 1.0], [2.0, 3.0]])[:, :, None, None, None].expand(-1, -1, 1, 4, 4)
    labels = torch.tensor([1, 0])
    found = of_mean().loss({"images": images, "label": labels})
    logits = torch.tensor([[0, -1], [0, 2], [0, 5], [0, 8]]).float()
    expected = F.cross_entropy(logits, torch.tensor([1, 1, 0, 0]))
    torch.testing.assert_close(found["loss"], expected)
    assert found["accuracy"] == 0.25
    fresh = FineTuning(Mean(), labels={"a": 1}, classes=5, crop=CROP)
    assert fresh.loss({"images": images, "label": labels})["loss"].item() == pytest.approx(
        math.log(5)
    )


def test_scores_are_of_the_whole_image_whatever_the_crops():
    picture = pictures(1, 0)[0][0]
    pixels = torch.zeros(1, 64, 32)
    pixels[:, :32] = 1  # resized to 32 x 32, half of it is 1
    image = replace(picture.images["image"], pixels=pixels, valid=pixels[0] > 0)
    chance = 1 / (1 + math.exp(-0.5))  # of logit 3 / 2 - 1
    tuned = of_mean()
    tuned.train()
    found = tuned.scores([picture.with_image(image), picture.with_image(image)])
    torch.testing.assert_close(found, torch.tensor([[1 - chance, chance]] * 2), atol=1e-4, rtol=0)
    assert tuned.encoder.shapes == [(1, 1, 32, 32)] * 2
    assert tuned.training


def test_a_volume_is_scored_whole_or_as_the_mean_of_its_slices():
    volume = volumes(1, 0)[0][0]
    pixels = torch.zeros(1, 2, 24, 24)
    pixels[:, 1] = 1
    volume = volume.with_image(replace(volume.images["image"], pixels=pixels))
    low, high = 1 / (1 + math.exp(1)), 1 / (1 + math.exp(-2))
    slices, whole = of_mean(), of_mean(BOX)
    assert slices.scores([volume])[0, 1].item() == pytest.approx((low + high) / 2, abs=1e-5)
    assert slices.encoder.shapes == [(2, 1, 32, 32)]
    of_both = 1 / (1 + math.exp(-0.5))
    assert whole.scores([volume])[0, 1].item() == pytest.approx(of_both, abs=1e-5)
    assert whole.encoder.shapes == [(1, 1, 8, 16, 16)]


def test_labels_stay_out_of_what_is_saved(tmp_path):
    samples, labels = pictures(16, 0)
    trained(FineTuning(Mean(), labels=labels, classes=2, crop=CROP), samples, tmp_path)
    saved = b"".join(file.read_bytes() for file in tmp_path.rglob("*") if file.is_file())
    assert b"encoder.network.weight" in saved
    assert not any(item.encode() in saved for item in labels)


def test_an_item_without_a_class_is_named():
    sample = pictures(1, 0)[0][0]
    with pytest.raises(ValueError, match="item shape0 has no class"):
        of_mean().views(sample, torch.Generator())


@pytest.mark.parametrize("labels", [{}, {"a": -1, "b": 0}, {"a": 2}])
def test_labels_must_be_classes(labels):
    with pytest.raises(ValueError, match="labels must be classes 0 to 1"):
        FineTuning(Mean(), labels=labels, classes=2, crop=CROP)


def test_a_decay_above_one_is_refused():
    with pytest.raises(ValueError, match=r"layer_decay must lie in \(0, 1\], got 2"):
        FineTuning(Mean(), labels={"a": 0}, classes=2, crop=CROP, layer_decay=2)


@pytest.mark.parametrize("layers", [0, 5])
def test_layers_that_are_not_there_cannot_be_trained(layers):
    with pytest.raises(ValueError, match=f"expected 1 to 4 layers to train, .* got {layers}"):
        train_last(network_of_volumes(), layers)
