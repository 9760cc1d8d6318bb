"""The vocabulary, the text network and the space it shares with images."""

import pickle
from pathlib import Path

import pytest
import torch

from medssl.data.preprocess import Preprocessing
from medssl.models.folder import load_model, save_model, selftest_noise
from medssl.models.text import PADDING, SharedSpace, TextEncoder, Vocabulary

TEXTS = ["A small nodule in the left lung.", "No nodule.", "A large nodule in the right lung."] * 3


def encoder(**changes) -> TextEncoder:
    torch.manual_seed(0)
    text = TextEncoder(
        **{"vocabulary_size": 300, "width": 16, "depth": 2, "heads": 2, "length": 12, **changes}
    )
    text.learn(TEXTS)
    return text.eval()


def test_frequent_words_become_tokens_and_nothing_is_unknown():
    from tokenizers import Tokenizer

    vocabulary = Vocabulary.learn(TEXTS, size=320)
    decoder = Tokenizer.from_str(vocabulary.described)
    ids = [i for i in vocabulary.encode("nodule", 12).tolist() if i != PADDING]
    assert len(ids) == 1
    for text in ("naïve 37 µm", "日本", "x" * 30):
        found = [i for i in vocabulary.encode(text, 99).tolist() if i != PADDING]
        units = "".join(decoder.id_to_token(i) for i in found)
        assert len(units) == len(f" {text}".encode().replace("µ".encode(), "μ".encode()))


def test_the_same_texts_in_any_order_give_the_same_vocabulary():
    there = Vocabulary.learn(TEXTS, size=300).described
    assert Vocabulary.learn(TEXTS[::-1], size=300).described == there
    assert pickle.loads(pickle.dumps(Vocabulary(there))).described == there


def test_case_does_not_matter_and_long_sentences_are_cut():
    vocabulary = Vocabulary.learn(TEXTS, size=300)
    assert torch.equal(vocabulary.encode("NODULE", 5), vocabulary.encode("nodule", 5))
    assert vocabulary.encode("lung " * 50, 7).shape == (7,)
    assert (vocabulary.encode("lung " * 50, 7) != PADDING).all()


def test_a_vocabulary_without_room_for_bytes_is_refused():
    with pytest.raises(ValueError, match="at least 257 tokens, got 100"):
        Vocabulary.learn(TEXTS, size=100)


def test_padding_changes_nothing():
    text = encoder(length=12)
    tokens = text.encode(["No nodule."])
    used = int((tokens != PADDING).sum())
    torch.testing.assert_close(text(tokens), text(tokens[:, :used]), atol=1e-5, rtol=1e-5)


def test_the_embedding_is_the_maximum_over_the_tokens_outputs():
    text = encoder()
    tokens = text.encode(["No nodule.", "A large nodule in the right lung."])
    inside = text.norm(
        text.blocks(text.tokens(tokens) + text.places, src_key_padding_mask=tokens == PADDING)
    )
    for row, ids, found in zip(inside, tokens, text(tokens), strict=True):
        torch.testing.assert_close(found, row[ids != PADDING].max(0).values)


def test_an_empty_sentence_has_a_finite_place_and_gradient():
    text = encoder(dropout=0.0)
    found = text(torch.zeros(1, 12, dtype=torch.int64))
    assert found.isfinite().all()


def test_without_a_vocabulary_the_error_says_what_to_do():
    with pytest.raises(RuntimeError, match=r"call learn\(texts\) first"):
        TextEncoder(vocabulary_size=300, width=16, heads=2).encode(["x"])


def test_the_space_comes_back_from_its_folder_with_its_vocabulary(tmp_path: Path):
    space = SharedSpace(encoder(), embedding_dim=6, dim=4).eval()
    save_model(
        tmp_path / "text",
        space,
        kind="text",
        preprocessing=Preprocessing(size=(8, 8), intensity="range"),
        domain={},
        card="",
        noise=selftest_noise((2, 6)),
    )
    again = load_model(tmp_path / "text", kind="text").model
    assert isinstance(again, SharedSpace)
    torch.testing.assert_close(again.sentences(TEXTS), space.sentences(TEXTS))
    embedding = torch.randn(3, 6)
    torch.testing.assert_close(again.images(embedding), space.images(embedding))
    torch.testing.assert_close(again.images(embedding).norm(dim=1), torch.ones(3))
