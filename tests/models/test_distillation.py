import pytest
import torch

from medssl.models.distillation import ReverseStudent


def maps_of(shapes: list[tuple[int, ...]], count: int = 2) -> list[torch.Tensor]:
    return [torch.randn(count, *shape) for shape in shapes]


@pytest.mark.parametrize(
    "shapes",
    [
        [(4, 16, 12), (6, 8, 6), (10, 4, 3)],
        [(4, 15, 11), (6, 8, 6), (10, 4, 3)],  # odd sides
        [(8, 6, 6), (8, 6, 6)],  # blocks of a transformer
        [(4, 16, 16), (6, 4, 4)],  # a stride of 4
        [(4, 8, 16, 16), (6, 8, 8, 8), (6, 4, 4, 4)],  # thick slices
    ],
)
def test_it_gives_maps_of_the_shapes_it_was_shown(shapes):
    shown = maps_of(shapes)
    given = ReverseStudent(shapes)(shown)
    assert [one.shape for one in given] == [one.shape for one in shown]


def test_it_takes_pictures_of_another_size():
    student = ReverseStudent([(4, 16, 16), (6, 8, 8)])
    shown = maps_of([(4, 20, 12), (6, 10, 6)])
    assert [one.shape for one in student(shown)] == [one.shape for one in shown]


def test_all_maps_are_decoded_from_the_embedding_only():
    student = ReverseStudent([(4, 16, 16), (6, 8, 8)], width=3).eval()
    seen = []
    student.embed.register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    student.embed.register_forward_hook(lambda module, inputs, output: torch.zeros_like(output))
    first, second = (student(maps_of([(4, 16, 16), (6, 8, 8)])) for _ in range(2))
    assert seen[0] == (2, 3, 4, 4)  # half of the deepest grid
    assert all(one.equal(other) for one, other in zip(first, second, strict=True))


def test_every_map_reaches_every_answer():
    shapes = [(4, 16, 16), (6, 8, 8), (8, 4, 4)]
    student = ReverseStudent(shapes)
    shown = [one.requires_grad_() for one in maps_of(shapes, count=4)]
    for answer in student(shown):
        gradients = torch.autograd.grad(answer.square().sum(), shown, retain_graph=True)
        assert all(gradient.any() for gradient in gradients)


def test_layers_from_coarse_to_fine_are_refused():
    with pytest.raises(ValueError, match="from fine to coarse"):
        ReverseStudent([(6, 8, 8), (4, 16, 16)])
