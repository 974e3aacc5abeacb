"""What GPUs meet, as far as a CPU can show it."""
import sys

import pytest
import torch
from conftest import IMAGES, train_here

import data
import evaluate
import stego


@pytest.mark.parametrize("crop, batches", [("none", [32, 4]), ("five", [30] * 6)])
def test_the_backbone_sees_at_most_32_views_at_once(crop, batches, workplace):
    model, seen = stego.Stego(stego.load_backbone("vit.pth"), 5, 3), []
    model.backbone.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    images = data.load_collection("directory", "images", "train", 3)
    images.images, images.labels = 3 * images.images, 3 * images.labels
    data.extract_features(model, images, 32, crop)
    assert seen == batches


def test_copies_wait_but_on_cuda_and_checkpoints_are_read_to_the_cpu(workplace, monkeypatch):
    """Elsewhere a copy that does not wait reads memory that is already another's (pytorch 189690)."""
    to, load, read_to, waits = torch.Tensor.to, torch.load, [], []

    def noting_to(tensor, *arguments, **options):
        waits.append(not options.get("non_blocking") and True not in arguments)
        return to(tensor, *arguments, **options)

    def noting_load(*arguments, **options):
        read_to.append(options["map_location"])
        return load(*arguments, **options)
    monkeypatch.setattr(torch.Tensor, "to", noting_to)
    monkeypatch.setattr(torch, "load", noting_load)
    train_here(monkeypatch, *IMAGES, "--name", "t", "--steps", "2")
    train_here(monkeypatch, "--resume", "t", "--steps", "4")
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "runs/t", "--no-crf"])
    evaluate.main()
    assert all(waits) and len(waits) > 12
    assert len(read_to) >= 4 and all(torch.device(place).type == "cpu" for place in read_to)
