"""Weights of others: DINOv3, the names of timm and transformers, files, refusals, downloads."""
import argparse
import json
import os
import re
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as nnf
from conftest import ROOT, random_vit

import stego

GOLDEN = {key: torch.from_numpy(value)  # of Meta's DINOv3 module; "gated" of transformers
          for key, value in np.load(ROOT / "tests/golden_dinov3.npz").items()}
META = {key[2:]: value for key, value in GOLDEN.items() if key.startswith("w/")}


def patch_tokens(vit, images):
    return vit(images).flatten(2).transpose(1, 2)  # (N, h w, D)


def assert_equal_features(vit, expected):
    for size in ((32, 32), (40, 56)):
        images = torch.randn(1, 3, *size)
        for facet in ("token", "key"):
            torch.testing.assert_close(vit(images, facet), expected(images, facet), rtol=0, atol=1e-5)


@pytest.mark.parametrize("n", [0, 1])  # square, wide
def test_dinov3_equals_metas_module(n):
    tokens = patch_tokens(stego.vit_from_state_dict(META), GOLDEN[f"image{n}"])
    torch.testing.assert_close(tokens, GOLDEN[f"tokens{n}"], rtol=0, atol=1e-5)
    assert torch.equal(stego.rotary_periods(64), META["rope_embed.periods"])  # for files without them


def test_positions_of_dinov2_with_registers_are_averaged_when_there_are_fewer_patches():
    vit, margin = random_vit("dinov2_reg", image_size=64), torch.ones(8, 8)
    margin[2:-2, 2:-2] = 0  # all that bicubic interpolation reads without antialiasing
    vit.pos_embed[:, 1:] = margin.reshape(1, 64, 1)
    assert vit.position_embedding(1, 1)[:, 1:].min() > 0.1


def test_dinov3_with_gated_mlps_as_transformers_saves_it_equals_transformers(tmp_path):
    file = ROOT / "tests/golden_dinov3_gated.safetensors"
    (tmp_path / "model.safetensors").symlink_to(file)  # save_pretrained makes a folder with this in it
    tokens = patch_tokens(stego.load_backbone(tmp_path), GOLDEN["gated_image"])
    torch.testing.assert_close(tokens, GOLDEN["gated_tokens"], rtol=0, atol=1e-3)
    exact = {"rope_embed.periods": 100 ** (torch.arange(16) / 16)}  # transformers does not round them
    tokens = patch_tokens(stego.vit_from_state_dict(stego.read_tensors(file) | exact), GOLDEN["gated_image"])
    torch.testing.assert_close(tokens, GOLDEN["gated_tokens"], rtol=0, atol=1e-5)


def test_rotary_attention_with_several_heads_equals_a_slow_loop():
    """Rotating the numbers k and k + d / 2 of a head is a multiplication of complex numbers."""
    vit, x = random_vit("dinov3"), torch.randn(1, 5 + 3 * 4, 128)
    turn = torch.ones(17, 32, dtype=torch.cfloat)
    for i, j, k in np.ndindex(3, 4, 16):
        for first, coordinate in ((0, (2 * i + 1) / 3 - 1), (16, (2 * j + 1) / 4 - 1)):
            angle = 2 * np.pi * coordinate / vit.rope_embed.periods[k].item()
            turn[5 + 4 * i + j, first + k] = np.exp(1j * angle)
    attention, heads = vit.blocks[0].attn, []
    for q, k, v in zip(*(part.split(64, 1) for part in attention.qkv(x[0]).split(128, 1))):
        q, k = (turn * torch.complex(part[:, :32], part[:, 32:]) for part in (q, k))
        heads.append(((q @ k.conj().T).real / 8).softmax(1) @ v)
    expected = attention.proj(torch.cat(heads, 1))[None]
    torch.testing.assert_close(attention(x, vit.rotation(3, 4)), expected, rtol=0, atol=1e-5)


def test_a_backbone_in_bfloat16_is_close_and_gives_float32():
    vit, images = random_vit("dinov3_plus"), torch.randn(2, 3, 32, 48)
    fast = stego.Stego(vit, 3, 2, precision=torch.bfloat16).features(images)
    assert fast.dtype == torch.float32 and not torch.equal(fast, vit(images))
    assert nnf.cosine_similarity(fast, vit(images), dim=1).min() > 0.999


def renamed(state, rules, prefix=""):
    out = {}
    for name, value in state.items():
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        out[prefix + name] = value
    return out


def transformers_names(vit, prefix=""):
    """The weights as transformers saves ViTModel, of DINO, or Dinov2WithRegistersModel."""
    rules = [("register_tokens|cls_token", r"embeddings.\g<0>"), (r"ls(\d)\.gamma", r"layer_scale\1.lambda1"),
             ("^blocks", "encoder.layer"), ("pos_embed", "embeddings.position_embeddings"),
             ("patch_embed.proj", "embeddings.patch_embeddings.projection"),
             ("attn.proj", "attention.output.dense"), (r"^norm\.", "layernorm.")]
    if not vit.registers:
        rules += [("norm1", "layernorm_before"), ("norm2", "layernorm_after"),
                  ("mlp.fc1", "intermediate.dense"), ("mlp.fc2", "output.dense")]
    state = {"embeddings.mask_token": torch.ones(1), "pooler.dense.weight": torch.ones(2, 2)}
    for name, value in vit.state_dict().items():
        parts = zip(("query", "key", "value"), value.chunk(3)) if ".attn.qkv." in name else [("", value)]
        state |= {name.replace("attn.qkv", f"attention.attention.{part}"): rows for part, rows in parts}
    return renamed(state, rules, prefix)


def timm_names(vit):
    state, rules = vit.state_dict(), [("register_tokens", "reg_token")]
    if vit.rotary:
        rules += [(r"ls(\d)\.gamma", r"gamma_\1"), ("w1", "fc1_g"), ("w2", "fc1_x"), ("w3", "fc2")]
        del state["rope_embed.periods"]
        for name in [name for name in state if name.endswith("qkv.bias")]:
            q, _, v = state.pop(name).chunk(3)
            state |= {name.replace("qkv.bias", "q_bias"): q, name.replace("qkv.bias", "v_bias"): v}
    elif vit.registers:  # the class token holds its position
        state["cls_token"] = state["cls_token"] + state["pos_embed"][:, :1]
        state["pos_embed"] = state["pos_embed"][:, 1:]
    return renamed(state, rules)


@pytest.mark.parametrize("family, names", [
    ("dino", transformers_names), ("dinov2_reg", transformers_names),
    ("dinov2_reg", lambda vit: transformers_names(vit, "module.backbone.")),
    ("dinov2", timm_names), ("dinov2_reg", timm_names),
    ("dinov2_reg", lambda vit: renamed(timm_names(vit), (), "model.")), ("dinov3", timm_names),
    ("dinov3_plus", timm_names)])
def test_names_and_shapes_give_the_model(family, names):
    vit = random_vit(family)
    read = stego.vit_from_state_dict(names(vit))
    assert read.state_dict().keys() == vit.state_dict().keys() and read.num_heads == 2
    assert_equal_features(read, vit)
    read.requires_grad_(False).norm.weight.zero_()  # has tensors of its own
    assert vit.norm.weight.all()


def test_plain_mlps_of_dinov3_have_other_names_in_transformers():
    state = {"model.layer.0.mlp.up_proj.bias": torch.ones(1), "layer.1.mlp.down_proj.bias": torch.ones(1)}
    assert [*stego.meta_names(state)] == ["blocks.0.mlp.fc1.bias", "blocks.1.mlp.fc2.bias"]


def test_the_largest_dinov3_has_heads_of_128():
    with torch.device("meta"):
        state = random_vit("dinov3_plus", embed_dim=4096, depth=1).state_dict()
    del state["rope_embed.periods"]
    assert len(state["blocks.0.mlp.w1.weight"]) == 96
    assert stego.vit_from_state_dict(state).num_heads == 32


def test_biases_that_are_not_there_are_zero():
    vit = random_vit("dinov3")
    for block in vit.blocks:
        block.attn.qkv.bias.zero_()
    state = {name: value for name, value in timm_names(vit).items() if "_bias" not in name}
    assert_equal_features(stego.vit_from_state_dict(state), vit)


def write_safetensors(path, tensors, **changes):
    """A .safetensors file of name -> (dtype, shape, bytes). changes: entries of the header, put in place."""
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for name, (dtype, shape, content) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(content)]}
        data += content
    text = json.dumps(header | changes).encode() + b"    "
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def test_safetensors_of_every_type_are_read_as_they_are(tmp_path):
    values = {"U8": torch.tensor([7], dtype=torch.uint8),  # so that the next ones are not aligned
              "F64": torch.randn(2, 3).double(), "F32": torch.randn(4), "F16": torch.randn(2, 1, 2).half(),
              "BF16": torch.randn(3).bfloat16(), "BOOL": torch.tensor([True, False]),
              "I64": torch.tensor([-1, 2 ** 40]), "F32 scalar": torch.tensor(2.5),
              "F32 empty": torch.empty(0, 3)}
    path = write_safetensors(tmp_path / "a.safetensors", {
        name: (name.split()[0], list(value.shape), value.reshape(-1).view(torch.uint8).numpy().tobytes())
        for name, value in values.items()})
    read = stego.read_tensors(path)
    assert read.keys() == values.keys()
    for name, value in values.items():
        assert torch.equal(read[name], value) and read[name].dtype == value.dtype


@pytest.mark.parametrize("entry, reason", [
    ({"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}, "shape"),  # beyond the end
    ({"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}, "shape"),
    ({"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, "overlap"),  # with the first
    ({"dtype": "F32", "shape": [10 ** 9, 10 ** 9], "data_offsets": [0, 4]}, "shape"),
    ({"dtype": "F7", "shape": [1], "data_offsets": [4, 8]}, "F7")])
def test_a_safetensors_file_with_a_bad_entry_is_refused(entry, reason, tmp_path):
    tensors = {"w": ("F32", [1], bytes(4)), "x": ("F32", [1], bytes(4))}
    path = write_safetensors(tmp_path / "a.safetensors", tensors, x=entry)
    with pytest.raises(stego.InputError, match=rf"a\.safetensors: .*{reason}"):
        stego.read_tensors(path)


def save_safetensors(state, path):
    return write_safetensors(path, {name: ("F32", list(value.shape), value.numpy().tobytes())
                                    for name, value in state.items()})


@pytest.mark.parametrize("wrap", [
    lambda state: {"teacher": {f"module.backbone.{key}": value for key, value in state.items()}
                   | {"module.head.mlp.0.weight": torch.ones(2)}, "student": {}, "epoch": 3},
    lambda state: {"model": state, "args": argparse.Namespace(arch="vit_small", lr=5e-4), "optimizer": {}},
    lambda state: {"state_dict": {f"module.{key}": value.half() for key, value in state.items()}}])
def test_files_of_training_runs_give_their_backbone_frozen(wrap, tmp_path):
    vit = random_vit("dinov3")
    torch.save(wrap(vit.state_dict()), tmp_path / "w.pth")
    backbone = stego.load_backbone(tmp_path / "w.pth")
    assert not backbone.training and not any(p.requires_grad for p in backbone.parameters())
    assert all(parameter.dtype == torch.float32 for parameter in backbone.parameters())
    for name, value in backbone.state_dict().items():
        torch.testing.assert_close(value, vit.state_dict()[name], rtol=1e-3, atol=1e-4)


DINO = random_vit("dino").state_dict()
FOREIGN = {
    "mae": ({"model": DINO | {"decoder_embed.weight": torch.ones(64)}}, "decoder_embed"),
    "resnet": ({"conv1.weight": torch.ones(64), "bn1.bias": torch.ones(64)}, "conv1.weight, bn1"),
    "optimizer": ({"param_groups": [{"lr": 0.1}], "state": {}}, "param_groups"),
    "lacking": ({key: value for key, value in DINO.items() if key != "norm.bias"}, "norm.bias"),
    "misshapen": (DINO | {"blocks.1.mlp.fc1.weight": torch.ones(3, 3)}, "blocks.1.mlp.fc1.weight"),
    "oblong": (DINO | {"pos_embed": torch.ones(1, 16, 128)}, "pos_embed"), "number": (3, "int")}


@pytest.mark.parametrize("name", FOREIGN)
def test_other_files_are_refused_in_one_sentence_that_names_what_was_found(name, tmp_path):
    torch.save(FOREIGN[name][0], tmp_path / f"{name}.pth")
    with pytest.raises(stego.InputError, match=FOREIGN[name][1]) as refused:
        stego.load_backbone(tmp_path / f"{name}.pth")
    assert f"{name}.pth" in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize("broken", ["nothing", "a page", "half"])
def test_a_broken_download_leaves_nothing_and_the_next_one_is_whole(broken, tmp_path, monkeypatch):
    def download(url, target):
        if not content:
            raise OSError("no route to host")
        Path(target).write_bytes(content)

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    whole = save_safetensors(random_vit("dino").state_dict(), tmp_path / "w").read_bytes()
    content = {"nothing": b"", "a page": b"<html>", "half": whole[:9999]}[broken]
    with pytest.raises(stego.InputError, match=r"cannot download https://.*--backbone FILE"):
        stego.load_backbone("dino_vits8")
    assert os.listdir(tmp_path / "hub/checkpoints") == []
    content = whole
    for name in ("dino_vits8", "dinov3_vits16", "dinov3_vitb16"):  # two are called model.safetensors
        assert stego.load_backbone(name).patch_size == 8
    assert len(os.listdir(tmp_path / "hub/checkpoints")) == 3
