"""Classes by their names alone: an image belongs to the words it lies nearest to."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from medssl.models.text import SharedSpace


@torch.no_grad()
def zero_shot(
    images: Tensor,
    prompts: Sequence[Sequence[str]],
    space: SharedSpace,
    *,
    temperature: float = 0.1,
) -> Tensor:
    """Probabilities of the classes for images in the shared space.

    Each class lies at the mean direction of its prompts (CLIP, https://arxiv.org/abs/2103.00020,
    sec. 3.1.4). Prompts choose what counts as a class: fix them before looking at results.

    images: (S, d) unit vectors, `space.images(embeddings)`. prompts: of each class one or more.
    temperature: of the training. Returns (S, K), rows sum to 1.
    """
    if not prompts or not all(prompts):
        raise ValueError("every class needs at least one prompt")
    training = space.training
    space.eval()
    classes = torch.stack([F.normalize(space.sentences(of).mean(0), dim=-1) for of in prompts])
    space.train(training)
    return F.softmax(images @ classes.mT / temperature, dim=-1)
