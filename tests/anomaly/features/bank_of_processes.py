"""Fits PatchCore's example: python bank_of_processes.py FILE, also under torchrun. Each process
writes what it has learnt to FILE.RANK.pt."""

import sys

import torch

from anomaly.base import NormalData
from anomaly.features.patchcore import PatchCore
from medssl.distributed import rank


def main(file: str) -> None:
    torch.manual_seed(0)
    detector, samples = PatchCore.example()
    normal = NormalData(samples[:7], batch_size=2)
    learnt = {}
    for name, most in (("all", None), ("sample", 500)):
        detector.max_patches = most
        detector.fit(normal).add(NormalData([*samples[7:], *renamed(samples[:3])], batch_size=2))
        learnt |= {f"{name}.{key}": value for key, value in detector.state_dict().items()}
    torch.save(
        {key: value.clone() for key, value in learnt.items() if key.endswith("_")},
        f"{file}.{rank()}.pt",
    )


def renamed(samples: list) -> list:
    from dataclasses import replace

    return [replace(sample, item=f"{sample.item}again") for sample in samples]


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1])
