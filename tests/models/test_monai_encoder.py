"""MONAI's residual networks as encoders of volumes."""

from pathlib import Path

import pytest
import torch

from medssl.data.preprocess import Preprocessing
from medssl.models.folder import load_encoder, save_model, selftest_noise
from medssl.models.monai_encoder import MONAIEncoder

SIZE = (8, 32, 32)


@pytest.fixture(scope="module")
def encoder() -> MONAIEncoder:
    torch.manual_seed(0)
    return MONAIEncoder(10, size=SIZE).eval()


def test_the_embedding_is_monais_pooled_feature(encoder: MONAIEncoder):
    volumes = torch.randn(2, 1, *SIZE)
    with torch.no_grad():
        found, features = encoder.embed_with_map(volumes)
        torch.testing.assert_close(found, encoder.network(volumes))
        torch.testing.assert_close(encoder(volumes), found)
    assert found.shape == (2, encoder.embedding_dim)
    assert features.shape[:2] == found.shape


def test_a_deep_network_is_four_times_as_wide():
    deep = MONAIEncoder(50, size=SIZE).eval()
    with torch.no_grad():
        assert deep(torch.randn(1, 1, *SIZE)).shape == (1, deep.embedding_dim)


def test_it_comes_back_from_its_folder(encoder: MONAIEncoder, tmp_path: Path):
    prepared = Preprocessing(size=(32, 32), intensity="percentile", channels=1)
    noise = selftest_noise(encoder.selftest_shape(prepared.size))
    about = {"preprocessing": prepared, "domain": {}, "card": ""}
    save_model(tmp_path / "e", encoder, kind="encoder", noise=noise, **about)
    volumes = torch.randn(1, 1, *SIZE)
    torch.testing.assert_close(load_encoder(tmp_path / "e")(volumes), encoder(volumes))


def test_weights_of_medicalnet_load_by_their_names(encoder: MONAIEncoder, tmp_path: Path):
    state = {f"module.{name}": tensor for name, tensor in encoder.network.state_dict().items()}
    torch.save({**state, "module.conv_seg.0.weight": torch.zeros(1)}, tmp_path / "w.pth")
    torch.manual_seed(1)
    loaded = MONAIEncoder(10, size=SIZE, weights=tmp_path / "w.pth").eval()
    volumes = torch.randn(1, 1, *SIZE)
    torch.testing.assert_close(loaded(volumes), encoder(volumes))
    with pytest.raises(ValueError, match="does not fit"):
        MONAIEncoder(10, in_channels=2, size=SIZE, weights=tmp_path / "w.pth")


def test_a_depth_that_monai_has_not_is_refused():
    with pytest.raises(ValueError, match="got 20"):
        MONAIEncoder(20)
