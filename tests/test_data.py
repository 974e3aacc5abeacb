"""data.py: reading images and labels, layouts, views, the feature cache, neighbours."""
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as nnf
import torchvision.transforms.functional as TF
from conftest import ROOT, save_image, save_label
from PIL import Image

import data
import stego


def png_header(width, height):
    """A PNG file that promises so many pixels and holds a few."""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), (b"IDAT", zlib.compress(bytes(99))),
              (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(struct.pack(">I", len(content)) + kind + content + struct.pack(
        ">I", zlib.crc32(kind + content)) for kind, content in chunks)


def truncate(path, **options):
    Image.effect_noise((300, 200), 90).save(path, "JPEG", **options)
    os.truncate(path, path.stat().st_size * 9 // 10)


BAD = {"truncated": truncate, "truncated progressive": lambda path: truncate(path, progressive=True),
       "no bytes": lambda path: path.write_bytes(b""), "text": lambda path: path.write_text("a picture of a cat"),
       "half a header": lambda path: path.write_bytes(b"\xff\xd8\xff\xe0 truncated"),
       "20,000 x 20,000": lambda path: path.write_bytes(png_header(20_000, 20_000)),
       "10,000 x 10,000": lambda path: path.write_bytes(png_header(10_000, 10_000)),
       "floats": lambda path: Image.fromarray(np.random.rand(9, 9).astype(np.float32)).save(path, "TIFF"),
       "broken link": lambda path: path.symlink_to("nowhere.jpg"), "folder": lambda path: path.mkdir()}


# ---- images and labels ----

@pytest.mark.parametrize("mode, name", [("RGB", "x.png"), ("RGB", "x.jpg"), ("L", "x.png"), ("P", "x.png"), ("RGBA", "x.png"),
                                        ("LA", "x.png"), ("CMYK", "x.jpg"), ("1", "x.png"), ("P", "x.gif"),
                                        ("CMYK", "x.tif"), ("LAB", "x.tif"), ("RGB", "zo\u00eb\n\u5199\u771f.png")])
def test_every_kind_of_image_becomes_rgb(mode, name, tmp_path):
    save_image(tmp_path / name, mode=mode)
    image = data.read_image(tmp_path / name)
    assert image.mode == "RGB" and image.size == (40, 30)


@pytest.mark.filterwarnings("error")
def test_of_what_moves_the_first_picture_is_read_and_of_what_shines_through_the_colours(tmp_path):
    first, second = (Image.fromarray(np.full((30, 40, 3), value, np.uint8)) for value in (51, 204))
    first.save(tmp_path / "moving.gif", save_all=True, append_images=[second])
    first.convert("P").save(tmp_path / "through.png", transparency=bytes(range(256)))
    for name in ("moving.gif", "through.png"):
        assert np.array_equal(np.asarray(data.read_image(tmp_path / name)), np.asarray(first))


def test_16_bit_grey_keeps_its_upper_bits(tmp_path):
    grey = np.array([[0, 256 * 7, 65535]], np.uint16)
    Image.fromarray(grey).save(tmp_path / "deep.png")
    assert np.asarray(data.read_image(tmp_path / "deep.png"))[0, :, 0].tolist() == [0, 7, 255]


def test_exif_rotation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned by 90 degrees
    Image.new("RGB", (40, 30)).save(tmp_path / "turned.jpg", exif=exif)
    assert data.read_image(tmp_path / "turned.jpg").size == (30, 40)


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("draft", [False, True])
@pytest.mark.filterwarnings("ignore:Image size")  # data.py ignores it, but pytest does not
def test_an_unreadable_image_is_named_on_one_line(kind, draft, tmp_path):
    path = tmp_path / "b\nad\x1b.jpg"
    BAD[kind](path)
    with pytest.raises(stego.InputError, match=r"b\\nad\\x1b.jpg: not a readable image \(.") as error:
        data.read_image(path, draft)
    assert str(error.value).count("jpg") == 1 and str(error.value).isprintable()


def test_a_file_without_permission_is_named(tmp_path):
    save_image(tmp_path / "secret.jpg")
    (tmp_path / "secret.jpg").chmod(0)
    try:
        os.seteuid(os.geteuid() or 65534)  # root may read everything
        with pytest.raises(stego.InputError, match="secret.jpg: not a readable image .*Permission denied"):
            data.read_image(tmp_path / "secret.jpg")
    finally:
        os.seteuid(os.getuid())


def test_pillow_does_not_warn_of_large_images(tmp_path):
    (tmp_path / "large.png").write_bytes(png_header(10_000, 10_000))
    result = subprocess.run([sys.executable, "-W", "error:Image size", "-c", "import data; data.read_image('large.png')"],
                            env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False)
    assert "truncated" in result.stderr.splitlines()[-1] and "warn" not in result.stderr.lower()


def test_ids_outside_the_classes_are_void(tmp_path):
    save_label(tmp_path / "l.png", np.array([[0, 3, 4, 255]], np.uint8))
    save_label(tmp_path / "deep.png", np.array([[0, 3, 4, 700]], np.uint16))
    for name in ("l.png", "deep.png"):
        assert data.read_label(tmp_path / name, 4).tolist() == [[0, 3, 255, 255]]


@pytest.mark.parametrize("name, pixels", [("l.png", np.zeros((3, 4, 3), np.uint8)), ("l.tif", np.zeros((3, 4), np.float32))])
def test_a_label_of_colours_or_fractions_is_refused(name, pixels, tmp_path):
    save_label(tmp_path / name, pixels)
    with pytest.raises(stego.InputError, match=f"{name}.*class id"):
        data.read_label(tmp_path / name, 4)


# ---- the directory layout ----

def test_directory_pairs_by_stem_and_reads_class_names(folder):
    (folder / "classes.txt").write_text("sky\nroad\n\ntree\n")
    train, val = data.Directory(folder, "train"), data.Directory(folder, "val")
    assert (len(train), len(val)) == (3, 1) and train.has_labels and not val.has_labels
    assert train.names == ["sky", "road", "tree"] and train.n_classes == 3
    for i in range(3):
        ids = np.random.default_rng(i).integers(0, 4, (30, 40), np.uint8)
        assert np.array_equal(train.label(i), np.where(ids < 3, ids, data.VOID))
    assert val.label(0) is None


def test_a_plain_folder_of_photos_is_enough(tmp_path):
    save_image(tmp_path / "deep/er/one.jpg")
    save_image(tmp_path / "two.PNG")
    (tmp_path / "notes.txt").write_text("no image")
    for split in ("train", "val"):
        photos = data.Directory(tmp_path, split, n_classes=5)
        assert len(photos) == 2 and not photos.has_labels and photos.names[4] == "class 4"


def test_a_folder_that_cannot_be_listed_is_named(folder, monkeypatch):
    scandir = os.scandir

    def denied(path):  # chmod would not keep root out
        if Path(path).name == "sub":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", denied)
    with pytest.raises(stego.InputError, match="imgs/train/sub: Permission denied"):
        data.Directory(folder, "train", 4)


def test_labels_that_would_be_overlooked_are_named(folder):
    for path in (folder / "labels/train").rglob("*.png"):
        path.rename(path.with_suffix(".PNG"))
    assert data.Directory(folder, "train", 4).has_labels
    for path in (folder / "labels/train").rglob("*.PNG"):
        path.rename(path.with_suffix(".tif"))
    with pytest.raises(stego.InputError, match=r"a.tif: no label; they are .*labels/train/\*.png"):
        data.Directory(folder, "train", 4)


def test_links_to_folders_are_followed_but_not_in_circles(tmp_path):
    save_image(tmp_path / "elsewhere/a.jpg")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/linked").symlink_to(tmp_path / "elsewhere")
    assert [path.name for path in data.Directory(tmp_path / "photos", "train", 2).images] == ["a.jpg"]
    (tmp_path / "elsewhere/circle").symlink_to(tmp_path / "photos")
    (tmp_path / "elsewhere/itself").symlink_to(tmp_path / "elsewhere")
    assert len(data.Directory(tmp_path / "photos", "train", 2)) == 1


def test_without_val_the_training_images_are_evaluated(folder):
    (folder / "imgs/val/v.png").unlink()
    (folder / "imgs/val").rmdir()
    val = data.Directory(folder, "val", 4)
    assert val.split == "train" and len(val) == 3 and val.has_labels


def test_without_a_split_every_image_counts_but_no_label(folder):
    assert [path.relative_to(folder).as_posix() for path in data.Directory(folder, None, 1).images] == [
        "imgs/train/a.png", "imgs/train/b.jpg", "imgs/train/sub/c.png", "imgs/val/v.png"]
    assert len(data.Directory(folder / "labels", None, 1)) == 3


def test_directory_says_what_is_wrong(folder):
    with pytest.raises(stego.InputError, match="imgs/test: no images"):
        data.Directory(folder, "test", 4)
    with pytest.raises(stego.InputError, match="no such folder"):
        data.Directory(folder / "nowhere", "train", 4)
    with pytest.raises(stego.InputError, match="--num-classes"):
        data.Directory(folder, "train")
    save_image(folder / "imgs/train/a.jpg")
    save_image(folder / "imgs/train/a.k.jpg")  # sorts between the two that clash
    with pytest.raises(stego.InputError, match="same name"):
        data.Directory(folder, "train", 4)
    (folder / "labels/train").rename(folder / "labels/other")  # now it does not matter
    assert len(data.Directory(folder, "train", 4)) == 5
    (folder / "imgs/train/a.jpg").unlink()
    save_label(folder / "labels/train/a_mask.png", np.zeros((30, 40), np.uint8))
    with pytest.raises(stego.InputError, match="labels/train: no label has the name of an image .* like a.k.png"):
        data.Directory(folder, "train", 4)
    (folder / "empty").mkdir()
    with pytest.raises(stego.InputError, match="no images"):
        data.Directory(folder / "empty", "train", 4)


def test_class_colours_are_distinct_and_never_black():
    colours = {tuple(colour) for colour in data.class_palette(256).tolist()}
    assert len(colours) == 256 and (0, 0, 0) not in colours


# ---- the check of all files ----

@pytest.mark.filterwarnings("ignore:Image size")
def test_all_bad_files_are_named_together_and_left_out_when_asked_for(folder, tmp_path, capsys):
    for i, kind in enumerate(BAD.keys() - {"folder"}):
        BAD[kind](folder / f"imgs/train/bad{i}.jpg")
    (folder / "imgs/train/folder.jpg").mkdir()
    os.mkfifo(folder / "imgs/train/pipe.jpg")  # whoever opened it would wait for ever
    (folder / "labels/train/b.png").write_bytes(b"")
    (folder / "imgs/val/v.png").write_bytes(b"")
    save_image(folder / "imgs/val/w.png")
    def load():
        return [data.Directory(folder, split, 4) for split in ("train", "val")]
    with pytest.raises(stego.InputError) as error:
        data.check_files(load(), tmp_path / "cache", 2)
    assert str(error.value).startswith("11 bad files: ") and str(error.value).endswith(
        "; and 1 more; mend or remove them, or leave them out with --skip-bad")
    assert all(f"bad{i}.jpg: not a readable image" in str(error.value) for i in range(9))
    assert "labels/train/b.png: not a readable label" in str(error.value)

    train, val = load()
    data.check_files((train, val), tmp_path / "cache", 2, skip_bad=True)
    assert [path.name for path in train.images] == [path.name for path in train.labels] == ["a.png", "c.png"]
    assert [path.name for path in val.images] == ["w.png"] and "left out 11 bad files: " in capsys.readouterr().out
    (folder / "imgs/val/w.png").write_bytes(b"")
    with pytest.raises(stego.InputError, match="w.png"):  # nothing would be left
        data.check_files([data.Directory(folder, "val", 4)], tmp_path / "cache", 2, skip_bad=True)


def test_what_was_checked_is_not_read_again_but_for_what_was_bad(folder, tmp_path, monkeypatch, capsys):
    read, seen, denied = data.read_image, [], {"a.png"}

    def reader(path, draft=False):
        seen.append(path.name)
        if path.name in denied:
            raise stego.InputError(f"{path}: Permission denied")
        return read(path, draft)

    monkeypatch.setattr(data, "read_image", reader)
    def check(**options):
        return data.check_files([data.Directory(folder, "train", 3)], tmp_path / "cache", 1, **options)
    for expected in (["a.png", "b.jpg", "c.png"], ["a.png"]):
        with pytest.raises(stego.InputError, match="a.png: Permission denied"):
            check()
        assert seen == expected
        seen.clear()
    denied.clear()  # as chmod does, which leaves the time of the file
    for expected in (["a.png"], []):
        capsys.readouterr()
        check()
        assert seen == expected and "pixels of the labels have ids of 3 and more" in capsys.readouterr().out
        seen.clear()
    os.utime(folder / "imgs/train/b.jpg", ns=(1, 1))
    check()
    assert len(seen) == 3


def test_a_check_that_was_damaged_is_done_again(folder, tmp_path):
    def check():
        return data.check_files([data.Directory(folder, "train", 4)], tmp_path / "cache", 1)
    check()
    path, = (tmp_path / "cache").glob("*.json")
    whole = path.read_text()
    for damaged in (whole[:-9], "", "{}", "[]", "3"):
        path.write_text(damaged)
        check()
        assert path.read_text() == whole


@pytest.mark.parametrize("ids, told", [
    (np.full((30, 40), 2, np.uint8), "no label shows class 0, class 1, class 3"),
    (np.full((30, 40), 2, np.uint16), "no label shows class 0, class 1, class 3"),
    (np.full((30, 40), 255, np.uint8), "all labels are void"),
    (np.full((30, 40), 700, np.uint16), "3,600 pixels of the labels have ids of 4 and more"),
    (np.arange(1200, dtype=np.uint16).reshape(30, 40) % 4, ""),
    (np.arange(1200, dtype=np.uint16).reshape(30, 40) % 5, "720 pixels of the labels have ids of 4 and more")])
def test_what_is_odd_about_labels_is_told_once(ids, told, folder, tmp_path, capsys):
    for name in ("a", "b", "sub/c"):
        save_label(folder / f"labels/train/{name}.png", ids)
    train = data.Directory(folder, "train", 4)
    data.check_files((train, data.Directory(folder, "train", 4)), tmp_path / "cache", 1)  # as without imgs/val
    out = capsys.readouterr().out
    assert out.count("warning: ") == out.count("\n") == bool(told) + ("700" in str(ids)) and told in out
    assert train.has_labels == (ids < 4).any()


def test_labels_that_are_missing_are_counted_and_the_others_used(folder, tmp_path, capsys):
    (folder / "labels/train/b.png").unlink()
    train = data.Directory(folder, "train", 4)
    data.check_files([train], tmp_path / "cache", 1)
    assert "train: labels: 2 of 3 images" in capsys.readouterr().out and train.has_labels
    assert [(data.Views(train, 16)[i][1] == data.VOID).all().item() for i in range(3)] == [False, True, False]
    train.leave_out({0, 2})
    assert len(train) == 1 and not train.has_labels


# ---- views ----

def test_five_crop_cuts_the_full_size_image_before_it_is_resized():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 120, 3), np.uint8))
    parts = TF.five_crop(image, (45, 60))
    views = data.views(image, 32, "five")
    assert len(views) == 5
    for part, view in zip(parts, views):
        expected = part.resize((42, 32), Image.Resampling.NEAREST).crop((5, 0, 37, 32))
        assert np.array_equal(np.asarray(view), np.asarray(expected))


@pytest.mark.parametrize("width, height", [(1, 1), (1, 50), (301, 7), (32, 32), (33, 47)])
@pytest.mark.parametrize("crop", ["none", "five"])
def test_views_of_odd_sizes_are_square(width, height, crop):
    assert all(view.size == (32, 32) for view in data.views(Image.new("RGB", (width, height)), 32, crop))


def test_the_view_of_a_line_takes_no_gigabytes(monkeypatch):
    line, sizes, resize = Image.fromarray(np.arange(5000, dtype=np.uint16).astype(np.uint8)[:, None]), [], TF.resize
    monkeypatch.setattr(data.TF, "resize", lambda image, *how: sizes.append(image.size) or resize(image, *how))
    view = data.square_view(line, 32)
    assert sizes == [(1, 8)] and (np.asarray(view) == 2500 % 256).any()  # the middle of it


def test_labels_go_through_the_same_view_as_their_image(folder):
    train = data.Directory(folder, "train", 4)
    train.image = lambda i: Image.fromarray(np.stack([train.label(i)] * 3, -1))
    for crop in ("none", "five"):
        images, labels = data.Views(train, 16, crop)[0]
        assert torch.equal(images[:, 0], labels)


def test_a_label_of_another_size_is_named_with_both_sizes(folder):
    save_label(folder / "labels/train/b.png", np.zeros((10, 20), np.uint8))
    with pytest.raises(stego.InputError, match=r"b.jpg.*40 x 30.*20 x 10"):
        list(data.batches(data.Views(data.Directory(folder, "train", 4), 16), 2, 0))
    with pytest.raises(stego.InputError, match=r"1 bad file: .*b.jpg.*40 x 30.*20 x 10"):
        data.check_files([data.Directory(folder, "train", 4)], folder / "cache", 1)


def test_all_bad_images_of_a_batch_are_named_together(folder):
    for name in ("a.png", "b.jpg"):
        (folder / "imgs/train" / name).write_bytes(b"broken")
    with pytest.raises(stego.InputError, match="a.png.*b.jpg"):
        list(data.batches(data.Views(data.Directory(folder, "train", 4), 16), 3, 1))


def test_round_to_patch():
    assert [data.round_to_patch(size, 14) for size in (224, 320, 1)] == [224, 322, 14]


# ---- features ----

@pytest.mark.parametrize("crop, per_image", [("none", 1), ("five", 5)])
@pytest.mark.parametrize("facet", ["token", "key"])
def test_cached_features_equal_a_straight_pass(folder, backbone, crop, per_image, facet, tmp_path):
    train = data.Directory(folder, "train", 4)
    features = data.extract_features(backbone, data.Views(train, 16, crop), facet, cache_dir=tmp_path / "cache", batch_size=2,
                                     workers=0)
    assert features.maps.shape == (3 * per_image, 16, 2, 2) and features.maps.dtype == torch.float16
    for i in range(3):
        images, labels = data.Views(train, 16, crop)[i]
        expected, rows = backbone(data.normalize(images), facet), slice(i * per_image, (i + 1) * per_image)
        torch.testing.assert_close(features.maps[rows].float(), expected, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(features.vectors[rows], expected.mean((2, 3)))
        assert torch.equal(features.labels[rows], labels)


@pytest.mark.parametrize("crop", ["none", "five"])
def test_live_features_are_those_of_the_cache_and_take_no_room(folder, backbone, crop, tmp_path):
    train = data.Directory(folder, "train", 4)
    views = data.Views(train, 16, crop)
    cached, live = (data.extract_features(backbone, views, cache_dir=tmp_path / "cache", mode=mode, workers=1)
                    for mode in ("cached", "live"))
    some = torch.tensor([2, 0, 2, 1])
    assert live.maps.shape == cached.maps.shape and len(live.maps) == len(cached.maps)
    torch.testing.assert_close(live.maps[some], cached.maps[some].float(), rtol=1e-3, atol=1e-3)  # float16
    assert torch.equal(live.labels[some], cached.labels[some]) and torch.equal(live.vectors, cached.vectors)
    assert {path.name for path in live.folder.iterdir()} == {"vectors.npy", "done.npy"}


def test_auto_keeps_the_maps_only_where_they_fit(folder, backbone, tmp_path, capsys):
    train = data.Directory(folder, "train", 4)
    def extract(name, gb):
        return data.extract_features(backbone, data.Views(train, 16), cache_dir=tmp_path / name, cache_gb=gb, workers=0)
    assert isinstance(extract("small", 1e-9).maps, data.Live)
    assert isinstance(extract("large", 1).maps, torch.Tensor)
    assert isinstance(extract("large", 1e-9).maps, torch.Tensor)  # they are there already
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()] == ["features live", *2 * ["features cached"]]


def test_a_file_that_breaks_after_the_extraction_is_named(folder, backbone, tmp_path):
    train = data.Directory(folder, "train", 4)
    live = data.extract_features(backbone, data.Views(train, 16), cache_dir=tmp_path / "cache", mode="live", workers=1)
    train.images[1].write_bytes(b"")
    with pytest.raises(stego.InputError, match=train.images[1].name):
        live.maps[torch.tensor([0, 1])]


def test_the_second_run_reads_no_image(folder, backbone, tmp_path, monkeypatch):
    train = data.Directory(folder, "train", 4)
    first = data.extract_features(backbone, data.Views(train, 16), cache_dir=tmp_path / "cache", workers=0)
    monkeypatch.setattr(data, "read_image", lambda path: pytest.fail("read an image"))
    second = data.extract_features(backbone, data.Views(train, 16), cache_dir=tmp_path / "cache", workers=0)
    assert torch.equal(first.maps, second.maps)


def test_a_killed_extraction_goes_on_where_it_was(folder, backbone, tmp_path, monkeypatch):
    train = data.Directory(folder, "train", 4)
    def extract(where):
        return data.extract_features(backbone, data.Views(train, 16), cache_dir=where, batch_size=1, workers=0)
    undisturbed = extract(tmp_path / "one")
    monkeypatch.setattr(data.time, "monotonic", iter(range(0, 10 ** 6, 10)).__next__)  # progress after every batch
    read, done = data.read_image, []
    monkeypatch.setattr(data, "read_image", lambda path: done.append(path) or (read(path) if len(done) < 3 else 1 / 0))
    with pytest.raises(ZeroDivisionError):
        extract(tmp_path / "two")
    assert len(done) == 3 and not [path for path in (tmp_path / "two").iterdir() if path.suffix not in (".partial", ".lock")]
    monkeypatch.setattr(data, "read_image", lambda path: done.append(path) or read(path))
    resumed = extract(tmp_path / "two")
    assert len(done) == 4  # only the third image was read again
    assert torch.equal(resumed.maps, undisturbed.maps) and torch.equal(resumed.labels, undisturbed.labels)


def test_features_that_are_no_numbers_or_overflow_float16_stop_the_run(folder, backbone, tmp_path):
    train = data.Directory(folder, "train", 4)
    for value in (float("nan"), 1e6):
        backbone.norm.bias.data.fill_(value)
        with pytest.raises(stego.InputError, match="features"):
            data.extract_features(backbone, data.Views(train, 16), cache_dir=tmp_path, workers=0)


def test_another_file_weight_size_crop_or_facet_is_another_cache(folder, backbone):
    def key(size=16, crop="none", facet="token", bfloat16=False):
        return data.cache_key(
            backbone, data.Views(data.Directory(folder, "train", 4), size, crop), facet, bfloat16)
    original = key()
    assert key() == original
    seen = {original, key(size=32), key(crop="five"), key(facet="key"), key(bfloat16=True)}
    os.utime(folder / "imgs/train/a.png", ns=(1, 1))
    seen.add(key())
    save_image(folder / "imgs/train/a.png", seed=7)
    seen.add(key())
    save_label(folder / "labels/train/a.png", np.zeros((30, 40), np.uint8))
    seen.add(key())
    (folder / "imgs/train/a.png").rename(folder / "imgs/train/z.png")
    seen.add(key())
    backbone.norm.bias += 1
    seen.add(key())
    assert len(seen) == 10


# ---- neighbours ----


def test_the_features_of_unlabelled_photos_do_not_depend_on_the_number_of_classes(folder, backbone):
    def key(split, n_classes):
        return data.cache_key(backbone, data.Views(data.Directory(folder, split, n_classes), 16), "token", False)
    assert key("val", 4) == key("val", 9) and key("train", 4) != key("train", 9)


def test_nearest_neighbors_equal_brute_force_and_leave_the_item_out(monkeypatch):
    vectors = torch.randn(50, 8) * torch.rand(50, 1) * 10
    similarity = nnf.cosine_similarity(vectors[:, None], vectors[None], dim=2).fill_diagonal_(-2)
    expected = similarity.argsort(1, descending=True)[:, :7]
    assert torch.equal(data.nearest_neighbors(vectors, 7), expected)


def test_nearest_neighbors_do_not_depend_on_the_blocks():
    vectors = torch.randn(9000, 4)  # three blocks
    few = data.nearest_neighbors(vectors, 3)
    for i in (0, 3727, 3728, 8999):
        similarity = nnf.cosine_similarity(vectors[i:i + 1], vectors)
        similarity[i] = -2
        assert few[i].tolist() == similarity.topk(3).indices.tolist()


def test_rows_of_nearest_neighbors_are_rows_of_all():
    vectors = torch.randn(50, 8)
    parts = [data.nearest_neighbors(vectors, 3, slice(start, stop)) for start, stop in ((0, 17), (17, 50), (50, 50))]
    assert torch.equal(torch.cat(parts), data.nearest_neighbors(vectors, 3))


@pytest.mark.parametrize("k", [0, 5, 6])
def test_impossible_numbers_of_neighbors_are_refused(k):
    with pytest.raises(ValueError, match="neighbours"):
        data.nearest_neighbors(torch.randn(5, 3), k)


def test_scenes_are_a_labelled_collection_with_disjoint_splits():
    train, dev, val = (data.Scenes(split) for split in ("train", "dev", "val"))
    assert len(train) == 1000 and len(dev) == len(val) == 200 and train.has_labels
    assert train.label(0).max() < train.n_classes == len(train.names) == len(train.palette)
    assert len({collection.image(0).tobytes() for collection in (train, dev, val)}) == 3
