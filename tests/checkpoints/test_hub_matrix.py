"""Models of transformers, tiny and random: opened, fitted, saved, and read by it again."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn.functional import cosine_similarity

from sksoup import CheckpointCollection, LearnedSoup, Recipe
from sksoup.checkpoints.converted import ConvertedCheckpoint

from ..zoo import around

transformers = pytest.importorskip("transformers", minversion="5")

N = 4
TEXT = {
    "vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 16, "max_position_embeddings": 16, "pad_token_id": 0, "num_labels": 3,
}  # fmt: skip
DECODER = TEXT | {"num_key_value_heads": 1, "bos_token_id": 1, "eos_token_id": 2}
IMAGE = {
    "image_size": 8, "patch_size": 4, "hidden_size": 8, "num_hidden_layers": 2,
    "num_attention_heads": 2, "intermediate_size": 16, "num_labels": 3,
}  # fmt: skip
CONVS = {"hidden_sizes": [8, 16], "depths": [1, 1], "num_labels": 3}
TOWER = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
AUDIO = {
    "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16,
    "conv_dim": [8, 8], "conv_stride": [4, 4], "conv_kernel": [4, 4], "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "num_labels": 3,
    "classifier_proj_size": 8,
}  # fmt: skip
WHISPER = {
    "vocab_size": 32, "d_model": 8, "encoder_layers": 1, "decoder_layers": 1,
    "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 8,
    "decoder_ffn_dim": 8, "num_mel_bins": 4, "max_source_positions": 8, "max_target_positions": 8,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
}  # fmt: skip
T5 = {
    "vocab_size": 32, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2,
    "decoder_start_token_id": 0, "num_labels": 3,
}  # fmt: skip


def ids():
    return {"input_ids": np.random.default_rng(0).integers(3, 32, size=(N, 6))}


def pixels(size=8):
    values = np.random.default_rng(0).standard_normal((N, 3, size, size))
    return {"pixel_values": values.astype(np.float32)}


def audio():
    values = np.random.default_rng(0).standard_normal((N, 400))
    return {"input_values": values.astype(np.float32)}


def spectrograms():
    values = np.random.default_rng(0).standard_normal((N, 4, 16)).astype(np.float32)
    return {"input_features": values, "decoder_input_ids": ids()["input_ids"][:, :3]}


def of_first_position(module, X):
    """Logits of the first token: three classes are three words."""
    return module(**X).logits[:, 0, :3]


def of_next_word(module, X):
    return module(decoder_input_ids=X["input_ids"][:, :2], **X).logits[:, 0, :3]


def of_pairs(module, X):
    """Three numbers of each pair of an image and a text."""
    found = module(**X)
    similar = cosine_similarity(found.image_embeds, found.text_embeds)
    return torch.stack([similar, -similar, found.text_embeds[:, 0]], dim=1)


def clip():
    text = TOWER | {"vocab_size": 32, "max_position_embeddings": 8, "intermediate_size": 8}
    vision = TOWER | {"image_size": 8, "patch_size": 4, "intermediate_size": 8}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=4)
    return transformers.CLIPModel(config)


def of(name, head, **config):
    """A factory of a model with a head."""
    return lambda: getattr(transformers, name + head)(
        getattr(transformers, f"{name}Config")(**config)
    )


CLASSIFIES = "ForSequenceClassification"
SEES = "ForImageClassification"
# name: factory, rows, forward, what is done to the tensors of a file
MODELS = {
    "BERT": (of("Bert", CLASSIFIES, **TEXT), ids, None, ""),
    "BERT, masked words": (of("Bert", "ForMaskedLM", **TEXT), ids, of_first_position, ""),
    "DistilBERT": (
        of("DistilBert", CLASSIFIES, vocab_size=32, dim=16, n_layers=2, n_heads=2, hidden_dim=16,
           num_labels=3), ids, None, ""),
    "RoBERTa": (of("Roberta", CLASSIFIES, **TEXT), ids, None, ""),
    "DeBERTa-v2": (
        of("DebertaV2", CLASSIFIES, **TEXT, relative_attention=True,
           pos_att_type=["c2p", "p2c"]), ids, None, ""),
    "ModernBERT": (of("ModernBert", CLASSIFIES, **TEXT), ids, None, ""),
    "ELECTRA": (of("Electra", CLASSIFIES, **TEXT, embedding_size=8), ids, None, ""),
    "GPT-2": (
        of("GPT2", CLASSIFIES, vocab_size=32, n_embd=16, n_layer=2, n_head=2, n_positions=16,
           pad_token_id=0, num_labels=3), ids, None, ""),
    "GPT-2, words": (
        of("GPT2", "LMHeadModel", vocab_size=32, n_embd=16, n_layer=1, n_head=2, n_positions=16),
        ids, of_first_position, ""),
    "Llama": (of("Llama", CLASSIFIES, **DECODER), ids, None, ""),
    "Llama, words": (
        of("Llama", "ForCausalLM", **DECODER, tie_word_embeddings=True), ids, of_first_position,
        ""),
    "Qwen3": (of("Qwen3", CLASSIFIES, **DECODER, head_dim=8), ids, None, ""),
    "Mixtral": (
        of("Mixtral", CLASSIFIES, **DECODER, num_local_experts=11), ids, None, "computed"),
    "T5": (of("T5", "ForConditionalGeneration", **T5), ids, of_next_word, ""),
    "ViT": (of("ViT", SEES, **IMAGE), pixels, None, "renamed"),
    "DeiT": (of("DeiT", SEES, **IMAGE), pixels, None, "renamed"),
    "BEiT": (
        of("Beit", SEES, **IMAGE, use_relative_position_bias=True), pixels, None, "renamed"),
    "DINOv2": (of("Dinov2", SEES, **IMAGE), pixels, None, "renamed"),
    "DINOv2 with SwiGLU": (
        of("Dinov2", SEES, **IMAGE, use_swiglu_ffn=True), pixels, None, "computed"),
    "Swin": (
        of("Swin", SEES, image_size=16, patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[2, 2],
           window_size=2, num_labels=3), lambda: pixels(16), None, "renamed"),
    "ConvNeXt": (
        of("ConvNext", SEES, **CONVS, num_stages=2, patch_size=2), pixels, None, ""),
    "ResNet": (
        of("ResNet", SEES, **CONVS, embedding_size=8, layer_type="basic"), lambda: pixels(32),
        None, ""),
    "CLIP": (clip, lambda: pixels() | ids(), of_pairs, ""),
    "Wav2Vec2": (of("Wav2Vec2", CLASSIFIES, **AUDIO), audio, None, ""),
    "Whisper": (
        of("Whisper", "ForConditionalGeneration", **WHISPER), spectrograms, of_first_position, ""),
}  # fmt: skip


def save_runs(make, root, n=3):
    """Fine-tunings of a model, as transformers saves them."""
    torch.manual_seed(0)
    for k, model in enumerate(around(make(), n)):
        model.save_pretrained(root / f"ft{k}")
    return root


@torch.no_grad()
def outputs(module, X, forward):
    """All tensors a module returns for these rows."""
    X = {name: torch.as_tensor(values) for name, values in X.items()}
    return module.eval()(**X).logits if forward is None else forward(module, X)


@pytest.mark.parametrize("name", MODELS)
def test_a_soup_of_it_is_what_transformers_reads(name, tmp_path):
    make, rows, forward, how = MODELS[name]
    runs, X, y = save_runs(make, tmp_path / "runs"), rows(), np.arange(N) % 3
    collection = CheckpointCollection.from_path(runs)
    for run, entry in collection._entries.items():
        assert isinstance(entry.checkpoint, ConvertedCheckpoint) == bool(how)
        read = make().from_pretrained(runs / run).state_dict()
        assert all(torch.equal(read[n], value) for n, value in collection[run].items())

    soup = LearnedSoup(
        max_epochs=2, batch_size=2, forward=forward, memory=tmp_path / "cache", random_state=0
    ).fit(collection, X, y)
    soup.save_pretrained(tmp_path / "soup")
    loaded = type(soup.module_).from_pretrained(tmp_path / "soup")
    assert loaded.state_dict().keys() == soup.module_.state_dict().keys()
    assert torch.equal(outputs(loaded, X, forward), outputs(soup.module_, X, forward))

    again = CheckpointCollection([tmp_path / "soup"])
    assert again["soup"].keys() == soup.state_dict().keys()
    assert all(torch.equal(again["soup"][n], value) for n, value in soup.state_dict().items())
    recipe = Recipe.load(tmp_path / "soup")
    found = recipe.verify(tmp_path / "soup", CheckpointCollection.from_path(runs))
    assert found.ok, str(found)
    assert found.sha256 == "ok"
