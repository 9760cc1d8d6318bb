"""Does the audit find a marker that one site draws on its anomalous pictures, and nothing else?

python benchmarks/shortcut_audit.py PNEUMONIA ENCODER [--runs 20]

PNEUMONIA: pictures with labels.csv (path, finding, patient_id, split). ENCODER: an encoder folder.
In each run a made-up site, "a" or "b", is drawn for every patient. The audit is asked whether viral
is told from bacterial pneumonia by the features as they are, and again after a bright square was
drawn into a corner of the viral pictures of site "a". Prints the alarms of both: about 5 % of the
runs, and all of them, are wanted.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor

from medssl.data.dataset import PreparedSamples
from medssl.models.folder import load_encoder
from medssl.probes.shortcuts import audit
from medssl.probes.task import Asked, Task, read_task, without

SIDE = 0.12  # of the square, as a share of the picture's


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pneumonia", type=Path)
    parser.add_argument("encoder", type=Path)
    parser.add_argument("--runs", type=int, default=20)
    given = parser.parse_args()
    task = Task(
        data=given.pneumonia,
        target="labels.csv:finding",
        groups="labels.csv:patient_id",
        split="labels.csv:split",
    )
    asked = read_task(task)
    normal = asked.classes.index("normal")
    rows = zip(asked.items, asked.labels.tolist(), strict=True)
    asked = without(asked, {item.item for item, label in rows if label == normal})
    viral = (asked.labels == asked.classes.index("viral")).long()
    encoder = load_encoder(given.encoder)
    assert encoder.preprocessing is not None
    samples = PreparedSamples(asked.manifest, asked.items, encoder.preprocessing)
    pixels = torch.stack([sample.images["image"].pixels for sample in samples])
    plain, marked = (features(encoder, images) for images in (pixels, with_square(pixels)))
    alarms = {"plain": 0, "marker": 0}
    for run in range(given.runs):
        sites = sites_of(asked, run)
        drawn = torch.tensor([site == "a" for site in sites]) & (viral == 1)
        for name, found in (("plain", plain), ("marker", plain.where(~drawn[:, None], marked))):
            report = audit(found, viral, sites, asked.groups, seed=run)
            alarms[name] += report.alarm
        print(f"run {run}, marker: {report.verdict}", flush=True)
    print({name: f"{count} of {given.runs}" for name, count in alarms.items()})


@torch.no_grad()
def features(encoder: torch.nn.Module, images: Tensor) -> Tensor:
    return torch.cat([encoder(part) for part in images.split(64)])


def with_square(pixels: Tensor) -> Tensor:
    side = round(SIDE * pixels.shape[-1])
    marked = pixels.clone()
    marked[..., 2 : 2 + side, 2 : 2 + side] = pixels.amax()
    return marked


def sites_of(asked: Asked, seed: int) -> list[str]:
    owners = asked.group_numbers()
    coin = torch.randint(2, (int(owners.max()) + 1,), generator=torch.Generator().manual_seed(seed))
    return ["ab"[side] for side in coin[owners].tolist()]


if __name__ == "__main__":
    main()
