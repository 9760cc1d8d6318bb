"""DINOv2: its terms against lightly's, its groups, and that it learns from hidden patches."""

import math
from pathlib import Path

import pytest
import torch
from lightly.loss import DINOLoss, IBOTPatchLoss, KoLeoLoss

from medssl.data.synthetic.shapes import shape_samples
from medssl.models.timm_encoder import TimmEncoder
from medssl.models.vit import ViTEncoder
from medssl.objectives.masked.dinov2 import DINOv2
from medssl.training import Clock, TrainingPlan, train


def objective(**changes) -> DINOv2:
    torch.manual_seed(0)
    settings = {
        "prototypes": 16,
        "hidden_dim": 32,
        "bottleneck_dim": 16,
        "momentum": 0.9,
        "global_size": 48,
        "local_crops": 2,
        "local_size": 32,
    }
    return DINOv2(ViTEncoder("test_vit", image_size=48), **{**settings, **changes})


def batch(method: DINOv2, count: int = 6) -> dict[str, torch.Tensor]:
    samples = shape_samples(count, seed=3)
    rows = [method.views(s, torch.Generator().manual_seed(n)) for n, s in enumerate(samples)]
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def test_the_terms_are_lightlys_with_centring():
    method = objective(balance="centring").eval()
    views = batch(method)
    found = method.loss(views)
    both = [views["global"][:, view] for view in (0, 1)]
    hidden = method._masks(6, (48, 48))
    with torch.no_grad():
        teacher = [method.teacher_head(method.teacher(view)) for view in both]
        own = [method.encoder.tokens(v, h) for v, h in zip(both, hidden.chunk(2), strict=True)]
        small = [views["local"][:, view] for view in (0, 1)]
        student = [method.head(token) for token, _ in own]
        student += [method.head(method.encoder(view)) for view in small]
        wanted = DINOLoss(output_dim=16)(teacher, student)
        patches = torch.cat([method.teacher.tokens(view)[1] for view in both])[hidden]
        seen = torch.cat([patches for _, patches in own])[hidden]
        side = math.isqrt(hidden.shape[1])
        of_patches = IBOTPatchLoss(output_dim=16)(
            method.teacher_patch_head(patches),
            method.patch_head(seen),
            hidden.unflatten(1, (side, side)),
        )
        spread = sum(KoLeoLoss()(token) for token, _ in own) / 2
    partly = hidden.any(1).sum() / len(hidden)  # lightly counts the whole crops as well
    torch.testing.assert_close(found["class_loss"], wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found["patch_loss"], of_patches / partly, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found["koleo"], spread, rtol=1e-4, atol=1e-4)
    total = found["class_loss"] + found["patch_loss"] + 0.1 * found["koleo"]
    torch.testing.assert_close(found["loss"], total)


def test_weights_of_the_terms_count():
    views = batch(objective())
    found = objective(patch_weight=0.0, koleo_weight=0.0).eval().loss(views)
    torch.testing.assert_close(found["loss"], found["class_loss"])


def test_half_of_the_large_crops_hide_something_and_every_step_something_else():
    method = objective()
    first = method._masks(6, (48, 48))
    assert int(first.any(1).sum()) == 6
    method.after_step(Clock(samples_seen=6, total_samples=60, step=1))
    assert not torch.equal(method._masks(6, (48, 48)), first)


def test_centres_follow_the_teachers_mean_logits_and_sinkhorn_needs_none():
    centring, balanced = objective(balance="centring"), objective()
    clock = Clock(samples_seen=6, total_samples=60, step=1)
    for method in (centring, balanced):
        method.loss(batch(method))
        method.after_step(clock)
    assert centring.center.any()
    assert centring.patch_center.any()
    assert not balanced.center.any()


def test_earlier_blocks_learn_slower_and_each_parameter_is_in_one_group():
    method = objective(layer_decay=0.5, frozen_encoder=0.1)
    groups = method.parameter_groups()
    rate = {id(p): group.get("rate", 1.0) for group in groups for p in group["params"]}
    network = method.encoder.network
    assert rate[id(network.blocks[5].attn.qkv.weight)] == 0.5
    assert rate[id(network.blocks[0].attn.qkv.weight)] == 0.5**6
    assert rate[id(network.patch_embed.proj.weight)] == 0.5**7
    assert rate[id(method.encoder.mask_token)] == 0.5**7
    assert rate[id(network.norm.weight)] == 1.0
    assert rate[id(method.head.projector[0].weight)] == 1.0
    frozen = {id(p): group.get("frozen_until", 0) for group in groups for p in group["params"]}
    assert frozen[id(network.blocks[5].attn.qkv.weight)] == 0.1
    assert frozen[id(method.head.projector[0].weight)] == 0
    everything = [p for p in method.parameters() if p.requires_grad]
    assert len(rate) == len(everything) == sum(len(group["params"]) for group in groups)


def test_a_frozen_encoder_waits_while_the_heads_warm_up(tmp_path: Path):
    method = objective(frozen_encoder=0.5)
    block = method.encoder.network.blocks[0].attn.qkv.weight
    start, seen = block.detach().clone(), []
    plan = TrainingPlan(total_samples=32, batch_size=8)
    train(
        method,
        shape_samples(8, seed=1),
        plan,
        workdir=tmp_path,
        device="cpu",
        workers=0,
        on_step=lambda report: seen.append(torch.equal(block, start)),
    )
    assert seen == [True, True, False, False]


def test_hidden_patches_are_predicted_better_with_training(tmp_path: Path):
    method = objective(koleo_weight=0.0)
    losses = []
    plan = TrainingPlan(
        total_samples=16 * 60, batch_size=16, learning_rate=1e-3, weight_decay=(0.0, 0.0)
    )
    result = train(
        method,
        shape_samples(16, seed=1),
        plan,
        workdir=tmp_path,
        device="cpu",
        workers=0,
        on_step=lambda report: losses.append(report.loss),
    )
    assert sum(losses[-10:]) < sum(losses[:10])
    assert not (result["verdict"] or "").startswith("collapsed")


def test_arguments_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="the teacher must be at least as sharp"):
        objective(teacher_temperature=0.2)
    with pytest.raises(ValueError, match="hidden_ratio is"):
        objective(hidden_ratio=(0.5, 0.1))
    with pytest.raises(ValueError, match="vision transformer only: give a"):
        DINOv2(TimmEncoder("test_resnet", in_channels=1))  # type: ignore[arg-type]
