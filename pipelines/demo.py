"""`medssl demo`: the whole way on made-up head CT, in minutes and without a download."""

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from anomaly.calibration import false_alarm_interval
from anomaly.features.patchcore import PatchCore
from anomaly.slicewise import Slicewise
from medssl.data.augment import Augmentation
from medssl.data.manifest import Manifest, build_manifest, load_sample
from medssl.data.preprocess import Preprocessing
from medssl.data.synthetic.head_ct import TEST_LESION_SEEDS, TEST_NORMAL_SEEDS, TRAIN_SEEDS
from medssl.data.synthetic.head_ct_study import write_head_ct_study
from medssl.metrics import auroc, bootstrap
from medssl.models.encoder import Encoder
from medssl.models.timm_encoder import TimmEncoder
from medssl.objectives.joint_embedding.dino import DINO
from medssl.training import TrainingPlan
from pipelines.console import progress, say, table
from pipelines.evaluate import REPEATS, evaluate
from pipelines.fit import fit
from pipelines.intensity_baselines import MeanNormal, brightest
from pipelines.pretrain import pretrain

NAME = "demo-head-ct"
RATE = 0.05
NUM_HELD_OUT = 60
PREPARE = Preprocessing(
    size=(96, 96), intensity="window", window_hu=(35.0, 60.0), channels=1, region="intracranial"
)
PLAN = TrainingPlan(
    total_samples=24_000,
    batch_size=32,
    learning_rate=2e-3,
    warmup_samples=500,
    weight_decay=(0.04, 0.04),
)
# HU are calibrated, so the views hardly change them; dose and kernel differ between scans
VIEWS = Augmentation(gain=0.05, offset=0.05, gamma=0.05, noise=0.6, noise_probability=0.9, blur=1.0)
_MARK = ".medssl-demo"


def demo(out: Path = Path("demo"), *, seed: int = 0) -> dict[str, Any]:
    """Make head-CT phantoms; pretrain, fit, calibrate, register, score and evaluate on them.

    Args:
        out: folder for the scans, models, maps and the report; one that an earlier demo made is
            replaced, any other must not exist.
        seed: seeds pretraining, fitting and the bootstrap; the scans are always the same.
    """
    started = time.perf_counter()
    _make_room(out)
    data, held_out = out / "scans", out / "held_out"
    seconds: dict[str, float] = {}
    with _timed("scans", seconds):
        _write_scans(data, held_out)
    with _timed("pretrain", seconds):
        torch.manual_seed(seed)
        pretrain(data, objective(), out / "encoder", preprocessing=PREPARE, plan=PLAN, seed=seed)
    with _timed("fit", seconds):
        fitted = fit(
            data,
            detector(out / "encoder"),
            out / "model",
            calibration=held_out,
            rate=RATE,
            register=NAME,
            batch_size=4,
            seed=seed,
        )
    with _timed("score", seconds):
        model = f"models:/{NAME}/{fitted['registered']}"
        found = evaluate(data, model, out / "results", seed=seed)
    with _timed("baselines", seconds):
        baselines = _baselines(data, held_out, out, seed)
    result = {
        **{name: found[name] for name in ("image_auroc", "aupro", "false_alarm_rate", "recall")},
        "target_false_alarm_rate": RATE,
        "expected_false_alarms": _expected(fitted["num_calibration"], found["num_normal"]),
        "baselines": baselines,
        "seconds": {**seconds, "total": time.perf_counter() - started},
        **{name: found[name] for name in ("report", "scores", "maps", "metrics")},
        "model": model,
        "failed": found["failed"],
    }
    _tell(result, found)
    return result


def objective() -> DINO:
    """The demo's pretraining: DINO on a small residual network for one grey channel."""
    return DINO(
        encoder(),
        prototypes=256,
        hidden_dim=512,
        bottleneck_dim=64,
        momentum=0.98,
        global_size=64,
        local_crops=4,
        local_size=32,
        local_scale=(0.1, 0.4),
        augmentation=VIEWS,
    )


def encoder() -> Encoder:
    """The demo's network, randomly initialized."""
    options = {"channels": [32, 64, 128, 256], "stem_width": 16}
    return TimmEncoder("resnet10t", in_channels=1, options=options)


def detector(features: Encoder | Path) -> Slicewise:
    """The demo's detector over an encoder or an encoder folder."""
    patches = PatchCore(
        features, layers=["layer1", "layer2"], coreset_ratio=0.1, sigma=4.0, whiten=True
    )
    return Slicewise(patches, aggregation="top_mean", num_top=3, across=1.0, relative=0.5)


def _make_room(out: Path) -> None:
    if out.exists():
        if not (out / _MARK).is_file():
            raise FileExistsError(f"{out} exists and no demo made it; choose another --out")
        shutil.rmtree(out)
    out.mkdir(parents=True)
    (out / _MARK).touch()


def _write_scans(data: Path, held_out: Path) -> None:
    """The study, and normals for the threshold that not even pretraining sees."""
    fitted, calibrating = TRAIN_SEEDS[:-NUM_HELD_OUT], TRAIN_SEEDS[-NUM_HELD_OUT:]
    total = sum(map(len, (TRAIN_SEEDS, TEST_NORMAL_SEEDS, TEST_LESION_SEEDS)))
    with progress(total, "making head-CT phantoms") as bar:
        write_head_ct_study(
            data,
            train=fitted,
            test_normal=TEST_NORMAL_SEEDS,
            test_lesion=TEST_LESION_SEEDS,
            written=lambda: bar.advance(1),
        )
        write_head_ct_study(
            held_out,
            train=calibrating,
            test_normal=(),
            test_lesion=(),
            written=lambda: bar.advance(1),
        )


@contextmanager
def _timed(name: str, seconds: dict[str, float]) -> Iterator[None]:
    started = time.perf_counter()
    say(f"== {name}")
    yield
    seconds[name] = time.perf_counter() - started


def _expected(calibration: int, tested: int) -> dict[str, float]:
    """The central 95 % beta-binomial interval of the false-alarm rate on unseen normals."""
    low, high = false_alarm_interval(calibration, tested, RATE)
    return {"low": low, "high": high}


def _baselines(data: Path, held_out: Path, out: Path, seed: int) -> dict[str, dict[str, float]]:
    """Image AUROC of what must be beaten, each with its bootstrap interval."""
    found = _intensity_baselines(build_manifest(data), seed)
    untrained = out / "untrained"
    torch.manual_seed(seed)
    fit(
        data,
        detector(encoder()),
        untrained / "model",
        preprocessing=PREPARE,
        calibration=held_out,
        rate=RATE,
        batch_size=4,
        seed=seed,
    )
    random = evaluate(data, str(untrained / "model"), untrained / "results", seed=seed)
    return {**found, "random encoder": random["image_auroc"]}


def _intensity_baselines(manifest: Manifest, seed: int) -> dict[str, dict[str, float]]:
    test = manifest.where(split="test").images
    train = manifest.where(split="train").images
    normal = MeanNormal()
    scores: dict[str, list[float]] = {"maximum intensity": [], "voxelwise z-score": []}
    with progress(len(train) + len(test), "intensity baselines") as bar:
        for item in train:
            normal.add(load_sample(manifest, item).images["image"])
            bar.advance(1)
        for item in test:
            image = load_sample(manifest, item).images["image"]
            scores["maximum intensity"].append(brightest(image))
            scores["voxelwise z-score"].append(normal.score(image))
            bar.advance(1)
    labels = torch.tensor([item.label for item in test])
    groups = [item.group or item.item for item in test]
    return {
        name: bootstrap(
            auroc, torch.tensor(values), labels, groups=groups, repeats=REPEATS, seed=seed
        ).to_dict()
        for name, values in scores.items()
    }


def _tell(result: dict[str, Any], found: dict[str, Any]) -> None:
    rows = [
        ("DINO + PatchCore", *_cells(result["image_auroc"])),
        *((name, *_cells(interval)) for name, interval in result["baselines"].items()),
    ]
    normal, anomalous = found["num_normal"], found["num_anomalous"]
    title = f"Image AUROC on {normal} unseen normals and {anomalous} with lesions"
    table(("method", "image AUROC", "low", "high"), rows, title)
    expected, alarms = result["expected_false_alarms"], result["false_alarm_rate"]["value"]
    say(f"lesion AUPRO (FPR <= 0.3): {_with_interval(result['aupro'])}")
    say(f"lesions found at the threshold: {_with_interval(result['recall'])}")
    say(
        f"false alarms: {alarms:.3f}, asked for {RATE}; {expected['low']:.3f} to "
        f"{expected['high']:.3f} is expected of this many scans"
    )
    say(f"took {result['seconds']['total']:.0f} s")
    for name in ("report", "scores", "maps", "model"):
        say(f"{name}: {result[name]}")


def _cells(interval: dict[str, float]) -> tuple[float, float, float]:
    return interval["value"], interval["low"], interval["high"]


def _with_interval(interval: dict[str, float]) -> str:
    value, low, high = _cells(interval)
    return f"{value:.3f} (95 % {low:.3f} to {high:.3f})"
