"""Makes the scripts importable and the tests repeatable; what several files of tests share."""
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))
import data
import stego
import train

ROOT = Path(__file__).parents[1]
VIT = {"patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 1, "image_size": 32}  # of the workplace
SMALL = ["--num-classes", "3", "--backbone", "vit.pth", "--resolution", "32", "--eval-resolution", "32", "--code-dim", "5",
         "--batch-size", "4", "--steps", "12", "--checkpoint-every", "4", "--log-every", "4", "--device", "cpu",
         "--workers", "1"]


def pytest_addoption(parser):
    parser.addoption("--long", action="store_true", help="the kills and the fuzzing in their long form, minutes each")


@pytest.fixture
def long(request):
    return request.config.getoption("--long")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Nothing is written into the checkout: what a test leaves out, like --cache-dir, is below its own folder."""
    monkeypatch.chdir(tmp_path)


def save_image(path, width=40, height=30, mode="RGB", seed=0):
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


@pytest.fixture
def backbone():
    torch.manual_seed(5)
    vit = stego.VisionTransformer(8, 16, 2, 2, image_size=16)
    for parameter in vit.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return vit.eval().requires_grad_(False)


@pytest.fixture
def workplace(tmp_path):
    """A folder with 12 labelled training images, 2 to evaluate, and the weights of a tiny ViT; the current folder."""
    torch.manual_seed(3)
    vit = stego.VisionTransformer(**VIT)
    for parameter in vit.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    torch.save(vit.state_dict(), "vit.pth")
    for split, n in (("train", 12), ("val", 2)):
        for i in range(n):
            ids = np.random.default_rng(i).integers(0, 3, (4, 6)).repeat(10, 0).repeat(10, 1).astype(np.uint8)
            for kind, pixels in (("imgs", data.class_palette(3)[ids]), ("labels", ids)):
                folder = tmp_path / "images" / kind / split
                folder.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    return tmp_path


def train_here(monkeypatch, *arguments):
    """train.main() in this process, which spares the start of another."""
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    train.main()


def weights(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)["model"]
