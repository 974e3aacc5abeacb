"""The procedural scenes and the script that distils the default backbone from them."""
import hashlib
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT

import stego
from assets import scenes

COUNT = 150


@pytest.fixture(scope="module")
def drawn():
    """(images (N, 128, 128, 3), labels (N, 128, 128)) of the first seeds."""
    pairs = [scenes.draw_scene(seed) for seed in range(COUNT)]
    return np.stack([np.asarray(image) for image, _ in pairs]), np.stack([np.asarray(label) for _, label in pairs])


def test_names_and_colours():
    assert scenes.CLASSES == ("sky", "mountain", "water", "sand", "grass", "road", "building", "tree", "vehicle")
    assert len(set(scenes.PALETTE)) == 9 and all(len(c) == 3 and 0 <= min(c) <= max(c) <= 255 for c in scenes.PALETTE)
    assert isinstance(scenes.VERSION, int)


def test_sizes_modes_and_ids(drawn):
    image, label = scenes.draw_scene(3)
    assert image.size == label.size == (128, 128) and image.mode == "RGB" and label.mode == "L"
    assert drawn[1].max() <= 8


def test_a_seed_is_a_picture():
    np.random.seed(1)  # the global state plays no part
    first = [np.asarray(part) for part in scenes.draw_scene(11)]
    np.random.seed(2)
    for a, b in zip(first, scenes.draw_scene(11)):
        assert np.array_equal(a, np.asarray(b))
    assert not np.array_equal(first[0], np.asarray(scenes.draw_scene(12)[0]))


def test_a_seed_is_a_picture_in_another_process(drawn):
    code = ("import sys, hashlib; sys.path.insert(0, 'assets'); import scenes\n"
            "print(hashlib.sha256(b''.join(p.tobytes() for s in range(5) for p in scenes.draw_scene(s))).hexdigest())")
    other = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    here = b"".join(part[seed].tobytes() for seed in range(5) for part in drawn)
    assert other.strip() == hashlib.sha256(here).hexdigest()


def test_every_class_is_common(drawn):
    present = np.stack([(drawn[1] == c).any((1, 2)) for c in range(9)]).mean(1)  # share of the images that show it
    area = np.bincount(drawn[1].ravel(), minlength=9) / drawn[1].size
    assert present.min() > 0.3 and area.min() > 0.03 and area.max() < 0.4


def test_colours_tell_little(drawn):
    """k-means on colours, matched as well as can be, stays near chance (about 7 for nine classes of these sizes)."""
    colours = drawn[0].reshape(-1, 3)[::53].astype(np.float64)
    labels = drawn[1].ravel()[::53]
    rng = np.random.default_rng(0)
    centres = colours[rng.choice(len(colours), 9, replace=False)]
    for _ in range(30):
        nearest = ((colours[:, None] - centres) ** 2).sum(2).argmin(1)
        centres = np.stack([colours[nearest == k].mean(0) if (nearest == k).any() else centres[k] for k in range(9)])
    both = np.bincount(nearest * 9 + labels, minlength=81).reshape(9, 9)
    iou = both / (both.sum(1, keepdims=True) + both.sum(0) - both)
    # the best cluster for each class, one cluster for several allowed: an upper bound on the Hungarian match
    assert 100 * iou.max(0).mean() < 17
    # the mean colour of a class is no guide either: nearest class mean is right for few pixels
    means = np.stack([colours[labels == c].mean(0) for c in range(9)])
    hits = ((colours[:, None] - means) ** 2).sum(2).argmin(1) == labels
    assert np.mean([hits[labels == c].mean() for c in range(9)]) < 0.25


def test_make_backbone_end_to_end(tmp_path):
    torch.manual_seed(0)
    teacher, out = tmp_path / "teacher.pth", tmp_path / "student.pth"
    torch.save(stego.VisionTransformer(4, 24, 1, 2, image_size=32).state_dict(), teacher)
    command = [sys.executable, "assets/make_backbone.py", "--teacher", str(teacher), "--out", str(out), "--images", "16",
               "--steps", "6", "--batch", "8", "--dim", "32", "--depth", "1", "--cache", str(tmp_path / "cache")]
    first = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert first.returncode == 0, first.stderr
    state = torch.load(out, weights_only=True)
    assert all(value.dtype == torch.float16 for value in state.values())
    student = stego.load_backbone(str(out))
    assert student(torch.zeros(1, 3, 128, 128)).shape == (1, 32, 16, 16)
    # again, from the cache: the same weights
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert again.returncode == 0 and "teacher 16/16" not in again.stdout
    assert all(torch.equal(value, state[key]) for key, value in torch.load(out, weights_only=True).items())


def test_the_weights_that_are_shipped():
    path = stego.BACKBONES["vit_tiny_scenes"]
    assert path.stat().st_size <= 4_000_000
    state = torch.load(path, weights_only=True)
    assert all(torch.is_tensor(value) and value.dtype == torch.float16 for value in state.values())
    assert all(value.isfinite().all() for value in state.values())
    backbone = stego.load_backbone("vit_tiny_scenes")
    assert (backbone.patch_size, backbone.embed_dim, backbone.num_heads) == (8, 192, 3)
