"""Unlabelled images or point clouds -> an encoder folder."""

import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, cast

from torch.utils.data import Subset

from medssl.data.cache import DecodedCache
from medssl.data.dataset import PreparedSamples
from medssl.data.domain import domain_of
from medssl.data.manifest import Item, Manifest, NoDataError, build_manifest
from medssl.data.preprocess import Preprocessing
from medssl.data.readers.errors import ReadError
from medssl.data.sample import Sample
from medssl.data.seen import Seen
from medssl.distributed import rank
from medssl.models.encoder import Encoder, seen_by_encoders
from medssl.models.folder import save_model, selftest_noise
from medssl.objectives.base import Objective
from medssl.training import Report, TrainingPlan, train
from pipelines.console import Progress, progress, say
from pipelines.record import Run, recorded


def pretrain(
    data: Path,
    objective: Objective,
    out: Path,
    *,
    preprocessing: Preprocessing,
    plan: TrainingPlan,
    groups: str | None = None,
    select: str | None = None,
    max_train: int | None = None,
    resume: bool = False,
    seed: int = 0,
    device: str = "auto",
    precision: Literal["auto", "fp32", "bf16"] = "auto",
    workers: int | None = None,
    compiled: bool = False,
    sharded: bool = False,
    cache: Path | None = None,
) -> dict[str, Any]:
    """Pretrain an encoder on unlabelled images or clouds and save it as an encoder folder.

    Every image or cloud that is not of the split "test" is used; labels are not looked at.
    Checkpoints lie in OUT.work until the encoder is saved. On several GPUs: torchrun
    --nproc-per-node 4 --no-python medssl pretrain ...; the batch is shared among them.

    Args:
        data: a folder, a file, or a manifest.
        objective: the method, with the encoder that it trains.
        out: the encoder folder; must not exist, unless with --resume.
        preprocessing: what every image or cloud goes through; saved with the encoder.
        plan: how long and how fast, in samples seen.
        groups: FILE:COLUMN that names the patient or part of each picture.
        select: an expression over manifest columns; only these images are used.
        max_train: use at most this many images, drawn by the seed.
        resume: go on from the last checkpoint where there is one, with the result of an
            undisturbed run; does nothing where OUT is finished.
        seed: seeds initialization, order, views and sampling.
        device: auto, cpu or cuda.
        precision: auto, fp32 or bf16; auto is bf16 on a GPU that has it.
        workers: processes that make views; the result does not depend on them. Auto by default.
        compiled: let torch.compile make the networks faster; the first steps take minutes longer.
        sharded: share weights, gradients and optimizer state out among the GPUs (FSDP), for
            networks that one of them cannot hold.
        cache: a folder for prepared images, which later epochs and later runs map into memory
            instead of decoding them again; it holds pixels, and at most 64 GiB.
    """
    arguments = locals()
    if out.exists() and resume:
        say(f"{out} is finished; nothing to do")
        return {"encoder": out, "finished": True, "failed": 0}
    _check_encoder(objective, preprocessing)
    if rank() == 0:
        _check_free(out, resume)
    manifest, items = _chosen(data, groups, select, max_train, seed)
    kept = None if cache is None else DecodedCache(cache)
    samples = PreparedSamples(manifest, items, preprocessing, hashes=True, cache=kept)
    options = {
        "resume": resume,
        "device": device,
        "precision": precision,
        "workers": workers,
        "compiled": compiled,
        "sharded": sharded,
        "seed": seed,
        "identity": {"data": manifest.digest, "preprocessing": str(preprocessing)},
    }
    if rank() > 0:  # the first process checks, tells, writes and saves
        _, _, result = _trained(objective, samples, plan, _work_name(out), options)
        return {"encoder": None, "finished": result["finished"], "failed": 0}
    work = _work_folder(out)
    with recorded("pretrain", arguments) as run:
        run.manifest(manifest)
        rows, domain, result = _trained(objective, samples, plan, work, options)
        failed = len(items) - len(rows)
        result |= {"images": len(rows), "encoder": None, "failed": failed}
        _tell(run, result)
        if result["finished"]:
            card = _card(objective, plan, manifest, result)
            seen = Seen.of((items[row] for row in rows), samples.pixel_hashes)
            seen |= seen_by_encoders(objective)
            result["encoder"] = _save(out, objective, preprocessing, domain, card, seen)
            run.artifact(out)
            shutil.rmtree(work)
    return result if result["finished"] else {**result, "failed": failed + 1}


def _trained(
    objective: Objective,
    samples: PreparedSamples,
    plan: TrainingPlan,
    work: Path,
    options: dict[str, Any],
) -> tuple[list[int], dict[str, Any], dict[str, Any]]:
    """The rows trained on, their domain, and what the training says."""
    rows, domain = _readable(samples)
    with progress(plan.clock(plan.steps).total_samples, "pretraining") as bar:
        result = train(
            objective,
            cast(Sequence[Sample], Subset(cast(Any, samples), rows)),
            plan,
            workdir=work,
            on_step=_show(bar),
            **options,
        )
    return rows, domain, result


def _save(
    out: Path,
    objective: Objective,
    preprocessing: Preprocessing,
    domain: dict[str, Any],
    card: str,
    seen: Seen,
) -> Path:
    """The encoder folder, with further networks in folders of their own inside; whole or not at
    all."""
    networks = {name: network.cpu() for name, network in objective.export().items()}
    encoder = networks.pop("points" if "points" in networks else "image")
    assert isinstance(encoder, Encoder)
    encoder.preprocessing = preprocessing
    same: dict[str, Any] = {"preprocessing": preprocessing, "domain": domain, "card": card}
    whole = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent)) / "encoder"
    try:
        size = preprocessing.picture_size if encoder.axes != "points" else ()
        noise = selftest_noise(encoder.selftest_shape(size))
        files = {"seen.json": seen.to_dict()}
        save_model(whole, encoder, kind="encoder", noise=noise, files=files, **same)
        for name, network in networks.items():
            noise = selftest_noise((2, encoder.embedding_dim))
            save_model(whole / name, network, kind="text", noise=noise, **same)
        whole.rename(out)
    finally:
        shutil.rmtree(whole.parent)
    return out


def _tell(run: Run, result: dict[str, Any]) -> None:
    """The closing lines, on the record too."""
    names = ("samples_per_second", "waiting_share", "peak_memory_gib")
    speed = {name: result[name] for name in names}
    run.metrics({**speed, **result["statistics"]})
    run.tags({"verdict": result["verdict"] or "healthy"})
    say(
        f"{speed['samples_per_second']:.0f} samples/s, {speed['waiting_share']:.0%} of the time "
        f"waiting for data, {speed['peak_memory_gib']:.1f} GiB at most"
    )
    if not result["finished"]:
        say("stopped as asked, and saved; --resume goes on from here")
    elif result["verdict"] is not None:
        say(f"warning: {result['verdict']}")


def _check_free(out: Path, resume: bool) -> None:
    work = _work_name(out)
    if out.exists():
        raise ValueError(f"{out} exists; choose another folder or remove it first")
    if work.exists() and not resume:
        raise ValueError(
            f"{work} holds an unfinished run; go on with --resume, or remove it to start anew"
        )


def _work_name(out: Path) -> Path:
    return out.with_name(f"{out.name}.work")


def _work_folder(out: Path) -> Path:
    """The folder of the checkpoints, made and tried."""
    work = _work_name(out)
    try:
        work.mkdir(parents=True, exist_ok=True)
        (work / "trial").touch()
        (work / "trial").unlink()
    except OSError as error:
        raise ValueError(
            f"cannot write to {work} ({error.strerror}); choose another place for --out"
        ) from error
    return work


def _check_encoder(objective: Objective, preprocessing: Preprocessing) -> None:
    """An encoder that was trained before knows its preprocessing, and it must not change."""
    exported = objective.export()
    known = getattr(exported.get("points", exported.get("image")), "preprocessing", None)
    if known is not None and known != preprocessing:
        raise ValueError(
            f"the encoder was trained with {known} and this run asks for {preprocessing}; "
            "pretrain with the encoder's own"
        )


def _chosen(
    data: Path, groups: str | None, select: str | None, max_train: int | None, seed: int
) -> tuple[Manifest, list[Item]]:
    """The manifest of what may be used, and the images to train on."""
    import torch

    manifest = build_manifest(data, groups=groups)
    if select is not None:
        manifest = manifest.select(select)
    items = [item for item in manifest.images if item.split != "test"]
    if not items:
        raise NoDataError(
            f"no image left to train on: {len(manifest.images)} images are selected, all of the "
            "split 'test'; give training images, or change --select"
        )
    if max_train is not None:
        order = torch.randperm(len(items), generator=torch.Generator().manual_seed(seed))
        items = [items[i] for i in sorted(order[:max_train].tolist())]
    return manifest, items


def _readable(samples: PreparedSamples) -> tuple[list[int], dict[str, Any]]:
    """The rows that can be read, and their domain; every other one is named."""
    rows: list[int] = []
    raw: list[Sample] = []

    def read() -> Iterator[Sample]:
        for row in range(len(samples)):
            bar.advance(1)
            try:
                samples[row]
            except ReadError as error:  # names its item
                say(f"left out: {error}")
            except ValueError as error:
                say(f"left out: item {samples.items[row].item}: {error}")
            else:
                rows.append(row)
                yield raw[-1]
            raw.clear()

    samples.on_read = raw.append
    with progress(len(samples), "reading") as bar:
        try:
            domain = domain_of(read())
        except ValueError:
            if not rows:
                raise NoDataError(f"none of the {len(samples)} images can be read") from None
            raise
    samples.on_read = None  # what did not fit into memory is read again, and not watched
    samples.hashes = False
    return rows, domain


def _show(bar: Progress) -> Callable[[Report], None]:
    """Moves the bar, and says each kind of warning once."""
    warned: set[str] = set()
    shown = 0

    def show(report: Report) -> None:
        nonlocal shown  # a resumed training begins in the middle of the bar
        bar.advance(report.clock.samples_seen - shown, f"loss {report.loss:.3f}")
        shown = report.clock.samples_seen
        kind = (report.warning or "").partition(":")[0]
        if kind and kind not in warned:
            warned.add(kind)
            say(f"warning: {report.warning}")

    return show


def _card(
    objective: Objective, plan: TrainingPlan, manifest: Manifest, result: dict[str, Any]
) -> str:
    statistics = "\n".join(f"- {name}: {value:.4g}" for name, value in result["statistics"].items())
    return (
        f"# Encoder pretrained with {type(objective).__name__}\n\n"
        f"{result['images']} images or clouds (manifest {manifest.digest}), "
        f"{plan.total_samples} samples seen, no label used.\n\n"
        f"Collapse watch: {result['verdict'] or 'healthy'}\n\n"
        f"Running means at the end:\n\n{statistics}\n"
    )
