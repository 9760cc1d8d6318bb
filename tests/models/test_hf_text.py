"""Text networks of local Hugging Face folders, against transformers' own outputs."""

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertModel,
    GPT2Config,
    PreTrainedModel,
    RobertaConfig,
    RobertaModel,
    T5Config,
)

from medssl.data.preprocess import Preprocessing
from medssl.data.synthetic.shapes import shape_samples
from medssl.models.folder import build, describe, load_model, save_model, selftest_noise
from medssl.models.hf_text import HFTextEncoder
from medssl.models.text import SharedSpace
from medssl.models.timm_encoder import TimmEncoder
from medssl.objectives.image_text.convirt import ConVIRT
from medssl.training import TrainingPlan, train

TEXTS = ["A small nodule in the left lung.", "No nodule.", "A large nodule in the right lung."]
PADDING = {BertModel: 0, BertForMaskedLM: 0, RobertaModel: 3}
TINY = {
    "vocab_size": 120,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 30,
}


def tokenizer(padding: int = 0) -> Tokenizer:
    """Of the texts and of the reports of shapes, with BERT's special tokens around a sentence."""
    special = ["[CLS]", "[SEP]", "[UNK]"]
    special.insert(padding, "[PAD]")
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer = normalizers.Lowercase()
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.WordPieceTrainer(
        vocab_size=TINY["vocab_size"], special_tokens=special, show_progress=False
    )
    made.train_from_iterator(TEXTS + [s.report or "" for s in shape_samples(8, seed=1)], trainer)
    ends = [(name, made.token_to_id(name)) for name in ("[CLS]", "[SEP]")]
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=ends
    )
    return made


def saved(
    folder: Path, kind: type[PreTrainedModel] = BertModel, **changes: Any
) -> tuple[PreTrainedModel, Tokenizer]:
    """A checkpoint folder, and what was saved there."""
    torch.manual_seed(0)
    config = RobertaConfig if kind is RobertaModel else BertConfig
    model = kind(config(**{**TINY, "pad_token_id": PADDING[kind], **changes})).eval()
    for parameter in model.parameters():  # as initialized, all places look alike
        torch.nn.init.normal_(parameter, 0.1, 0.3)
    model.save_pretrained(folder)
    tokens = tokenizer(PADDING[kind])
    tokens.save(str(folder / "tokenizer.json"))
    return model, tokens


def ours(folder: Path, **changes: Any) -> HFTextEncoder:
    return HFTextEncoder(**{"checkpoint": folder, "frozen_layers": 2, "length": 14, **changes})


@torch.no_grad()
def pooled(model: PreTrainedModel, tokens: Tokenizer, text: str) -> torch.Tensor:
    """The maximum over the outputs (L, E) of a sentence on its own, without any padding."""
    ids = torch.tensor([tokens.encode(text).ids])
    return model(input_ids=ids).last_hidden_state[0].max(0).values


@pytest.mark.parametrize("kind", [BertModel, RobertaModel])
@torch.no_grad()
def test_the_embedding_is_the_maximum_over_the_outputs_of_transformers(tmp_path: Path, kind):
    model, tokens = saved(tmp_path, kind)
    text = ours(tmp_path).eval()
    wanted = torch.stack([pooled(model, tokens, sentence) for sentence in TEXTS])
    torch.testing.assert_close(text(text.encode(TEXTS)), wanted, atol=1e-5, rtol=1e-5)
    assert text.width == wanted.shape[1]


@torch.no_grad()
def test_the_mask_of_attention_is_that_of_the_padding(tmp_path: Path):
    model, _ = saved(tmp_path)
    text = ours(tmp_path).eval()
    tokens = text.encode(TEXTS)
    found = model(input_ids=tokens, attention_mask=(tokens != 0).long()).last_hidden_state
    rows = [row[ids != 0].max(0).values for row, ids in zip(found, tokens, strict=True)]
    torch.testing.assert_close(text(tokens), torch.stack(rows), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", [BertModel, RobertaModel])
@torch.no_grad()
def test_padding_changes_nothing(tmp_path: Path, kind):
    saved(tmp_path, kind)
    text = ours(tmp_path).eval()
    tokens = text.encode(["No nodule."])
    used = int((tokens != PADDING[kind]).sum())
    assert used < tokens.shape[1]
    torch.testing.assert_close(text(tokens), text(tokens[:, :used]), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_nothing_but_padding_has_a_finite_place(tmp_path: Path):
    saved(tmp_path)
    assert ours(tmp_path)(torch.zeros(1, 14, dtype=torch.int64)).isfinite().all()


def test_a_sentence_keeps_its_special_tokens_when_it_is_cut(tmp_path: Path):
    _, tokens = saved(tmp_path, RobertaModel)
    whole = tokens.encode(TEXTS[0]).ids
    cut, short = ours(tmp_path, length=5).encode([TEXTS[0], ""]).tolist()
    assert cut == [*whole[:4], whole[-1]]
    assert short == [whole[0], whole[-1], 3, 3, 3]


def test_the_vocabulary_is_the_checkpoint_s_and_goes_to_loader_processes(tmp_path: Path):
    _, tokens = saved(tmp_path, RobertaModel)
    text = ours(tmp_path)
    vocabulary = text.learn(["words that nobody has seen"])
    assert len(vocabulary) == tokens.get_vocab_size()
    again = pickle.loads(pickle.dumps(vocabulary))
    assert torch.equal(again.encode(TEXTS[1], text.length), text.encode(TEXTS)[1])


@torch.no_grad()
def test_a_file_with_a_head_of_half_precision_and_with_names_of_2018_is_read(tmp_path: Path):
    model, tokens = saved(tmp_path, BertForMaskedLM)
    state = load_file(tmp_path / "model.safetensors")
    old = {
        name.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta"): tensor.half()
        for name, tensor in state.items()
    }
    assert any(name.startswith("bert.") and name.endswith("gamma") for name in old)
    old["bert.embeddings.position_ids"] = torch.arange(30)[None]
    save_file(old, tmp_path / "model.safetensors")
    text = ours(tmp_path).eval()
    assert {p.dtype for p in text.parameters()} == {torch.float32}
    wanted = pooled(model.half().float().bert, tokens, TEXTS[0])
    torch.testing.assert_close(text(text.encode(TEXTS))[0], wanted, atol=1e-4, rtol=1e-4)


def test_weights_of_another_network_are_refused(tmp_path: Path):
    saved(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    del state["encoder.layer.1.output.dense.bias"]
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"missing \['encoder.layer.1.output.dense.bias'\]"):
        ours(tmp_path)


def objective(folder: Path, **changes: Any) -> ConVIRT:
    images = TimmEncoder("test_convnext", in_channels=1)
    return ConVIRT(images, text=ours(folder, **changes), dim=8, size=32)


def test_one_step_moves_the_upper_layer_and_nothing_below_it(tmp_path: Path):
    saved(tmp_path / "checkpoint")
    convirt = objective(tmp_path / "checkpoint")
    before = {name: p.detach().clone() for name, p in convirt.text.network.named_parameters()}
    plan = TrainingPlan(total_samples=4, batch_size=4)
    samples = shape_samples(8, seed=1)
    train(convirt, samples, plan, workdir=tmp_path / "work", device="cpu", workers=0)
    after = dict(convirt.text.network.named_parameters())
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name.rpartition("layer.")[2][:2] for name in moved} == {"2."}
    assert "encoder.layer.2.output.dense.bias" in moved  # which weight decay leaves alone


def test_all_that_is_trained_has_a_gradient(tmp_path: Path):
    saved(tmp_path)
    text = ours(tmp_path, frozen_layers=0)
    text(text.encode(TEXTS)).square().sum().backward()
    trained = {name for name, p in text.named_parameters() if p.requires_grad}
    assert {name.split(".")[3] for name in trained} == {"0", "1", "2"}
    assert {name for name, p in text.named_parameters() if p.grad is not None} == trained


@pytest.mark.parametrize(("frozen", "drops"), [(3, False), (2, True)])
@torch.no_grad()
def test_only_what_is_trained_drops_out(tmp_path: Path, frozen: int, drops: bool):
    saved(tmp_path, hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5)
    text = ours(tmp_path, frozen_layers=frozen)
    tokens = text.encode(TEXTS)
    inside = [text(tokens), text.eval()(tokens), text.train()(tokens)]
    same = [torch.equal(inside[1], other) for other in (inside[0], inside[2])]
    assert same == [not drops, not drops]


def test_the_space_comes_back_when_the_checkpoint_is_gone(tmp_path: Path):
    saved(tmp_path / "checkpoint", RobertaModel)
    torch.manual_seed(0)
    space = SharedSpace(ours(tmp_path / "checkpoint"), embedding_dim=6, dim=4).eval()
    shutil.rmtree(tmp_path / "checkpoint")
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
    assert torch.equal(again.text.encode(TEXTS), space.text.encode(TEXTS))
    trained = [name for name, p in space.named_parameters() if p.requires_grad]
    assert trained == [name for name, p in again.named_parameters() if p.requires_grad]


def test_what_is_saved_names_no_folder_and_no_code(tmp_path: Path):
    saved(tmp_path)
    change(
        tmp_path,
        _name_or_path=str(tmp_path),
        auto_map={"AutoModel": "there/code--its.Model"},
        _attn_implementation="there/kernel",
        attn_implementation="there/kernel",
    )
    described = describe(ours(tmp_path))
    assert described["init_args"]["config"]["hidden_size"] == 16
    assert str(tmp_path) not in json.dumps(described)
    assert "there/" not in json.dumps(described)
    assert describe(build(described)) == described


def change(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_folder_that_is_not_whole_is_refused(tmp_path: Path, name: str):
    saved(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"has no {name}; let transformers write"):
        ours(tmp_path)


def test_a_missing_folder_is_refused_and_not_looked_up_elsewhere(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="no checkpoint folder at .*nothing is downloaded"):
        ours(tmp_path / "google-bert")


def test_either_a_checkpoint_or_a_config_is_given(tmp_path: Path):
    with pytest.raises(ValueError, match="give checkpoint.* or config.*got neither"):
        HFTextEncoder()
    with pytest.raises(ValueError, match="give checkpoint.* or config.*got both"):
        HFTextEncoder(checkpoint=tmp_path, config={})


@pytest.mark.parametrize("frozen", [-1, 4])
def test_frozen_layers_that_are_not_there_are_refused(tmp_path: Path, frozen: int):
    saved(tmp_path)
    with pytest.raises(ValueError, match=f"within 0 and 3, the layers .*got {frozen}"):
        ours(tmp_path, frozen_layers=frozen)


@pytest.mark.parametrize(("kind", "most"), [(BertModel, 30), (RobertaModel, 26)])
@torch.no_grad()
def test_a_length_without_positions_is_refused(tmp_path: Path, kind, most: int):
    saved(tmp_path, kind)
    text = ours(tmp_path, length=most).eval()
    assert text(text.encode(["nodule " * 50])).isfinite().all()
    for length in (2, most + 1):
        with pytest.raises(ValueError, match=f"within 3 and {most}, the positions .*got {length}"):
            ours(tmp_path, length=length)


@pytest.mark.parametrize(
    "config",
    [
        BertConfig(**TINY, is_decoder=True),
        GPT2Config(vocab_size=120, n_embd=16, n_layer=1, n_head=2),
        T5Config(vocab_size=120, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2),
    ],
    ids=lambda config: config.model_type,
)
def test_a_network_that_is_no_encoder_is_refused(config):
    with pytest.raises(ValueError, match=f"'{config.model_type}' as configured is no encoder"):
        HFTextEncoder(config=config.to_dict(), frozen_layers=0)


def test_a_network_with_code_of_its_own_is_refused(tmp_path: Path):
    saved(tmp_path)
    change(tmp_path, model_type="cxr-bert", auto_map={"AutoModel": "its.Model"})
    with pytest.raises(ValueError, match="no model_type 'cxr-bert', and code .* is not run"):
        ours(tmp_path)


def test_a_config_alone_has_no_vocabulary_and_the_error_says_what_to_do():
    text = HFTextEncoder(config=BertConfig(**TINY).to_dict(), frozen_layers=2, length=8)
    with pytest.raises(RuntimeError, match="no vocabulary.*give checkpoint instead"):
        text.encode(TEXTS)
