"""Makes the scripts importable and the tests repeatable; what several files of tests share."""
import os
import sys
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # as many as other processes have, so that all round their sums alike

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
import data
import stego
import train

FAMILIES = {
    "dino": {}, "dinov2": {"layer_scale": True}, "dinov2_reg": {"layer_scale": True, "registers": 4},
    "dinov3": {"layer_scale": True, "registers": 4, "rotary": True},
    "dinov3_plus": {"layer_scale": True, "registers": 4, "rotary": True, "swiglu": True, "hidden_dim": 96}}
IMAGES = [  # what most runs of the tests are typed with
    "--data-root", "images", "--num-classes", "3", "--backbone", "vit.pth", "--resolution", "32",
    "--eval-resolution", "32", "--code-dim", "5", "--batch-size", "4", "--steps", "12", "--device", "cpu",
    "--workers", "1", "--no-crf"]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(1)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Nothing is written into the checkout: caches and runs are below the test's own folder."""
    monkeypatch.chdir(tmp_path)


def save_image(path, width=40, height=30, mode="RGB", seed=0):
    """Saves random pixels, (height, width, 3), and returns them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)
    return pixels


def save_label(path, ids):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(ids)).save(path)


@pytest.fixture
def folder(tmp_path):
    """imgs/{train,val} with three labelled training images and one image to evaluate."""
    for i, name in enumerate(("a.png", "b.jpg", "sub/c.png")):
        save_image(tmp_path / "imgs/train" / name, seed=i)
        ids = np.random.default_rng(i).integers(0, 4, (30, 40), np.uint8)
        save_label((tmp_path / "labels/train" / name).with_suffix(".png"), ids)
    save_image(tmp_path / "imgs/val/v.png", seed=9)
    return tmp_path


def random_vit(family, std=0.1, **changes):
    """A tiny random ViT of this family with two heads; its key bias is 0, as that of all DINOv3 models."""
    vit = stego.VisionTransformer(**{"patch_size": 8, "embed_dim": 128, "depth": 2, "num_heads": 2,
                                     "image_size": 32, **FAMILIES[family], **changes}).eval()
    for name, parameter in vit.named_parameters():
        torch.nn.init.normal_(parameter, mean=float(name.endswith(("norm1.weight", "gamma"))), std=std)
        if name.endswith("qkv.bias") and vit.rotary:
            parameter.data[128:256] = 0
    return vit.requires_grad_(False)


@pytest.fixture
def backbone():
    return random_vit("dino", std=0.3, embed_dim=16, image_size=16)


def fill_workplace(path):
    torch.manual_seed(3)
    torch.save(random_vit("dino", std=0.3, embed_dim=16, depth=1, num_heads=1).state_dict(), path / "vit.pth")
    for split, n in (("train", 12), ("val", 2)):
        for i in range(n):
            ids = np.random.default_rng(i).integers(0, 3, (4, 6)).repeat(10, 0).repeat(10, 1).astype(np.uint8)
            save_label(path / f"images/imgs/{split}/{i}.png", data.class_palette(3)[ids])
            save_label(path / f"images/labels/{split}/{i}.png", ids)


@pytest.fixture
def workplace(tmp_path):
    """images/ with 12 labelled training images, 2 to evaluate, and the weights of a tiny ViT, vit.pth."""
    fill_workplace(tmp_path)
    return tmp_path


def train_here(monkeypatch, *arguments):
    """train.main() in this process, which spares the start of another."""
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    train.main()


def weights(name):
    return torch.load(f"runs/{name}/checkpoint.pt", weights_only=True)["model"]


def same_weights(name, other):
    ours, others = weights(name), weights(other)
    return ours.keys() == others.keys() and all(torch.equal(ours[key], others[key]) for key in ours)
