import pickle

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from medssl.models.weights import load_weights, read_state_dict


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_both_file_kinds_restore_the_network(tmp_path, suffix):
    source, target = network(), nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
    file = tmp_path / f"w{suffix}"
    state = source.state_dict()
    save_file(state, file) if suffix == ".safetensors" else torch.save(state, file)
    load_weights(target, file)
    assert all(
        torch.equal(a, b) for a, b in zip(target.parameters(), source.parameters(), strict=True)
    )


def test_extra_keys_are_refused_unless_named(tmp_path):
    state = {**network().state_dict(), "fc.weight": torch.ones(1)}
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=r"unknown \['fc.weight'\]"):
        load_weights(network(), tmp_path / "w.safetensors")
    load_weights(network(), tmp_path / "w.safetensors", ignore=("fc.",))


def test_missing_keys_and_shapes_are_named(tmp_path):
    state = network().state_dict()
    del state["0.bias"]
    state["1.weight"] = torch.ones(1, 5)
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=r"missing \['0.bias'\].*1.weight \(1, 5\) for \(1, 2\)"):
        load_weights(network(), tmp_path / "w.safetensors")


class Evil:
    def __reduce__(self):
        return (exec, ("raise SystemExit('code ran')",))


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path):
    (tmp_path / "w.pth").write_bytes(pickle.dumps({"a": Evil()}))
    with pytest.raises(ValueError, match="not a readable state dict|not unpickled"):
        read_state_dict(tmp_path / "w.pth")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no weight file"):
        read_state_dict(tmp_path / "none.pth")
