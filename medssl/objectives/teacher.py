"""Whether a teacher that a student follows still says different things of different images."""

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from medssl.objectives.losses import entropy

_UNIFORM = 0.97  # of ln K: a healthy run stays below, a uniform teacher above
_CONCENTRATED = 0.1  # of the most the entropy of the mean can be; healthy runs dip to 0.2 early on
_CONSTANT = 0.02  # spread of embeddings of unit length; 1 where they point everywhere evenly


@torch.no_grad()
def teacher_statistics(answers: Tensor, embedding: Tensor) -> dict[str, Tensor]:
    """answers: (R, K) of the teacher; embedding: (R, E). Scalars for `teacher_verdict`."""
    direction = F.normalize(embedding, dim=-1)
    spread = direction.std(0, correction=0).square().sum().sqrt()  # 1 where directions are even
    return {
        "teacher_entropy": entropy(answers).mean(),
        "entropy_of_mean": entropy(answers.mean(0)),
        "teacher_rows": answers.new_tensor(float(len(answers))),
        "feature_spread": spread,
    }


def teacher_verdict(statistics: Mapping[str, float], prototypes: int) -> str | None:
    """What went wrong and what to change, from running means of `teacher_statistics` and "loss".

    "collapsed" where all images get the same answer or embedding; "not learning yet" where the
    teacher is uniform.
    """
    if not statistics:
        return None
    most = math.log(prototypes)
    possible = min(most, math.log(statistics["teacher_rows"]))
    of_mean, loss = statistics["entropy_of_mean"], statistics["loss"]
    if of_mean < _CONCENTRATED * possible:
        return (
            f"collapsed: the teacher gives nearly all images the same {math.exp(of_mean):.1f} "
            f"of {prototypes} prototypes (entropy of its mean answer {of_mean:.2f}, it "
            f"could be {possible:.2f}; loss {loss:.2f}). Check that center_momentum is about "
            "0.9, raise teacher_temperature a little, or lower the learning rate"
        )
    if statistics["feature_spread"] < _CONSTANT:
        return (
            "collapsed: the encoder gives nearly the same embedding to every image (spread "
            f"{statistics['feature_spread']:.3f}, 1 is even). Lower the learning rate and the "
            "weight decay, and check that the images differ"
        )
    if loss > _UNIFORM * most and statistics["teacher_entropy"] > _UNIFORM * most:
        return (
            f"not learning yet: the teacher is uniform (entropy "
            f"{statistics['teacher_entropy']:.2f} and loss {loss:.2f}, ln of {prototypes} "
            f"prototypes is {most:.2f}). On few images use 64 to 256 prototypes, momentum 0.95 "
            "to 0.99, learning rate 2e-3 and teacher_temperature 0.04, and train longer"
        )
    return None
