"""anomalib's side of `patchcore_speed.py`; run by the python of an environment that has anomalib.

Reads a line of JSON with a task and a file of tensors, and answers with a line of JSON.
"""

import contextlib
import io
import json
import sys
import time

import torch
from anomalib.models.components import KCenterGreedy
from anomalib.models.image.patchcore.torch_model import PatchcoreModel


def main() -> None:
    torch.set_num_threads(int(sys.argv[1]))
    torch.manual_seed(0)
    with contextlib.redirect_stdout(sys.stderr):
        model = PatchcoreModel(
            layers=["layer2", "layer3"], backbone="resnet18", pre_trained=False, num_neighbors=9
        ).eval()
    for line in sys.stdin:
        asked = json.loads(line)
        tensors = torch.load(asked["file"], weights_only=True)
        print(json.dumps(TASKS[asked["task"]](model, **tensors)), flush=True)


def coreset(model: PatchcoreModel, features: torch.Tensor) -> dict:
    sampler = KCenterGreedy(embedding=features, sampling_ratio=0.1)
    with contextlib.redirect_stderr(io.StringIO()):
        start = time.perf_counter()
        picks = sampler.select_coreset_idxs()
    return {"seconds": time.perf_counter() - start, "picks": picks}


def hold(model: PatchcoreModel, bank: torch.Tensor, state: dict) -> dict:
    network = model.feature_extractor.feature_extractor
    kept = {name: value for name, value in state.items() if name in network.state_dict()}
    missing = network.load_state_dict(kept, strict=False).missing_keys
    assert not missing, missing
    model.memory_bank = bank
    return {}


def score(model: PatchcoreModel, pictures: torch.Tensor) -> dict:
    with torch.no_grad():
        start = time.perf_counter()
        model.feature_extractor(pictures)
        bare = time.perf_counter() - start
        start = time.perf_counter()
        model(pictures)
        whole = time.perf_counter() - start
    return {"bare": bare, "whole": whole}


TASKS = {"coreset": coreset, "hold": hold, "score": score}

if __name__ == "__main__":
    main()
