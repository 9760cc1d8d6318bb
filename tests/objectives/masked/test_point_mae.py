"""What is hidden stays hidden, the distance is Chamfer's, and the loss teaches something."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from scipy.spatial.distance import cdist
from torch import Tensor

from anomaly.examples import relief_pictures, smooth_pictures
from medssl.data.geometry_steps import Geometry
from medssl.data.image import PointCloud
from medssl.data.manifest import build_manifest, load_sample
from medssl.data.preprocess import Preprocessing
from medssl.data.sample import Sample
from medssl.data.synthetic.point_part import point_part
from medssl.models.folder import load_encoder, load_model
from medssl.models.point_transformer import PointTransformer
from medssl.models.timm_encoder import TimmEncoder
from medssl.objectives.masked.point_mae import CloudViews, PointMAE, chamfer
from medssl.training import TrainingPlan
from pipelines.cli import _parser
from pipelines.pretrain import pretrain

CONFIG = Path("configs/pretrain/point_mae.yaml")


def point_mae(num_points: int = 256, **changes) -> PointMAE:
    torch.manual_seed(0)
    sizes = {"num_groups": 16, "group_size": 16, "width": 48, "depth": 2, "num_heads": 2}
    network = PointTransformer(**sizes, layers=(0, 1), drop_path=0.0)
    small = {"decoder_depth": 1, "decoder_num_heads": 2}
    return PointMAE(network, num_points=num_points, **{**small, **changes})


def parts(count: int = 400) -> list[Sample]:
    kinds = ("gear", "bottle", "egg", "bracket")
    return [point_part(kind, seed, count=count) for seed in range(2) for kind in kinds]


def views_of(objective: PointMAE, samples: list[Sample], seed: int = 0) -> dict[str, Tensor]:
    drawn = [
        objective.views(sample, torch.Generator().manual_seed(1000 * seed + number))
        for number, sample in enumerate(samples)
    ]
    return {name: torch.stack([views[name] for views in drawn]) for name in drawn[0]}


def cloud(points: Tensor, valid: Tensor | None = None) -> Sample:
    return Sample(item="one", points=PointCloud(points=points, unit="mm", valid=valid))


def views(**changes) -> CloudViews:
    plain = {"num_points": 50, "num_groups": 10, "num_hidden": 6}
    return CloudViews(**{**plain, "scale": (1.0, 1.0), "rotation": "none", **changes})


def test_the_distance_is_that_of_all_pairs_in_float64():
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(3, 7, 3, generator=generator)
    second = torch.randn(3, 11, 3, generator=generator)
    found = chamfer(first, second)
    for item in range(3):
        pairs = cdist(first[item].double(), second[item].double(), "sqeuclidean")
        wanted = pairs.min(1).mean() + pairs.min(0).mean()
        assert found[item].item() == pytest.approx(wanted, rel=1e-5)


def test_one_point_away_from_two_has_the_distance_by_hand():
    first = torch.tensor([[[0.0, 0, 0]]])
    second = torch.tensor([[[0.0, 0, 1], [0, 2, 0]]])
    assert chamfer(first, second).item() == pytest.approx(1 + (1 + 4) / 2)
    assert chamfer(second, first).item() == pytest.approx(1 + (1 + 4) / 2)
    assert chamfer(second, second.flip(1)).item() == 0


def test_the_gradient_of_the_distance_is_that_of_all_pairs():
    generator = torch.Generator().manual_seed(1)
    first = torch.randn(2, 5, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    second = torch.randn(2, 6, 3, generator=generator, dtype=torch.float64)
    pairs = (first[:, :, None] - second[:, None]).square().sum(-1)
    (wanted,) = torch.autograd.grad((pairs.amin(2).mean(1) + pairs.amin(1).mean(1)).sum(), first)
    (found,) = torch.autograd.grad(chamfer(first, second).sum(), first)
    torch.testing.assert_close(found, wanted)


def test_no_hidden_group_reaches_the_encoder():
    objective = point_mae()
    drawn = views_of(objective, parts())
    patches, centers = objective.encoder.grouped(drawn["points"])
    hidden = drawn["hidden"]
    tokens = objective.shown_tokens(patches, centers, hidden)
    assert tokens.shape == (8, 16 - 10, 48)
    patches[hidden], centers[hidden] = torch.nan, torch.nan
    assert torch.equal(objective.shown_tokens(patches, centers, hidden), tokens)
    patches[~hidden] *= 1.1
    assert not torch.equal(objective.shown_tokens(patches, centers, hidden), tokens)


def test_the_loss_is_zero_where_the_points_of_the_hidden_groups_are_told():
    objective = point_mae()
    drawn = views_of(objective, parts())
    patches, _ = objective.encoder.grouped(drawn["points"])
    of_hidden = torch.stack(
        [item[which] for item, which in zip(patches, drawn["hidden"], strict=True)]
    )
    objective.told = lambda tokens, centers, hidden: of_hidden
    assert objective.loss(drawn)["loss"].item() == 0
    objective.told = lambda tokens, centers, hidden: of_hidden.roll(1, 1)
    assert objective.loss(drawn)["loss"].item() > 0.001


def test_what_is_told_of_a_group_depends_on_its_center_and_not_on_its_turn():
    objective = point_mae().eval()
    drawn = views_of(objective, parts())
    patches, centers = objective.encoder.grouped(drawn["points"])
    hidden = drawn["hidden"]
    tokens = objective.shown_tokens(patches, centers, hidden)
    told = objective.told(tokens, centers, hidden)
    assert told.shape == (8, 10, 16, 3)
    swapped = centers.clone()
    swapped[hidden] = centers[hidden].view(8, 10, 3).flip(1).flatten(0, 1)
    again = objective.told(tokens, swapped, hidden)
    torch.testing.assert_close(again, told.flip(1), atol=1e-5, rtol=1e-4)
    assert (again - told).abs().max() > 1e-3


def test_after_some_dozen_steps_a_group_is_told_better_than_by_any_one_patch_for_all():
    objective = point_mae(scale=(1.0, 1.0))
    samples = [point_part(kind, 0, count=256) for kind in ("bottle", "bracket")]
    masks = views_of(objective, samples, seed=1000)  # hides other groups than any step
    patches, _ = objective.encoder.grouped(masks["points"])
    true = patches[masks["hidden"]]  # (20, 16, 3)
    one = true.flatten(0, 1)[:: len(true)].clone().requires_grad_()
    constant = descended([one], 0.01, 200, lambda step: chamfer(one.expand_as(true), true).mean())

    def loss(step: int) -> Tensor:
        return objective.loss(views_of(objective, samples, seed=step))["loss"]

    losses = descended(objective.parameters(), 4e-3, 100, loss)
    assert losses[-1] < 0.1 * losses[0]
    assert loss(1000).item() < 0.9 * constant[-1]


def descended(parameters, learning_rate: float, steps: int, loss) -> list[float]:
    """The losses on the way."""
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate)
    found = []
    for step in range(steps):
        now = loss(step)
        optimizer.zero_grad()
        now.backward()
        optimizer.step()
        found.append(now.item())
    return found


def test_a_batch_may_be_split_into_parts_without_another_loss():
    objective = point_mae()
    drawn = views_of(objective, parts())
    halves = [{name: half[n] for name, half in split(drawn).items()} for n in (0, 1)]
    mean = torch.stack([objective.loss(half)["loss"] for half in halves]).mean()
    torch.testing.assert_close(mean, objective.loss(drawn)["loss"])


def split(drawn: dict[str, Tensor]) -> dict[str, tuple[Tensor, ...]]:
    return {name: values.chunk(2) for name, values in drawn.items()}


def test_as_many_groups_are_hidden_in_every_view_and_each_as_often():
    network = PointTransformer(width=12, depth=1, num_heads=2, layers=[0])
    objective = PointMAE(network, decoder_num_heads=2)
    assert objective.views.num_hidden == 38  # 0.6 of 64
    draw = views()
    hidden = torch.stack(
        [
            draw(cloud(torch.randn(60, 3)), torch.Generator().manual_seed(seed))["hidden"]
            for seed in range(1000)
        ]
    )
    assert (hidden.sum(1) == 6).all()
    torch.testing.assert_close(hidden.float().mean(0), torch.full((10,), 0.6), atol=0.06, rtol=0)


def test_a_view_depends_on_the_generator_alone():
    objective = point_mae(rotation="full")
    first, same = (views_of(objective, parts()[:2], seed=4) for _ in range(2))
    other = views_of(objective, parts()[:2], seed=5)
    for name in ("points", "hidden"):
        assert torch.equal(first[name], same[name])
        assert not torch.equal(first[name], other[name])


def test_points_are_drawn_once_each_and_those_that_are_not_valid_never():
    points = torch.arange(80.0)[:, None].expand(80, 3).clone()
    valid = torch.arange(80) >= 20
    points[79] = torch.nan
    drawn = views()(cloud(points, valid), torch.Generator().manual_seed(0))["points"]
    assert drawn.shape == (50, 3)
    gaps = drawn[:, 0].sort().values.diff()
    torch.testing.assert_close(gaps, gaps.round())
    assert gaps.min() > 0.5  # none twice
    assert gaps.sum() <= 58.5  # of 20 to 78


def test_a_small_cloud_gives_every_point_about_equally_often():
    points = torch.arange(20.0)[:, None].expand(20, 3)
    drawn = views()(cloud(points), torch.Generator().manual_seed(0))["points"]
    counts = drawn[:, 0].round(decimals=3).unique(return_counts=True)[1]
    assert len(counts) == 20
    assert set(counts.tolist()) == {2, 3}


@pytest.mark.parametrize("rotation", ["x", "y", "z", "full"])
def test_a_turn_keeps_distances_handedness_and_its_axis(rotation):
    corners = torch.cat([torch.zeros(1, 3), torch.diag(torch.tensor([1.0, 2.0, 3.0]))])
    draw = views(num_points=4, rotation=rotation)
    seen = []
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        turned = draw(cloud(corners), generator)["points"]
        torch.testing.assert_close(turned.mean(0), torch.zeros(3), atol=1e-6, rtol=0)
        lengths = torch.pdist(turned).sort().values
        torch.testing.assert_close(lengths, torch.pdist(corners).sort().values)
        order = torch.randperm(4, generator=torch.Generator().manual_seed(seed)).argsort()
        edges = turned[order][1:] - turned[order][:1]
        assert torch.det(edges).item() == pytest.approx(6, rel=1e-4)  # -6 if mirrored
        seen.append(edges / torch.tensor([[1.0], [2.0], [3.0]]))
    turns = torch.stack(seen).mT  # columns are where the axes go
    assert turns.std(0).max() > 0.4
    if rotation != "full":
        axis = "xyz".index(rotation)
        torch.testing.assert_close(
            turns[:, axis], torch.eye(3)[axis].expand(20, 3), atol=1e-5, rtol=0
        )


def test_full_turns_are_even():
    direction = torch.cat([torch.zeros(1, 3), torch.tensor([[0.0, 0, 1]])])
    draw = views(num_points=2, rotation="full")
    ends = torch.stack(
        [
            draw(cloud(direction), torch.Generator().manual_seed(seed))["points"][0]
            for seed in range(2000)
        ]
    )
    moment = 4 * ends.mT @ ends / len(ends)  # of a unit direction: a third of the identity
    torch.testing.assert_close(moment, torch.eye(3) / 3, atol=0.03, rtol=0)


def test_each_axis_is_stretched_by_a_factor_of_its_own():
    points = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    draw = views(scale=(0.5, 2.0))
    factors = torch.stack(
        [
            draw(cloud(points), torch.Generator().manual_seed(seed))["points"].std(0)
            for seed in range(300)
        ]
    ) / points.std(0)
    assert 0.5 <= factors.min() < 0.6
    assert 1.9 < factors.max() <= 2.0
    assert torch.corrcoef(factors.mT).tril(-1).abs().max() < 0.2


def test_the_organized_points_beside_a_picture_are_a_cloud_too():
    sample = relief_pictures(2)[1]  # misses depth in a patch of 8 x 8
    xyz = sample.images["xyz"]
    count = int(xyz.valid.sum())
    assert count < 64 * 48
    drawn = views(num_points=count)(sample, torch.Generator().manual_seed(0))["points"]
    assert drawn.isfinite().all()
    there = xyz.pixels[:, xyz.valid].mT
    wanted = there - there.mean(0)
    torch.testing.assert_close(
        drawn[:, 2].sort().values, wanted[:, 2].sort().values, atol=1e-3, rtol=0
    )
    torch.testing.assert_close(drawn.std(0), wanted.std(0))


def test_what_has_no_points_is_refused_by_its_item():
    generator = torch.Generator()
    with pytest.raises(ValueError, match="item normal0: expected a cloud or an xyz image"):
        views()(smooth_pictures(1)[0], generator)
    with pytest.raises(ValueError, match="item one: none of its points is valid"):
        views()(cloud(torch.randn(5, 3), torch.zeros(5, dtype=torch.bool)), generator)


def test_settings_that_mean_nothing_are_refused():
    with pytest.raises(ValueError, match="hides 16 of 16 groups"):
        point_mae(mask_ratio=0.99)
    with pytest.raises(ValueError, match="rotation is one of none, x, y, z, full, got 'w'"):
        point_mae(rotation="w")
    with pytest.raises(ValueError, match=r"positive factor, got \(0, 1\)"):
        point_mae(scale=(0, 1))
    with pytest.raises(ValueError, match="in a PointTransformer only, got TimmEncoder"):
        PointMAE(TimmEncoder("test_resnet", in_channels=3))


def write_clouds(folder: Path, count: int = 5) -> Path:
    folder.mkdir()
    for seed in range(count):
        points = point_part("bracket", seed, count=120).points.points
        lines = [" ".join(f"{value:.5f}" for value in row) for row in points.tolist()]
        (folder / f"{seed}.xyz").write_text("\n".join(lines) + "\n")
    return folder


def test_a_folder_of_clouds_becomes_an_encoder_folder(tmp_path: Path):
    data = write_clouds(tmp_path / "data")
    objective = point_mae(num_points=64)
    start = {name: value.clone() for name, value in objective.encoder.state_dict().items()}
    prepared = Preprocessing(geometry=Geometry())
    plan = TrainingPlan(total_samples=8, batch_size=4)
    options = {"preprocessing": prepared, "plan": plan, "device": "cpu", "workers": 0}
    result = pretrain(data, objective, tmp_path / "out", **options)
    assert result["images"] == 5
    assert result["failed"] == 0
    saved = load_model(tmp_path / "out", kind="encoder")
    assert saved.preprocessing == prepared
    assert saved.domain["axes"] == "points"
    loaded = load_encoder(tmp_path / "out")
    assert isinstance(loaded, PointTransformer)
    assert any(not torch.equal(start[name], value) for name, value in loaded.state_dict().items())
    manifest = build_manifest(data)
    samples = [load_sample(manifest, item, hashes=True) for item in manifest.images]
    assert loaded.seen.pixels == {one.subject.provenance["pixel_sha256"] for one in samples}
    points = samples[0].points.points
    wanted = objective.encoder.eval().describe(points, points)
    torch.testing.assert_close(loaded.describe(points, points), wanted)

    further = PointMAE(tmp_path / "out", num_points=64, decoder_num_heads=2)
    other = replace(prepared, geometry=Geometry(plane_distance=1.0))
    with pytest.raises(ValueError, match="pretrain with the encoder's own"):
        pretrain(data, further, tmp_path / "more", **{**options, "preprocessing": other})


def test_the_config_builds_what_it_names():
    given = yaml.safe_load(CONFIG.read_text())
    parser = _parser("pretrain", pretrain)
    values = parser.instantiate(parser.parse_object({**given, "data": ".", "out": "there"}))
    assert isinstance(values.objective, PointMAE)
    settings = yaml.safe_load(CONFIG.read_text())["objective"]["init_args"]
    encoder = settings.pop("encoder")["init_args"]
    for holder, wanted in ((values.objective, settings), (values.objective.encoder, encoder)):
        for name, value in wanted.items():
            found = getattr(holder, name)
            assert (list(found) if isinstance(value, list) else found) == value, name
    assert values.preprocessing.geometry == Geometry()
    first = CONFIG.read_text().partition("\n")[0]
    assert first.startswith(f"# medssl pretrain {CONFIG} --data ")
