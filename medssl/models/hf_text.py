"""Sentences to embeddings by a BERT-like network of a local Hugging Face folder."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from medssl.models.text import PADDING, Vocabulary
from medssl.models.weights import fit_weights, read_state_dict

_FILES = ("config.json", "model.safetensors", "tokenizer.json")
_NAMING = ("auto_map", "name_or_path", "attn_implementation")  # folders, and code to fetch
_FEWEST = 3  # tokens: a sentence has its first, its last, and one of its own


class HFTextEncoder(nn.Module):
    """A BERT-like network whose upper layers are trained, and the maximum over its outputs
    (ConVIRT, https://arxiv.org/abs/2010.00747, sec. 3.3).

    checkpoint: a local folder with config.json, model.safetensors and tokenizer.json.
    config: what config.json says; builds the network, for a saved state, where there is no folder.
    frozen_layers: layers, counted from the embeddings, that stay as they are and drop nothing out;
        the embeddings always do.
    length: tokens of a sentence, special ones included; what is longer is cut.

    Nothing is downloaded and no code of a checkpoint is run. Real ClinicalBERT files were not at
    hand: names and values are tested against randomly initialized models of transformers.
    """

    born_from: ClassVar[frozenset[str]] = frozenset({"checkpoint"})

    def __init__(
        self,
        *,
        checkpoint: Path | None = None,
        config: dict[str, Any] | None = None,
        frozen_layers: int = 6,
        length: int = 64,
    ) -> None:
        super().__init__()
        found = _one_of(checkpoint, config)
        self.config = {key: found[key] for key in found if key.lstrip("_") not in _NAMING}
        self.frozen_layers, self.length = frozen_layers, length
        self.network: Any = _network(self.config)
        self.width = int(self.network.config.hidden_size)
        padding = self.network.config.pad_token_id
        self.padding = PADDING if padding is None else int(padding)
        self.vocabulary: Vocabulary | None = None
        self._check_numbers()
        if checkpoint is not None:
            state = _of_network(read_state_dict(checkpoint / _FILES[1]), self.network)
            ignored = ("pooler.", "embeddings.position_ids")  # the latter in older files
            fit_weights(self.network, state, name=_FILES[1], ignore=ignored)
            self.vocabulary = self._fitted((checkpoint / _FILES[2]).read_text(encoding="utf-8"))
        self.network.requires_grad_(False)
        self._trained().requires_grad_(True)
        self.train()

    def train(self, mode: bool = True) -> Self:
        """Training mode for the layers that are trained; the frozen ones stay in eval mode."""
        super().train(mode)
        self.network.eval()
        self._trained().train(mode)
        return self

    def learn(self, texts: Iterable[str]) -> Vocabulary:
        """The checkpoint's vocabulary, whatever the texts: its weights know no other."""
        if self.vocabulary is None:
            raise RuntimeError(
                "the text encoder has no vocabulary, because a config holds none; give checkpoint "
                "instead, or load a saved state first"
            )
        return self.vocabulary

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens: (B, L) int64. Returns the embedding (B, E)."""
        padding = tokens == self.padding
        padding[:, 0] = False  # an empty sentence attends to one place at least
        found = self.network(input_ids=tokens, attention_mask=(~padding).long()).last_hidden_state
        return found.masked_fill(padding[..., None], -torch.inf).amax(1)

    def encode(self, texts: Sequence[str]) -> Tensor:
        """Tokens (B, L) of sentences. Raises RuntimeError where there is no vocabulary."""
        vocabulary = self.learn(texts)
        return torch.stack([vocabulary.encode(text, self.length) for text in texts])

    def get_extra_state(self) -> dict[str, str | None]:
        """The vocabulary, which is no tensor."""
        return {"vocabulary": None if self.vocabulary is None else self.vocabulary.described}

    def set_extra_state(self, state: dict[str, str | None]) -> None:
        """Take the vocabulary of `get_extra_state`."""
        described = state["vocabulary"]
        self.vocabulary = None if described is None else self._fitted(described)

    def _trained(self) -> nn.ModuleList:
        return self.network.encoder.layer[self.frozen_layers :]

    def _fitted(self, described: str) -> Vocabulary:
        """A tokenizer.json whose sentences are cut before the last special token, and filled up
        with the network's padding, to `length`."""
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_str(described)
        tokenizer.enable_truncation(self.length)
        tokenizer.enable_padding(pad_id=self.padding, length=self.length)
        return Vocabulary(tokenizer.to_str())

    def _check_numbers(self) -> None:
        depth = len(self.network.encoder.layer)
        if not 0 <= self.frozen_layers <= depth:
            raise ValueError(
                f"frozen_layers is within 0 and {depth}, the layers of the network, got "
                f"{self.frozen_layers}"
            )
        places = self.network.embeddings.position_embeddings
        before = 0 if places.padding_idx is None else places.padding_idx + 1  # as in RoBERTa
        most = places.num_embeddings - before
        if not _FEWEST <= self.length <= most:
            raise ValueError(
                f"length is within {_FEWEST} and {most}, the positions of the network, got "
                f"{self.length}"
            )


def _one_of(checkpoint: Path | None, config: dict[str, Any] | None) -> dict[str, Any]:
    """The config that is given, or that of the checkpoint, whose files are all there."""
    if checkpoint is None and config is not None:
        return config
    if checkpoint is None or config is not None:
        raise ValueError(
            "give checkpoint, a local folder, or config, what its config.json says; got "
            f"{'neither' if config is None else 'both'}"
        )
    if not checkpoint.is_dir():
        raise FileNotFoundError(
            f"no checkpoint folder at {checkpoint}; nothing is downloaded, copy one there"
        )
    missing = [name for name in _FILES if not (checkpoint / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{checkpoint.name} has no {' and no '.join(missing)}; let transformers write them, "
            "with save_pretrained(folder) of the model and of its AutoTokenizer"
        )
    return json.loads((checkpoint / _FILES[0]).read_text(encoding="utf-8"))


def _network(config: dict[str, Any]) -> Any:
    """The network that a config describes, randomly initialized."""
    from transformers import CONFIG_MAPPING, AutoConfig, AutoModel

    kind = config.get("model_type")
    if kind not in CONFIG_MAPPING:
        raise ValueError(
            f"transformers has no model_type {kind!r}, and code that comes with a checkpoint is "
            "not run; take a BERT or a RoBERTa"
        )
    made = AutoConfig.for_model(**config)
    network = AutoModel.from_config(made, trust_remote_code=False, dtype=torch.float32)
    embeddings, encoder = getattr(network, "embeddings", None), getattr(network, "encoder", None)
    places, layers = getattr(embeddings, "position_embeddings", None), getattr(encoder, "layer", 0)
    encodes = not (made.is_encoder_decoder or getattr(made, "is_decoder", False))
    if not (encodes and isinstance(places, nn.Embedding) and isinstance(layers, nn.ModuleList)):
        raise ValueError(
            f"{kind!r} as configured is no encoder like BERT's, with a learnt position for each "
            "token, encoder.layer and no decoder; take a BERT or a RoBERTa"
        )
    network.pooler = None  # nothing reads it, and the file of a language model has none
    return network


def _of_network(state: dict[str, Tensor], network: Any) -> dict[str, Tensor]:
    """A state by the network's names, from a file with or without a head, new or of 2018."""
    prefix = f"{network.base_model_prefix}."
    with_head = any(name.startswith(prefix) for name in state)
    return {
        name.removeprefix(prefix)
        .replace("LayerNorm.gamma", "LayerNorm.weight")
        .replace("LayerNorm.beta", "LayerNorm.bias"): tensor
        for name, tensor in state.items()
        if name.startswith(prefix) or not with_head
    }
