import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from medssl.models.encoder import frozen, output_channels
from medssl.models.timm_encoder import TimmEncoder
from medssl.models.weights import read_state_dict


def reference_layers(network, images, layers):
    """The outputs of named modules by a full forward pass."""
    found = {}
    for name, module in network.named_modules():
        if name in layers:
            module.register_forward_hook(lambda m, i, o, name=name: found.update({name: o}))
    network(images)
    return [found[name] for name in layers]


def test_feature_maps_are_the_layers_outputs_in_the_order_asked_for():
    encoder, images = TimmEncoder.example()
    frozen(encoder)
    wanted = ["layer3", "layer1"]
    ours = encoder.feature_maps(images, wanted)
    theirs = reference_layers(encoder.network, images, wanted)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_nothing_after_the_deepest_layer_is_computed():
    encoder, images = TimmEncoder.example()
    calls = []
    encoder.network.layer3.register_forward_hook(lambda *_: calls.append("layer3"))
    encoder.feature_maps(images, ["layer2"])
    assert calls == []
    encoder.feature_maps(images, ["layer3"])
    assert calls == ["layer3"]


def test_transformer_tokens_become_their_grid():
    encoder = frozen(TimmEncoder("test_vit", in_channels=2, options={"img_size": (64, 32)}))
    images = torch.randn(3, 2, 64, 32)
    (grid,) = encoder.feature_maps(images, ["blocks.1"])
    (tokens,) = reference_layers(encoder.network, images, ["blocks.1"])
    assert grid.shape[-2:] == (4, 2)
    prefix = encoder.network.num_prefix_tokens
    assert torch.equal(grid[:, :, 3, 1], tokens[:, prefix + 3 * 2 + 1])


def test_an_unknown_layer_is_named_with_the_ones_there_are():
    encoder, images = TimmEncoder.example()
    with pytest.raises(ValueError, match="no layer 'layer9'; it has .*layer1"):
        encoder.feature_maps(images, ["layer9"])


def test_an_unknown_network_is_named():
    with pytest.raises(ValueError, match="timm has no network 'resnet_fifty'"):
        TimmEncoder("resnet_fifty")


def test_output_channels_and_embedding_size():
    encoder, images = TimmEncoder.example()
    maps = encoder.feature_maps(images, ["layer1", "layer2"])
    assert output_channels(encoder, ["layer1", "layer2"], (64, 64)) == [m.shape[1] for m in maps]
    assert encoder(images).shape == (2, encoder.embedding_dim)


def test_without_a_network_the_hub_says_what_to_do(monkeypatch):
    import timm

    def unreachable(name, **arguments):
        raise OSError("no route")

    monkeypatch.setattr(timm, "create_model", unreachable)
    with pytest.raises(ConnectionError, match="give a local state dict"):
        TimmEncoder("resnet10t", weights="hub")


def test_imagenet_weights_name_the_published_classes(real_data):
    """expected_top3.json was made by the weights' original interpreter."""
    from skimage import data

    folder = real_data / "weights-mobilenetv2"
    file = folder / "mobilenetv2_100_tf2.pth"
    encoder = frozen(TimmEncoder("mobilenetv2_100", weights=file, options={"pad_type": "same"}))
    state = read_state_dict(file)
    classifier = nn.Linear(encoder.embedding_dim, 1000)
    classifier.load_state_dict(
        {"weight": state["classifier.weight"], "bias": state["classifier.bias"]}
    )
    expected = json.loads((folder / "expected_top3.json").read_text())
    for name in ("chelsea", "coffee"):
        scores = classifier(encoder(imagenet_input(getattr(data, name)()))).softmax(-1)[0]
        top, truth = scores.topk(3), expected[f"skimage.data.{name}"]
        assert top.indices.tolist() == [entry[0] for entry in truth]
        assert top.values.tolist() == pytest.approx([entry[2] for entry in truth], abs=0.02)


def imagenet_input(array):
    picture = Image.fromarray(array)
    scale = 256 / min(picture.size)
    picture = picture.resize([round(s * scale) for s in picture.size], Image.Resampling.BICUBIC)
    left, top = (picture.width - 224) // 2, (picture.height - 224) // 2
    pixels = np.asarray(picture.crop((left, top, left + 224, top + 224)), dtype=np.float32) / 255
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    return torch.from_numpy(((pixels - mean) / std).astype(np.float32)).permute(2, 0, 1)[None]


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_convnext", "test_efficientnet"])
def test_one_pass_gives_the_embedding_and_the_last_map(name):
    options = {"img_size": 64} if name == "test_vit" else {}
    encoder = frozen(TimmEncoder(name, in_channels=1, options=options))
    images = torch.randn(2, 1, 64, 64)
    embedding, features = encoder.embed_with_map(images)
    torch.testing.assert_close(embedding, encoder(images))
    assert features.shape[:2] == (2, encoder.embedding_dim)
    assert features.shape[2] == features.shape[3]
