"""Small networks that describe patches, for scoring a picture in milliseconds.

After the patch description network and the autoencoder of EfficientAD (Batzner et al., WACV 2024,
https://arxiv.org/abs/2303.14535, sec. 3.1 and 3.3), which take thirty times the arithmetic.
"""

import torch.nn.functional as F
from torch import Tensor, nn

_LATENT_GRID = 8  # cells of the autoencoder's last map, in both directions


class PatchNetwork(nn.Module):
    """Features of the patches of 26 x 26 pixels around the middle of each 4 x 4 cell.

    in_channels: of the pictures. features: channels it gives. width: channels inside.
    Differs from the paper: it strides where the paper's pools, so that only the first convolution
    works on more than a quarter of the rows and columns; 64 channels inside, not 256; two
    convolutions of 3 x 3 and one of 1 x 1 where the paper has one of 3 x 3 and one of 4 x 4; it
    pads with zeros. At 256 pixels it takes 0.5 billion multiplications.
    """

    def __init__(self, in_channels: int, features: int, *, width: int = 64) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(in_channels, width // 2, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(width // 2, width, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, features, 1),
        )
        self.apply(_initialize)

    def forward(self, images: Tensor) -> Tensor:
        """images: (B, C, H, W). Returns (B, features, H // 4, W // 4)."""
        return self.layers(images)


class SmallAutoencoder(nn.Module):
    """Features of a whole picture, through one vector of 64 numbers that has no place.

    in_channels: of the pictures. features: channels it gives. width: channels inside.
    dropout: of the decoder, while it learns.
    Differs from the paper: the encoder's last map is averaged to 8 x 8 cells, so that pictures may
    have any size; three steps of the decoder instead of seven.
    """

    def __init__(
        self,
        in_channels: int,
        features: int,
        *,
        width: int = 64,
        latent: int = 64,
        dropout: float = 0.2,
    ) -> None:
        super().__init__()
        half = width // 2
        self.encoder = nn.Sequential(
            nn.Conv2d(in_channels, half, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(half, half, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(half, width, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(_LATENT_GRID),
            nn.Conv2d(width, latent, _LATENT_GRID),  # all cells at once
        )
        self.start = nn.ConvTranspose2d(latent, width, _LATENT_GRID)
        self.steps = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(2))
        self.out = nn.Conv2d(width, features, 3, padding=1)
        self.dropout = nn.Dropout(dropout)
        self.apply(_initialize)

    def forward(self, images: Tensor) -> Tensor:
        """images: (B, C, H, W). Returns (B, features, H // 4, W // 4)."""
        h, w = images.shape[2] // 4, images.shape[3] // 4
        found = F.relu(self.start(self.encoder(images)))
        for step, part in zip(self.steps, (4, 2), strict=True):
            found = _resized(found, (-(-h // part), -(-w // part)))
            found = self.dropout(F.relu(step(found)))
        return _resized(self.out(found), (h, w))


def _initialize(module: nn.Module) -> None:
    """He's, which keeps the spread of what passes rectifiers; torch's own lets it fade."""
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
        nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        assert module.bias is not None
        nn.init.zeros_(module.bias)


def _resized(maps: Tensor, grid: tuple[int, int]) -> Tensor:
    return F.interpolate(maps, grid, mode="bilinear", align_corners=False)
