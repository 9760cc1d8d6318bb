"""A probe above its encoder against the two used by hand, and saved in one folder."""

import pytest
import torch

from medssl.data.preprocess import Preprocessing
from medssl.models.folder import load_model, save_model, selftest_noise
from medssl.models.timm_encoder import TimmEncoder
from medssl.models.vit3d import ViT3DEncoder
from medssl.probes.classifier import Classifier
from medssl.probes.knn import KNN

NAMES = ["clear", "effusion", "mass"]


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def encoder() -> TimmEncoder:
    torch.manual_seed(0)
    return TimmEncoder("test_resnet", in_channels=1).eval()


@pytest.fixture
def probe(encoder: TimmEncoder) -> KNN:
    """Fitted on nine pictures of three classes."""
    with torch.no_grad():
        features = encoder(noise(9, 1, 32, 32))
    return KNN(neighbours=4).fit(features, torch.tensor([0, 1, 2] * 3))


@torch.no_grad()
def test_pictures_get_the_probes_scores_of_their_embeddings(encoder, probe):
    images = noise(4, 1, 32, 32, seed=1)
    found = Classifier(encoder, probe, classes=NAMES).predict(images)
    assert found.shape == (4, 3)
    assert not torch.allclose(found[0], found[1])
    torch.testing.assert_close(found, probe.scores(encoder(images)))


@torch.no_grad()
def test_a_volume_has_the_mean_embedding_of_all_its_slices(encoder, probe):
    volumes = noise(2, 1, 37, 32, 32, seed=2)  # more slices than go through at once
    embeddings = torch.stack(
        [torch.stack([encoder(volume[:, d][None])[0] for d in range(37)]) for volume in volumes]
    )
    found = Classifier(encoder, probe, classes=NAMES).predict(volumes)
    torch.testing.assert_close(found, probe.scores(embeddings.mean(1)), atol=1e-4, rtol=0)
    assert not torch.allclose(found, probe.scores(embeddings[:, 18]), atol=1e-3)


@torch.no_grad()
def test_an_encoder_of_volumes_sees_them_whole():
    torch.manual_seed(0)
    encoder, volumes = ViT3DEncoder.example()
    encoder.eval()
    probe = KNN().fit(encoder(volumes), torch.arange(len(volumes)))
    names = [f"class {i}" for i in range(len(volumes))]
    found = Classifier(encoder, probe, classes=names).predict(volumes)
    assert found.argmax(1).tolist() == list(range(len(volumes)))
    torch.testing.assert_close(found, probe.scores(encoder(volumes)))


def test_the_score_of_an_item_is_the_probability_of_not_being_normal(encoder, probe):
    class_scores = torch.tensor([[0.1, 0.7, 0.2], [0.5, 0.0, 0.5]])
    model = Classifier(encoder, probe, classes=NAMES, normal="effusion")
    torch.testing.assert_close(model.item_scores(class_scores), torch.tensor([0.3, 1.0]))


def test_without_a_normal_class_it_is_that_of_the_likeliest(encoder, probe):
    class_scores = torch.tensor([[0.1, 0.7, 0.2], [0.5, 0.1, 0.4]])
    model = Classifier(encoder, probe, classes=NAMES)
    torch.testing.assert_close(model.item_scores(class_scores), torch.tensor([0.7, 0.5]))


@torch.no_grad()
def test_a_saved_classifier_comes_back_with_its_names_and_gives_the_same_bits(
    encoder, probe, tmp_path
):
    model = Classifier(encoder, probe, classes=NAMES, normal="clear")
    folder = save_model(
        tmp_path / "model",
        model,
        kind="probe",
        preprocessing=Preprocessing(size=(32, 32), intensity="range", channels=1),
        domain={},
        card="",
        noise=selftest_noise((2, 1, 32, 32)),
    )
    again = load_model(folder, kind="probe").model
    assert isinstance(again, Classifier)
    assert (again.classes, again.normal, again.probe.neighbours) == (NAMES, "clear", 4)
    images = noise(4, 1, 32, 32, seed=1)
    assert torch.equal(again.predict(images), model.predict(images))


def test_every_class_of_the_probe_needs_a_name(encoder, probe):
    with pytest.raises(ValueError, match="fitted on 3 classes, but 2 are named"):
        Classifier(encoder, probe, classes=["clear", "mass"]).predict(noise(1, 1, 32, 32))


@pytest.mark.parametrize(
    ("classes", "normal", "message"),
    [
        (["clear", "clear"], None, "different names"),
        (["clear"], None, "at least two"),
        (NAMES, "normal", "must be one of the classes .* got 'normal'"),
    ],
)
def test_names_that_mean_nothing_are_refused(encoder, probe, classes, normal, message):
    with pytest.raises(ValueError, match=message):
        Classifier(encoder, probe, classes=classes, normal=normal)


def test_a_probe_that_is_not_fitted_says_what_to_do(encoder):
    with pytest.raises(RuntimeError, match="call fit"):
        Classifier(encoder, KNN(), classes=NAMES).predict(noise(1, 1, 32, 32))
