"""Every reader of files on thousands of damaged ones: it gives what it promises or raises InputError, and nothing else.

The inputs are read in another process, in which a warning is an error, memory is limited and an input that takes long ends
it: so a crash of the interpreter, a hang and an allocation without bounds are seen, too. FOLDER/KIND/last names the input
that did it. Deterministic by seed; by hand: python tests/test_fuzz.py FOLDER SEED COUNT KIND ...
"""
import argparse
import contextlib
import copy
import faulthandler
import functools
import io
import itertools
import json
import os
import pickletools
import random
import shutil
import struct
import subprocess
import sys
import traceback
import warnings
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from test_published import authors_weights, write_authors_checkpoint

import data
import evaluate
import stego
import train

# ---- damage ----

NUMBERS = (0, 1, 2, 7, 0x7f, 0x80, 0xff, 0x7fff, 0xffff, 0x7fffffff, 0x80000000, 0xffffffff)
VALUES = (None, True, -1, 0, 1.5, 10 ** 9, 10 ** 400, float("nan"), float("inf"), "", "x", "auto", "\ud800", [], {}, [[]],
          {"a": [None]}, [1, "x"], functools.reduce(lambda inner, _: [inner], range(60), []))


def damaged_bytes(rng, content, start=0):
    """One to three of the things that happen to bytes, after `start`."""
    content = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 3))):
        i, j = sorted(rng.randrange(start, len(content) + 1) for _ in range(2))
        n = min(rng.choice((1, 2, 4, 8, 64)), len(content) - i)
        what = rng.randrange(9)
        if what == 0 and i < len(content):
            content[i] ^= 1 << rng.randrange(8)
        elif what == 1:
            content[i:i + n] = rng.randbytes(n)
        elif what == 2:
            content[i:i + n] = (rng.choice(NUMBERS) % 256 ** n).to_bytes(n, rng.choice(("little", "big")))
        elif what == 3:
            content[i:i] = rng.randbytes(n)
        elif what == 4:
            del content[i:i + n]
        elif what == 5:
            del content[i:j]
        elif what == 6:
            content[i:i] = content[i:j]
        elif what == 7:
            content[i:i + n], content[j:j + n] = content[j:j + n], content[i:i + n]
        elif what == 8 and rng.random() < 0.5:
            del content[i:]
    return bytes(content)


def damaged_png(rng, content):
    """A PNG of which one chunk is damaged and its checksum right again."""
    chunks, position = [], 8
    while position < len(content):
        n = struct.unpack(">I", content[position:position + 4])[0]
        chunks.append([content[position + 4:position + 8], content[position + 8:position + 8 + n]])
        position += n + 12
    chosen = rng.randrange(len(chunks))
    if rng.random() < 0.2:
        chunks.insert(rng.randrange(len(chunks)), chunks[chosen])
    elif rng.random() < 0.2:  # a bomb: 10 MB in 10 kB
        chunks.insert(1, [rng.choice((b"zTXt", b"iCCP")), b"a\0\0" + zlib.compress(bytes(10 ** 7))])
    elif chunks[chosen][0] == b"IDAT":
        chunks[chosen][1] = zlib.compress(damaged_bytes(rng, zlib.decompress(chunks[chosen][1])))
    else:
        chunks[chosen][1] = damaged_bytes(rng, chunks[chosen][1])
    return content[:8] + b"".join(struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
                                  for name, body in chunks)


def damaged_pickle(rng, content):
    """A pickle of which some opcodes are dropped, doubled, moved or have another argument."""
    starts = [position for *_, position in pickletools.genops(content)] + [len(content)]
    codes = [content[i:j] for i, j in itertools.pairwise(starts)]
    for _ in range(rng.choice((1, 1, 2, 4))):
        i, j = rng.randrange(len(codes)), rng.randrange(len(codes))
        what = rng.randrange(5)
        if what == 0:
            del codes[i]
        elif what == 1:
            codes.insert(i, codes[j])
        elif what == 2:
            codes[i], codes[j] = codes[j], codes[i]
        elif what == 3 and len(codes[i]) > 1:
            codes[i] = codes[i][:1] + damaged_bytes(rng, codes[i][1:])
        elif what == 4:
            number = rng.choice(NUMBERS)
            codes[i] = rng.choice((b"J" + struct.pack("<I", number), b"\x8a\x08" + struct.pack("<q", number * 10 ** 9), b"N",
                                   b"G" + struct.pack(">d", rng.choice((0.5, -1.0, 1e300, float("nan")))), b")", b"]", b"}",
                                   b"cargparse\nNamespace\n)R", b"r" + struct.pack("<I", number), b"\x85" * 1000,
                                   b"ctorch\nFloatStorage\n", b"X\x03\x00\x00\x00abc"))
    return b"".join(codes)


def damaged_zip(rng, content):
    """A zip file of which a member is damaged, mostly the pickle, dropped, doubled, or the whole packed."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    name = rng.choice([*members] + [name for name in members if name.endswith("data.pkl")] * 3 * len(members))
    if name.endswith("data.pkl"):
        members[name] = damaged_pickle(rng, members[name])
    elif rng.random() < 0.3:
        del members[name]
    elif members[name]:
        members[name] = damaged_bytes(rng, members[name])
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED if rng.random() < 0.1 else zipfile.ZIP_STORED) as archive:
        for name, member in members.items():
            archive.writestr(name, member)
    return out.getvalue()


def damaged_tree(rng, tree):
    """Puts another value in the place of one in dicts and lists, or takes it out."""
    node = [tree]
    while True:
        key = rng.choice(list(node) if isinstance(node, dict) else range(len(node)))
        if not isinstance(node[key], (dict, list)) or not node[key] or node[key] is not tree and rng.random() < 0.3:
            break
        node = node[key]
    if rng.random() < 0.15:
        del node[key]
    else:
        node[key] = copy.deepcopy(rng.choice(VALUES))  # or it would once be put into itself


def damaged_json(rng, content):
    rows = list(map(json.loads, content.decode().splitlines())) if b"\n{" in content else [json.loads(content)]
    damaged_tree(rng, rows)
    return "\n".join(map(json.dumps, rows)).encode(rng.choice(("utf-8", "utf-8", "utf-8", "utf-16")))


def damaged_tensors(rng, content):
    """What torch.save wrote with another value in it, or a tensor of other shape or type, or larger than the file."""
    tree = torch.load(io.BytesIO(content), weights_only=True)
    for _ in range(rng.choice((1, 1, 3))):
        damaged_tree(rng, tree)
    tensors = [(node, key) for node in every_dict(tree) for key in node if isinstance(node[key], torch.Tensor)]
    if tensors and rng.random() < 0.7:
        node, key = rng.choice(tensors)
        node[key] = rng.choice((
            torch.Tensor.cfloat, torch.Tensor.long, torch.Tensor.to_sparse, torch.Tensor.flatten, torch.Tensor.sum,
            lambda tensor: tensor[..., None], lambda tensor: tensor[..., :0], lambda tensor: tensor.transpose(0, -1),
            lambda tensor: torch.zeros(()).expand(10 ** 9, *tensor.shape), lambda tensor: tensor * float("nan"),
            lambda tensor: torch.empty_like(tensor, device="meta")))(node[key][None])
    return saved(tree, _use_new_zipfile_serialization=rng.random() < 0.8)


def every_dict(tree):
    if isinstance(tree, dict):
        yield tree
        for value in tree.values():
            yield from every_dict(value)


def damaged_array(rng, content):
    """The header of a .npy file damaged, or another array in its place."""
    if rng.random() < 0.7:
        return damaged_bytes(rng, content[:128]) + content[128:]
    out, array = io.BytesIO(), np.load(io.BytesIO(content))
    np.save(out, rng.choice((array[:-1], array[None], array.astype(np.float64), array.astype(object), array.ravel()[:0],
                             array.astype(np.int16) - 1, array.astype(array.dtype.newbyteorder(">")))))
    return out.getvalue()


def damaged(rng, name, content):
    """Damage of any bytes, or three times as often of what a file like this consists of."""
    ways = [damaged_bytes] + 3 * ([damaged_png] if name.endswith(".png") else [damaged_zip] if name.endswith(".ckpt") else
                                  [damaged_zip, damaged_tensors] if content[:2] == b"PK" else
                                  [damaged_json] if "json" in name else [damaged_array] if name.endswith(".npy") else [])
    return rng.choice(ways)(rng, content)


# ---- kinds of files: each writes valid ones into a folder and gives the function that reads one ----

def saved(value, **options):
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


def images(folder):
    pixels = np.random.default_rng(0).integers(0, 256, (24, 32, 3), np.uint8)
    rgb, exif = Image.fromarray(pixels), Image.Exif()
    exif[0x0112] = 6
    rgb.save(folder / "a.jpg", exif=exif)
    rgb.convert("CMYK").save(folder / "cmyk.jpg", progressive=True)
    rgb.save(folder / "a.png", exif=exif)
    rgb.convert("P").save(folder / "palette.png", transparency=b"\x00\x80")
    rgb.convert("LA").save(folder / "la.png")
    Image.fromarray(pixels[..., 0].astype(np.uint16) * 200).save(folder / "deep.png")
    rgb.save(folder / "a.gif", save_all=True, append_images=[rgb.rotate(90)])
    rgb.save(folder / "a.bmp")
    rgb.convert("P").save(folder / "palette.bmp")
    rgb.save(folder / "a.webp", exif=exif)
    for compression in ("raw", "tiff_lzw", "jpeg", "tiff_adobe_deflate"):
        rgb.save(folder / f"{compression}.tif", compression=compression)

    def read(path):
        image = data.read_image(path)
        assert image.mode == "RGB" and min(image.size) > 0 and np.asarray(image).dtype == np.uint8
    return read


def labels(folder):
    ids = np.random.default_rng(0).integers(0, 30, (24, 32), np.uint8)
    Image.fromarray(ids).save(folder / "l.png")
    palette = Image.fromarray(ids).convert("P")
    palette.save(folder / "p.png")
    Image.fromarray(ids.astype(np.uint16) * 3).save(folder / "deep.png")
    Image.fromarray(ids.astype(np.int32) - 1).save(folder / "signed.tif")
    Image.fromarray(ids > 3).save(folder / "bits.png")

    def read(path):
        label = data.read_label(path, 27)
        assert label.ndim == 2 and label.dtype == np.uint8 and (np.isin(label, [*range(27), 255])).all()
    return read


def mats(folder):
    import scipy.io
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 4), np.uint8)
    for version in ("4", "5"):
        for packed in (False, True):
            scipy.io.savemat(folder / f"{version}{packed}.mat", {"gt": pixels[..., 0], **(
                {"img": pixels, "more": {"a": [1, "b"]}} if version == "5" else {})}, format=version, do_compression=packed)

    def read(path):
        with contextlib.suppress(stego.InputError):
            assert data.read_image(path).mode == "RGB"
        assert data.read_label(path, 6).dtype == np.uint8
    return read


def lists(folder):
    """classes.txt of a folder, and a list of ids of VOC."""
    (folder / "classes.txt").write_text("sky\nroad\n\nBäume\n")
    (folder / "ids.txt").write_text("2007_000032\n2011_003276\n")
    home = folder / "VOCdevkit/VOC2012"
    for name in ("JPEGImages/2007_000032.jpg", "JPEGImages/2011_003276.jpg", "SegmentationClass/2007_000032.png",
                 "SegmentationClass/2011_003276.png", "ImageSets/Segmentation/train.txt"):
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).touch()

    def read(path):
        if path.name == "ids.txt":
            path.replace(home / "ImageSets/Segmentation/train.txt")
            collection = data.Published("voc", folder, "train")
        else:
            path.replace(home / "classes.txt")
            collection = data.Directory(home, "train")
        assert len(collection) and all(home in path.parents for path in collection.images)
        assert len(collection.names) == collection.n_classes == len(collection.palette)
    return read


def weights(folder):
    vit = stego.VisionTransformer(4, 16, 2, 1, image_size=8)
    registers = stego.VisionTransformer(4, 16, 1, 1, image_size=8, registers=2, layer_scale=True).state_dict()
    timm = {**registers, "pos_embed": registers["pos_embed"][:, 1:], "reg_token": registers["register_tokens"]}
    del timm["register_tokens"]
    teacher = {"teacher": {f"backbone.{key}": value for key, value in vit.state_dict().items()},
               "args": argparse.Namespace(arch="vit", lr=[1, 2.5])}
    for name, value in (("bare.pth", vit.state_dict()), ("registers.pth", registers), ("timm.pth", timm),
                        ("teacher.ckpt", teacher)):
        torch.save(value, folder / name)
    torch.save(vit.half().state_dict(), folder / "legacy.pth", _use_new_zipfile_serialization=False)

    def read(path):
        vit = stego.load_backbone(path)
        features = vit(torch.zeros(1, 3, 2 * vit.patch_size, 2 * vit.patch_size))
        assert features.shape == (1, vit.embed_dim, 2, 2) and features.dtype == torch.float32
    return read


def small_run(folder):
    """A finished run of three steps in folder/runs/t."""
    os.chdir(folder)
    torch.save(stego.VisionTransformer(4, 16, 1, 1, image_size=8).state_dict(), "vit.pth")
    for i in range(3):
        Path("imgs").mkdir(exist_ok=True)
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (8, 8, 3), np.uint8)).save(f"imgs/{i}.png")
    main(train, "--data-root imgs --num-classes 2 --backbone vit.pth --resolution 8 --eval-resolution 8 --code-dim 3 "
         "--batch-size 2 --steps 3 --log-every 1 --no-crf --name t --device cpu --workers 0")


def main(script, arguments):
    sys.argv = [script.__name__, *arguments.split()]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        script.main()


def checkpoints(folder):
    small_run(folder)
    os.replace("runs/t/checkpoint.pt", "own.pt")
    write_authors_checkpoint(folder / "theirs.ckpt", authors_weights(width=8)[0], dataset_name="directory", res=8)

    def read(path):
        shutil.rmtree("out", ignore_errors=True)
        main(evaluate, f"--checkpoint {path} --predict imgs/0.png --out out --eval-resolution 8 --no-crf --device cpu "
             "--workers 0")
    return read


def runs(folder):
    """All of a run's folder, and of its cache, that a later command reads."""
    small_run(folder)
    home, cache = folder / "runs/t", next((folder / "cache").glob("*/maps.npy")).parent
    checked = next(cache.parent.glob("*.checked.json"))
    valid = {path.name: path.read_bytes() for path in [*home.iterdir(), *cache.iterdir(), checked]
             if path.suffix in (".json", ".jsonl", ".pt", ".npy")}
    done = io.BytesIO()
    np.save(done, np.array([True, True, False]))
    for name, content in {**valid, "done.npy": done.getvalue()}.items():
        (folder / name).write_bytes(content)

    class Read(Exception):
        """All that is to be resumed has been read."""

    def stop(*args, **kwargs):
        raise Read

    train.ThreadPoolExecutor = stop

    def read(path):
        shutil.rmtree(cache.parent)
        cache.mkdir(parents=True)
        for name, content in {**valid, path.name: path.read_bytes()}.items():
            place = cache.parent if name == checked.name else home if (home / name).exists() else cache
            (place / name).write_bytes(content)
        if path.name == "done.npy":  # of an extraction that was interrupted
            cache.rename(f"{cache}.partial")
        if path.name in ("scores.json", "config.json"):
            with contextlib.suppress(stego.InputError):
                main(evaluate, "--compare runs/t")
        if path.name != "scores.json":
            with contextlib.suppress(Read):
                main(train, "--resume --name t --device cpu --workers 0")
    return read


KINDS = {kind.__name__: kind for kind in (images, labels, mats, lists, weights, checkpoints, runs)}


# ---- the process of one kind ----

def fuzz(kind, folder, seed, count):
    """Reads `count` damaged files. Returns how many were read, how many refused, and what else came of some."""
    folder.mkdir()
    torch.manual_seed(0)
    read = KINDS[kind](folder)
    seeds = {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file() and path.name != "vit.pth"}
    found = {"read": 0, "refused": 0, "failures": []}
    for n in range(-len(seeds), count):
        rng = random.Random(f"{seed} {n}")
        name = rng.choice(list(seeds)) if n >= 0 else list(seeds)[n]
        target = folder / f"input{n}" / name
        target.parent.mkdir()
        target.write_bytes(damaged(rng, name, seeds[name]) if n >= 0 else seeds[name])  # first those that are as they were
        (folder / "last").write_text(str(target))
        faulthandler.dump_traceback_later(30, exit=True)
        try:
            read(target)
            found["read"] += 1
        except stego.InputError as error:
            assert n >= 0, error
            found["refused"] += 1
        except Exception as error:  # noqa: BLE001, anything else is what we look for
            frames = [f"{Path(frame.filename).name}:{frame.lineno}" for frame in traceback.extract_tb(error.__traceback__)]
            found["failures"].append(f"{target}: {error!r:.200} {' '.join(frames[-8:])}")
            continue
        finally:
            faulthandler.cancel_dump_traceback_later()
        shutil.rmtree(target.parent)
    return found


def test_damaged_files_are_read_or_refused_and_nothing_else(tmp_path, long):
    # By hand alone: scipy's reader ends the process on some, and it is nothing that we could mend here.
    kinds = [kind for kind in KINDS if kind != "mats"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    process = subprocess.run([sys.executable, __file__, tmp_path, "0", "3000" if long else "50", *kinds],
                             capture_output=True, text=True, check=False, env=environment)
    assert process.returncode == 0, process.stderr[-3000:]
    found = json.loads(process.stdout.splitlines()[-1])
    assert not any(result["failures"] for result in found.values()), json.dumps(found, indent=1)
    assert all(result["read"] and result["refused"] for result in found.values()), found  # or nothing was tested
    print(found)


if __name__ == "__main__":
    with contextlib.suppress(ImportError, OSError):
        import resource  # where there is one
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + 3 * 10 ** 9,) * 2)
    warnings.simplefilter("error")
    base, seed, count, *kinds = sys.argv[1:]
    print(json.dumps({kind: fuzz(kind, Path(base) / kind, seed, int(count)) for kind in kinds}))
