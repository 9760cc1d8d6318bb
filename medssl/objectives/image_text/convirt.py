"""ConVIRT (Zhang et al., MLHC 2022, https://arxiv.org/abs/2010.00747)."""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medssl.data.augment import Augmentation
from medssl.data.boxes import MultiBox
from medssl.data.sample import Sample
from medssl.data.sentences import sentences, wording
from medssl.data.synthetic.shapes import shape_samples
from medssl.data.views import Crops, MultiCrop
from medssl.distributed import processes
from medssl.models.encoder import Encoder
from medssl.models.folder import load_encoder
from medssl.models.hf_text import HFTextEncoder
from medssl.models.text import SharedSpace, TextEncoder, Vocabulary
from medssl.objectives.base import Objective
from medssl.objectives.losses import info_nce
from medssl.training import Unit, split_by_decay

_AUGMENTATION = Augmentation()
_UNIFORM = 0.97  # of the loss of guessing
_CONSTANT = 0.02  # spread of unit vectors; 1 where they point everywhere evenly


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageAndSentence:
    """One crop of an image and one sentence of its report, drawn evenly.

    length: tokens of a sentence.
    """

    crop: MultiCrop | MultiBox
    length: int
    vocabulary: Vocabulary | None = field(default=None, repr=False)

    def __call__(self, sample: Sample, generator: torch.Generator) -> dict[str, Tensor]:
        """Returns "image" (C, H, W) or (C, D, H, W), "tokens" (L,) int64 and "wording" () int64."""
        found = sentences(sample.report or "")
        if not found:
            raise ValueError(f"item {sample.item} has no report; select only images with one")
        if self.vocabulary is None:
            raise RuntimeError("no vocabulary yet; call prepare(samples) first")
        sentence = found[int(torch.randint(len(found), (1,), generator=generator))]
        return {
            "image": self.crop(sample, generator)["global"][0],
            "tokens": self.vocabulary.encode(sentence, self.length),
            "wording": torch.tensor(wording(sentence)),
        }


class ConVIRT(Objective):
    """An image finds the sentence that was written of it among those of others, and the reverse.

    encoder: the image network to train, or an encoder folder to go on from.
    text: the text network: small, and its vocabulary learnt from the reports, or a
        `medssl.models.hf_text.HFTextEncoder` that goes on from a local checkpoint with its lower
        layers frozen, as the paper does.
    dim: d of the shared space.
    temperature: tau of eq. 2; smaller looks more at the hardest negatives.
    weight: lambda of eq. 4, of image -> text; the rest is text -> image.
    spare_same_wording: do not hold a sentence against an image of which another report says the
        same, word for word ("No acute finding."). Items of one patient are never held against each
        other.
    one_per: what a batch holds at most one of; with "study" a step sees one view of each study.
    size, scale, flip: of the crop.
    augmentation: changes of exposure, contrast, sharpness and noise.
    crop: the view of the image itself, instead of what the arguments from size on describe: the
        first large crop of a `medssl.data.views.MultiCrop` or, where the encoder takes volumes, of
        a `medssl.data.boxes.MultiBox`.

    Differs from the paper: images are not mirrored by default, because reports speak of left and
    right, nor turned or shifted beyond what a crop does; sentences that are the same are no
    negatives; the text network is small and learnt from the reports alone, where the paper goes on
    from ClinicalBERT and trains its upper half; AdamW.
    """

    def __init__(
        self,
        encoder: Encoder | Path,
        *,
        text: TextEncoder | HFTextEncoder | None = None,
        dim: int = 512,
        temperature: float = 0.1,
        weight: float = 0.75,
        spare_same_wording: bool = True,
        one_per: Unit = "study",
        size: int = 224,
        scale: tuple[float, float] = (0.6, 1.0),
        flip: float = 0.0,
        augmentation: Augmentation = _AUGMENTATION,
        crop: MultiCrop | MultiBox | None = None,
    ) -> None:
        super().__init__()
        if temperature <= 0 or not 0 <= weight <= 1:
            raise ValueError(
                f"temperature is above 0 and weight within [0, 1], got {temperature} and {weight}"
            )
        self.dim, self.temperature, self.weight = dim, temperature, weight
        self.spare_same_wording, self.one_per = spare_same_wording, one_per
        self.size, self.scale, self.flip = size, scale, flip
        self.augmentation = augmentation
        self.encoder = load_encoder(encoder) if isinstance(encoder, Path) else encoder
        self.encoder.requires_grad_(True)
        text = TextEncoder() if text is None else text
        self.space = SharedSpace(text, embedding_dim=self.encoder.embedding_dim, dim=dim)
        self.vocabulary_sha256 = ""
        self.crop: MultiCrop | MultiBox = crop or MultiCrop(
            large=Crops(count=1, size=size, scale=scale, flip=flip),
            small=Crops(count=0, size=1, scale=scale),
            augmentation=augmentation,
        )
        self.views: ImageAndSentence = ImageAndSentence(crop=self.crop, length=text.length)

    @property
    def text(self) -> TextEncoder | HFTextEncoder:
        """The text network."""
        return self.space.text

    def prepare(self, samples: Sequence[Sample]) -> None:
        """Learn the vocabulary of the reports. Raises ValueError where an image has none."""
        reports = [sample.report or "" for sample in samples]
        missing = sum(not sentences(report) for report in reports)
        if missing:
            raise ValueError(
                f"{missing} of {len(reports)} images have no report; give a table reports.csv with "
                "the columns path and text, or select only images with a report"
            )
        vocabulary = self.text.learn(reports)
        self.vocabulary_sha256 = hashlib.sha256(vocabulary.described.encode()).hexdigest()
        self.views = replace(self.views, vocabulary=vocabulary)

    def loss(self, views: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """views: "image" (B, C, H, W), "tokens" (B, L), "wording" and "group" (B,); eq. 2 to 4.

        Returns "loss", both of its parts, and what the collapse watch reads; "found" is the share
        of images whose own sentence is the most similar of this process's.
        """
        images = self.space.images(self.encoder(views["image"])).float()
        texts = self.space.tokens(views["tokens"]).float()
        same = [views["group"]]
        if self.spare_same_wording:
            same.append(views["wording"])
        found, asked = info_nce(
            images, texts, temperature=self.temperature, same=torch.stack(same, dim=1)
        )
        own = torch.arange(len(images), device=images.device)
        return {
            "loss": self.weight * found + (1 - self.weight) * asked,
            "image_to_text": found.detach(),
            "text_to_image": asked.detach(),
            "found": ((images @ texts.mT).argmax(1) == own).float().mean(),
            "guessing": images.new_tensor(math.log(len(images) * processes())),
            "feature_spread": torch.minimum(_spread(images), _spread(texts)).detach(),
        }

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Both networks and their projections."""
        return split_by_decay(self.encoder, self.space)

    def collapsed(self, statistics: Mapping[str, float]) -> str | None:
        """Names networks that give everything the same place, or that only guess."""
        if not statistics:
            return None
        if statistics["feature_spread"] < _CONSTANT:
            return (
                "collapsed: all images or all sentences have nearly the same place (spread "
                f"{statistics['feature_spread']:.3f}, 1 is even). Lower the learning rate, and "
                "check that the reports differ"
            )
        if statistics["loss"] > _UNIFORM * statistics["guessing"]:
            return (
                f"not learning yet: the loss is {statistics['loss']:.2f} and that of guessing "
                f"{statistics['guessing']:.2f}. Check that every report belongs to its image, "
                "train longer, or raise the learning rate"
            )
        return None

    def export(self) -> dict[str, nn.Module]:
        """The image network, and the shared space with the text network."""
        return {"image": self.encoder, "text": self.space}

    @classmethod
    def example(cls) -> tuple[Self, list[Sample]]:
        """Two tiny networks, and shapes with a report of each."""
        from medssl.models.timm_encoder import TimmEncoder

        text = TextEncoder(vocabulary_size=300, width=16, depth=1, heads=2, length=16)
        encoder = TimmEncoder("test_convnext", in_channels=1)
        return cls(encoder, text=text, dim=8, size=32), shape_samples(8, seed=1)


@torch.no_grad()
def _spread(directions: Tensor) -> Tensor:
    """1 where unit vectors (B, d) point everywhere evenly, 0 where all are the same."""
    return F.normalize(directions, dim=-1).std(0, correction=0).square().sum().sqrt()
