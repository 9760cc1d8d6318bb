"""Sentences to embeddings, with a vocabulary learnt from the corpus: nothing is downloaded."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from medssl.models.hf_text import HFTextEncoder

PADDING = 0
_BYTES = 257  # the padding and every byte


class Vocabulary:
    """Byte-pair encoding (Sennrich et al., ACL 2016) over bytes, so that no text is unknown.

    described: the vocabulary as JSON, in the format of the tokenizers library.
    """

    def __init__(self, described: str) -> None:
        from tokenizers import Tokenizer

        self.described = described
        self._tokenizer = Tokenizer.from_str(described)

    @classmethod
    def learn(cls, texts: Iterable[str], *, size: int) -> Self:
        """Merge the most frequent pairs of the texts, in lower case, until there are `size` tokens.

        The same texts give the same vocabulary.
        """
        from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

        if size < _BYTES:
            raise ValueError(f"a vocabulary has at least {_BYTES} tokens, got {size}")
        tokenizer = Tokenizer(models.BPE())
        tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        trainer = trainers.BpeTrainer(
            vocab_size=size,
            special_tokens=["[PAD]"],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        tokenizer.train_from_iterator(sorted(texts), trainer)
        return cls(tokenizer.to_str())

    def __len__(self) -> int:
        return self._tokenizer.get_vocab_size()

    def encode(self, text: str, length: int) -> Tensor:
        """The first `length` tokens, filled up with `PADDING`: (length,) int64."""
        found = self._tokenizer.encode(text).ids[:length]
        return torch.tensor(found + [PADDING] * (length - len(found)))

    def __reduce__(self) -> Any:
        return type(self), (self.described,)

    def __repr__(self) -> str:
        return f"Vocabulary({len(self)} tokens)"


class TextEncoder(nn.Module):
    """A small transformer over tokens, and the maximum over its outputs.

    vocabulary_size: most tokens of the vocabulary, which `learn` fills.
    width: E, of the embedding. depth, heads: of the transformer.
    length: tokens of a sentence; what is longer is cut.
    dropout: in training.
    """

    def __init__(
        self,
        *,
        vocabulary_size: int = 4096,
        width: int = 256,
        depth: int = 4,
        heads: int = 4,
        length: int = 64,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.vocabulary_size = vocabulary_size
        self.width, self.depth, self.heads = width, depth, heads
        self.length, self.dropout = length, dropout
        self.vocabulary: Vocabulary | None = None
        self.tokens = nn.Embedding(vocabulary_size, width, padding_idx=PADDING)
        self.places = nn.Parameter(torch.empty(length, width))
        nn.init.normal_(self.tokens.weight, std=0.02)
        nn.init.normal_(self.places, std=0.02)
        layer = nn.TransformerEncoderLayer(
            width,
            heads,
            4 * width,
            dropout=dropout,
            activation="gelu",
            batch_first=True,
            norm_first=True,
        )
        self.blocks = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(width)

    def learn(self, texts: Iterable[str]) -> Vocabulary:
        """Make the vocabulary from texts; call before the first sentence."""
        self.vocabulary = Vocabulary.learn(texts, size=self.vocabulary_size)
        return self.vocabulary

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens: (B, L) int64. Returns the embedding (B, E)."""
        padding = tokens == PADDING
        padding[:, 0] = False  # an empty sentence attends to one place at least
        embedded = self.tokens(tokens) + self.places[: tokens.shape[1]]
        found = self.norm(self.blocks(embedded, src_key_padding_mask=padding))
        return found.masked_fill(padding[..., None], -torch.inf).amax(1)

    def encode(self, texts: Sequence[str]) -> Tensor:
        """Tokens (B, L) of sentences. Raises RuntimeError before `learn`."""
        if self.vocabulary is None:
            raise RuntimeError("the text encoder has no vocabulary yet; call learn(texts) first")
        return torch.stack([self.vocabulary.encode(text, self.length) for text in texts])

    def get_extra_state(self) -> dict[str, str | None]:
        """The vocabulary, which is no tensor."""
        return {"vocabulary": None if self.vocabulary is None else self.vocabulary.described}

    def set_extra_state(self, state: dict[str, str | None]) -> None:
        """Take the vocabulary of `get_extra_state`."""
        described = state["vocabulary"]
        self.vocabulary = None if described is None else Vocabulary(described)


class SharedSpace(nn.Module):
    """Where images and sentences meet: a projection of each side to the unit sphere.

    text: the text encoder.
    embedding_dim: of the image encoder. dim: d, of the space.
    """

    def __init__(
        self, text: "TextEncoder | HFTextEncoder", *, embedding_dim: int, dim: int = 512
    ) -> None:
        super().__init__()
        self.text, self.embedding_dim, self.dim = text, embedding_dim, dim
        self.image_projection = _projection(embedding_dim, dim)
        self.text_projection = _projection(text.width, dim)

    def images(self, embedding: Tensor) -> Tensor:
        """Embeddings (B, E) of the image encoder. Returns unit vectors (B, d)."""
        return F.normalize(self.image_projection(embedding), dim=-1)

    def tokens(self, tokens: Tensor) -> Tensor:
        """tokens: (B, L). Returns unit vectors (B, d)."""
        return F.normalize(self.text_projection(self.text(tokens)), dim=-1)

    def sentences(self, texts: Sequence[str]) -> Tensor:
        """Unit vectors (B, d) of sentences."""
        device = next(self.text_projection.parameters()).device
        return self.tokens(self.text.encode(texts).to(device))

    def selftest(self, noise: Tensor) -> Tensor:
        """What `load_model` compares: noise embeddings (B, E) and two sentences in the space."""
        return torch.cat([self.images(noise), self.sentences(["no finding.", "a large opacity"])])


def _projection(width: int, dim: int) -> nn.Sequential:
    """One hidden layer (ConVIRT, sec. 3.2)."""
    return nn.Sequential(nn.Linear(width, dim), nn.ReLU(), nn.Linear(dim, dim))
