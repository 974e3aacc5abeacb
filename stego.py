"""STEGO: unsupervised semantic segmentation by distilling feature correspondences.

Hamilton, Zhang, Hariharan, Snavely and Freeman, ICLR 2022, arXiv:2203.08414. This file is the paper, between its
settings and the reading and writing of models: a frozen self-supervised ViT gives dense features, a small head turns
them into compact codes, and the head is trained so that two points have similar codes where their features correspond.

    paper              here                         meaning
    f, g               features_a, features_b       frozen features of two images, (N, D, h, w)
    s, t               codes_a, codes_b             codes, s = head(f), (N, K, h, w)
    F, F^SC            F                            feature correspondences, and spatially centred
    S                  S                            code correspondences, the same cosine for codes
    L_corr             correspondence_loss          the loss of one pair of images
    x, x^knn, x^rand   self, knn, rand              the pairs (the authors' code: pos_intra, pos_inter,
                                                    neg_inter)
    lambda, b          lambdas, shifts              weight and shift of each of the three terms

"As the authors' code" refers to github.com/mhamilton723/STEGO at commit eb4d6b5, below src/.
"""
import argparse
import collections
import contextlib
import difflib
import errno
import fcntl
import hashlib
import http.client
import io
import os
import pickle
import zipfile
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as nnf  # so that F can be the paper's F
from torch import nn

VOID = 255  # label of pixels that are neither taught nor scored
DINO_URL, DINOV2_URL = "https://dl.fbaipublicfiles.com/dino/", "https://dl.fbaipublicfiles.com/dinov2/"
BACKBONES = {  # name -> address or file of the weights
    "vit_tiny_scenes": Path(__file__).parent / "assets/vit_tiny_scenes.pth",  # embedded; see its make_backbone.py
    "dino_vits16": DINO_URL + "dino_deitsmall16_pretrain/dino_deitsmall16_pretrain.pth",
    "dino_vits8": DINO_URL + "dino_deitsmall8_pretrain/dino_deitsmall8_pretrain.pth",
    "dino_vits8_300ep": DINO_URL + "dino_deitsmall8_300ep_pretrain/dino_deitsmall8_300ep_pretrain.pth",  # the authors'
    "dino_vitb16": DINO_URL + "dino_vitbase16_pretrain/dino_vitbase16_pretrain.pth",
    "dino_vitb8": DINO_URL + "dino_vitbase8_pretrain/dino_vitbase8_pretrain.pth",
    **{f"dinov2_{vit}{reg}": f"{DINOV2_URL}dinov2_{vit}/dinov2_{vit}{'_reg4' if reg else ''}_pretrain.pth"
       for vit in ("vits14", "vitb14", "vitl14") for reg in ("", "_reg")},
}


class InputError(ValueError):
    """A mistake in what the user gave: one sentence that names it and how to mend it. The scripts exit with 2."""

    def __str__(self):  # on one line, whatever the name of a file holds
        return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in super().__str__())


def one_of(names, name):
    """ "one of a, b, c", and which of these `name`, which is none of them, may have been meant to be."""
    close = difflib.get_close_matches(str(name), names)
    return f"one of {', '.join(names)}" + f" (did you mean {' or '.join(close)}?)" * bool(close)


class Number(NamedTuple):
    """What a setting may be: a number from low (included) to high (excluded), which NaN never is, or this word."""
    kind: type  # int or float
    low: float
    high: float = 10 ** 9
    word: str | None = None

    def __contains__(self, value):
        return value == self.word or type(value) in (int, self.kind) and self.low <= value < self.high

    def __call__(self, text):
        """The value that is typed as `text` on the command line."""
        with contextlib.suppress(ValueError):
            if (value := text if text == self.word else self.kind(text)) in self:
                return value
        kind = "an integer" if self.kind is int else "a number"
        word = f", or {self.word}" * bool(self.word)
        raise argparse.ArgumentTypeError(f"must be {kind} of at least {self.low} and less than {self.high}{word}, it is {text}")


POSITIVE, WEIGHT, RATE, SHIFT = Number(int, 1), Number(float, 0), Number(float, 0, 10), Number(float, -10, 10, "auto")

# All settings of a run: what holds where neither a preset nor an option says otherwise, what else it may be, and advice.
SETTINGS = {
    "data": {
        "dataset": ("directory", str, ("directory: imgs/{train,val} or just images; scenes, if there is no --data-root; "
                    "or cocostuff27, cocostuff15, cocostuff3, cityscapes, potsdam, voc")),
        "data_root": (None, str, "where the images are; without it a published data set says what it needs"),
        "num_classes": (None, Number(int, 1, VOID + 1), "of a directory: kinds of things to tell apart (see classes.txt)"),
        "skip_bad": (False, bool, "leave out images and labels that cannot be read"),
        "resolution": (224, POSITIVE, "side of the training views in pixels, rounded to whole patches"),
        "eval_resolution": (320, POSITIVE, "side of the evaluated views"),
        "crop": ("none", ("none", "five"), "five: an image's corners and centre at half size, for large or busy pictures")},
    "model": {
        "backbone": ("dino_vits8", str, f"a file of ViT weights, or one of {', '.join(BACKBONES)}"),
        "facet": ("token", ("token", "key"), "which features of the backbone: the last tokens, or keys"),
        "precision": ("auto", ("auto", "float32", "bfloat16"), "of the backbone; auto: bfloat16 where that is clearly faster"),
        "code_dim": (70, POSITIVE, "numbers in a code, the paper's K"),
        "dropout": (0.1, Number(float, 0, 1), "channel dropout of the features"),
        "num_clusters": (None, Number(int, 1, VOID + 1), "clusters to find (default: as many as classes)")},
    "objective": {  # the weights are those of the paper's Cityscapes model
        "lambda_self": (1.0, WEIGHT, "weight of the pairs with the image itself"),
        "lambda_knn": (0.577453483136995, WEIGHT, "weight of the pairs with a nearest neighbour"),
        "lambda_rand": (0.9058762625226623, WEIGHT, "weight of the pairs with random images"),
        "b_self": ("auto", SHIFT, "shift of the pairs with the image itself: they attract if F is more, repel if less"),
        "b_knn": ("auto", SHIFT, "with a neighbour; raise shifts if the codes collapse into one cluster, lower if scattered"),
        "b_rand": ("auto", SHIFT, "with random images; auto: from the features alone"),
        "same_class": (None, Number(float, 0, 1), "instead of shifts: the shares of these pairs that show one class"),
        "center": (False, bool, "centre the feature correspondences spatially"),
        "zero_clamp": (True, bool, "clamp the code correspondences at zero"),
        "stabilize": (False, bool, "and at 0.8 from above"),
        "neighbors": (7, POSITIVE, "how many nearest neighbours to draw the knn image from")},
    "run": {
        "steps": (2000, POSITIVE, "training steps"),
        "batch_size": (16, Number(int, 2), "images in a step, each with a neighbour, of all processes together"),
        "lr": (5e-4, RATE, "Adam's rate for the head"),
        "probe_lr": (5e-3, RATE, "Adam's rate for the probes"),
        "seed": (0, Number(int, 0, 2 ** 32), "of weights, batches, points and k-means"),
        "crf": (True, bool, "evaluate with the CRF too; it takes most of that time")},
}
EVERY_SETTING = {name: setting for group in SETTINGS.values() for name, setting in group.items()}
DEFAULTS = {name: default for name, (default, _, _) in EVERY_SETTING.items()}


def check_settings(settings, path):
    """Raises InputError where a setting of a run, read from the file `path`, is none that it may be."""
    for name, (default, kind, _) in EVERY_SETTING.items():
        value = settings.get(name, default)
        values = value if name == "same_class" and isinstance(value, list) and len(value) == 3 else [value]
        if not (value == default and type(value) is type(default)
                or all(type(value) is kind if isinstance(kind, type) else value in kind for value in values)):
            raise InputError(f"{path}: damaged, or of another program: the setting {name} is none that it can be")


# The settings of the paper's results, checked against the authors' configuration file and those in their checkpoints.
# code_dim is the paper's K; center is the spatial centring of F. "scenes" is the embedded default, ours; the rest is above.
PRESETS = {
    "scenes": {"dataset": "scenes", "backbone": "vit_tiny_scenes", "resolution": 128, "eval_resolution": 128, "steps": 400},
    "cocostuff27-vitb8": {
        "dataset": "cocostuff27", "backbone": "dino_vitb8", "crop": "five",
        "code_dim": 90, "batch_size": 32, "steps": 7000, "center": True,
        "lambda_self": 0.1, "lambda_knn": 1.0, "lambda_rand": 0.1538476246415498, "b_self": 0.12, "b_knn": 0.2, "b_rand": 1.0},
    "cocostuff27-vits8": {
        "dataset": "cocostuff27", "backbone": "dino_vits8_300ep", "crop": "five",
        "code_dim": 70, "batch_size": 16, "steps": 5000, "center": True,
        "lambda_self": 0.67, "lambda_knn": 0.25, "lambda_rand": 0.63, "b_self": 0.08, "b_knn": 0.02, "b_rand": 0.66},
    "cityscapes-vitb8": {
        "dataset": "cityscapes", "backbone": "dino_vitb8", "crop": "five",
        "code_dim": 100, "batch_size": 32, "steps": 7000, "center": False,
        "lambda_self": 1.0, "lambda_knn": 0.577453483136995, "lambda_rand": 0.9058762625226623,
        "b_self": 0.45828472207, "b_knn": 0.1754346515479633, "b_rand": 0.31361241889448443},
    "potsdam-vits8": {
        "dataset": "potsdam", "backbone": "dino_vits8_300ep", "crop": "none",
        "code_dim": 70, "batch_size": 16, "steps": 5000, "center": True,
        "lambda_self": 0.67, "lambda_knn": 0.25, "lambda_rand": 0.63, "b_self": 0.08, "b_knn": 0.02, "b_rand": 0.76},
}


# ---- Frozen backbone: f = ViT(x) ----

class Attention(nn.Module):
    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        N, T, D = x.shape
        q, k, v = self.qkv(x).reshape(N, T, 3, self.num_heads, D // self.num_heads).permute(2, 0, 3, 1, 4)
        x = nnf.scaled_dot_product_attention(q, k, v)  # (N, heads, T, D / heads)
        return self.proj(x.transpose(1, 2).reshape(N, T, D))

    def keys(self, x):
        D = x.shape[-1]
        return nnf.linear(x, self.qkv.weight[D:2 * D], self.qkv.bias[D:2 * D])  # (N, T, D), heads side by side


class LayerScale(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        return x * self.gamma


class Block(nn.Module):
    def __init__(self, dim, num_heads, layer_scale):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads)
        self.ls1 = LayerScale(dim) if layer_scale else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = nn.Sequential(collections.OrderedDict(
            fc1=nn.Linear(dim, 4 * dim), gelu=nn.GELU(), fc2=nn.Linear(4 * dim, dim)))
        self.ls2 = LayerScale(dim) if layer_scale else nn.Identity()

    def forward(self, x):
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class VisionTransformer(nn.Module):
    """The ViT of DINO (Caron et al. 2021) and DINOv2 (Oquab et al. 2023), with their state-dict names.

    patch_size, image_size in pixels: image_size is the side that the position embedding was made for, other
    sizes are interpolated. registers: extra tokens of the DINOv2 "_reg" models. layer_scale: as in DINOv2.
    """

    def __init__(self, patch_size, embed_dim, depth, num_heads, image_size=224, registers=0, layer_scale=False):
        super().__init__()
        if num_heads < 1 or embed_dim % num_heads:
            raise ValueError(f"embed_dim {embed_dim} cannot be split over {num_heads} heads")
        self.patch_size, self.embed_dim, self.num_heads, self.registers = patch_size, embed_dim, num_heads, registers
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, embed_dim, patch_size, stride=patch_size)})
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + (image_size // patch_size) ** 2, embed_dim))
        if registers:
            self.register_tokens = nn.Parameter(torch.zeros(1, registers, embed_dim))
        self.blocks = nn.ModuleList([Block(embed_dim, num_heads, layer_scale) for _ in range(depth)])
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        for parameter in (self.cls_token, self.pos_embed):
            nn.init.trunc_normal_(parameter, std=0.02)

    def position_embedding(self, h, w):
        """The position embedding for h x w patches, (1, 1 + h w, D), interpolated exactly as the weights expect."""
        side = int((self.pos_embed.shape[1] - 1) ** 0.5)
        if h == w == side:
            return self.pos_embed
        grid = self.pos_embed[:, 1:].reshape(1, side, side, -1).permute(0, 3, 1, 2)  # (1, D, side, side)
        if self.registers:  # DINOv2's register models were trained with antialiasing and without the 0.1
            grid = nnf.interpolate(grid, size=(h, w), mode="bicubic", antialias=True)
        else:  # DINO adds 0.1 against rounding, which moves every sampled position a little
            grid = nnf.interpolate(grid, scale_factor=((h + 0.1) / side, (w + 0.1) / side), mode="bicubic")
        return torch.cat([self.pos_embed[:, :1], grid.flatten(2).transpose(1, 2)], 1)

    def forward(self, images, facet="token"):
        """Dense features of the last block: final-norm patch tokens, or ("key") the last attention's keys.

        images: (N, 3, H, W), normalised with IMAGE_MEAN and IMAGE_STD of data.py, H and W multiples of the patch.
        Returns (N, D, H / patch, W / patch). Raises ValueError for other sizes or facets.
        """
        N, _, H, W = images.shape
        if H % self.patch_size or W % self.patch_size:
            raise ValueError(f"an image of {H} x {W} pixels cannot be cut into patches of {self.patch_size}")
        if facet not in ("token", "key"):
            raise ValueError(f"facet is 'token' or 'key', not {facet!r}")
        h, w = H // self.patch_size, W // self.patch_size
        patches = self.patch_embed["proj"](images).flatten(2).transpose(1, 2)  # (N, h w, D)
        x = torch.cat([self.cls_token.expand(N, -1, -1), patches], 1) + self.position_embedding(h, w)
        if self.registers:
            x = torch.cat([x[:, :1], self.register_tokens.expand(N, -1, -1), x[:, 1:]], 1)
        for block in self.blocks[:-1]:
            x = block(x)
        last = self.blocks[-1]
        x = self.norm(last(x)) if facet == "token" else last.attn.keys(last.norm1(x))
        return x[:, 1 + self.registers:].transpose(1, 2).reshape(N, self.embed_dim, h, w)


def vit_from_state_dict(state, num_heads=None):
    """A VisionTransformer that holds `state`, its architecture read off the shapes.

    state: DINO, DINOv2 or timm names -> tensors. num_heads defaults to D // 64, which holds for every published DINO
    and DINOv2 model. Raises InputError that names the key or shape which does not fit.
    """
    state = {key: value for key, value in state.items() if key != "mask_token"}  # DINOv2: used in pretraining only
    if any("rope" in key or key == "storage_tokens" for key in state):
        raise InputError("these are DINOv3 weights, whose rotary positions this ViT lacks; take DINO or DINOv2")
    try:
        if "reg_token" in state:  # timm's registers; it has added the class token's position to the class token itself
            state["register_tokens"] = state.pop("reg_token")
            state["pos_embed"] = nnf.pad(state["pos_embed"], (0, 0, 1, 0))  # which leaves zero as its position
        D, _, p, _ = state["patch_embed.proj.weight"].shape
        side = round((state["pos_embed"].shape[1] - 1) ** 0.5)
        depth = len({key.split(".")[1] for key in state if key.startswith("blocks.")})
        registers = state["register_tokens"].shape[1] if "register_tokens" in state else 0
        with torch.device("meta"):  # shapes alone, whatever they would take
            heads, scaled = num_heads or max(1, D // 64), "blocks.0.ls1.gamma" in state
            vit = VisionTransformer(p, D, depth, heads, side * p, registers, scaled)
        vit.load_state_dict({key: value.to(torch.float32, copy=True) for key, value in state.items()}, assign=True)
    except (LookupError, TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        reason = f"the weights lack {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
        raise InputError(f"not a DINO or DINOv2 ViT: {reason:.500}") from error
    return vit


def load_backbone(name_or_path, device="cpu"):
    """A frozen VisionTransformer in eval mode.

    name_or_path: a name of BACKBONES (downloaded once into torch.hub's cache) or a local file: a bare state dict with
    the names of DINO, DINOv2 or timm, or a DINO training checkpoint, of which the teacher is taken. Raises InputError
    that says what does not fit.
    """
    file = BACKBONES.get(str(name_or_path), name_or_path)
    mend = ""
    if str(file).startswith("http"):
        file, mend = download(file), "; delete that file, and the next run downloads it again"
    if not os.path.isfile(file):
        raise InputError(f"backbone {name_or_path}: neither a file nor {one_of(BACKBONES, name_or_path)}")
    try:
        state = read_tensors(file)
        if isinstance(state, dict) and isinstance(state.get("teacher"), dict):
            state = {key.removeprefix("module.").removeprefix("backbone."): value for key, value in state["teacher"].items()
                     if not key.startswith(("head.", "module.head."))}  # DINO's projection head
        check_weights(state, file)
        vit = vit_from_state_dict(state)
    except (InputError, AttributeError) as error:
        raise InputError(f"backbone {name_or_path}: {error}{mend}") from error
    return vit.to(device).eval().requires_grad_(False)


@torch.no_grad()
def frozen_features(backbone, images, facet="token", bfloat16=False):
    """backbone(images, facet) in float32, or with its matrix products in bfloat16 (autocast)."""
    with torch.autocast(images.device.type, torch.bfloat16, enabled=bfloat16):
        return backbone(images, facet).float()


# ---- Segmentation head: s = head(f) ----

class SegmentationHead(nn.Module):
    """Codes from features: a linear map plus a two-layer perceptron, both 1x1. (N, in_dim, h, w) -> (N, code_dim, h, w).

    Each branch sees the features through channel dropout of its own (as the authors' code, modules.py:109-111).
    """

    def __init__(self, in_dim, code_dim, dropout=0.1):
        super().__init__()
        self.dropout = nn.Dropout2d(dropout)
        self.linear = nn.Conv2d(in_dim, code_dim, 1)
        self.nonlinear = nn.Sequential(nn.Conv2d(in_dim, in_dim, 1), nn.ReLU(), nn.Conv2d(in_dim, code_dim, 1))

    def forward(self, features):
        return self.linear(self.dropout(features)) + self.nonlinear(self.dropout(features))


# ---- Correspondence distillation ----

def sample(maps, points):
    """Bilinear values of maps at points: out[n, :, i, j] = maps[n] at points[n, i, j].

    maps: (N, C, h, w). points: (N, p, q, 2) as (x, y) in [-1, 1], where -1 and 1 are the centres of the first and the
    last column or row; beyond them the border is repeated. Returns (N, C, p, q).
    """
    return nnf.grid_sample(maps, points, mode="bilinear", padding_mode="border", align_corners=True)


def unit(maps):
    """Vectors of length 1 along the channels, (N, C, h, w); shorter than 1e-10 they are divided by 1e-10.

    Written out because it is several times faster on a CPU than nnf.normalize along dimension 1.
    """
    return maps / maps.square().sum(1, keepdim=True).clamp(min=1e-20).sqrt()


def correlation(a, b):
    """Cosine of every position of a with every position of b (Eq. 1).

        out[n, h, w, i, j] = sum_c a[n, c, h, w] b[n, c, i, j] / (|a[n, :, h, w]| |b[n, :, i, j]|)

    a: (N, C, h, w). b: (N, C, i, j). Returns (N, h, w, i, j).
    """
    return torch.einsum("nchw,ncij->nhwij", unit(a), unit(b))


@torch.no_grad()
def feature_correspondence(a, b, center=True):
    """F, the cosines of features a (N, C, h, w) with b (N, C, i, j); with center centred spatially (Eq. 3),

        F <- F - mean_ij F + mean F

    so that a point that corresponds to everything stands out as little as one that corresponds to nothing. mean_ij is of
    the one point of a, mean of the whole batch. Returns (N, h, w, i, j).
    """
    F = correlation(a, b)
    # differs from the paper: the global mean is put back, as the authors' code, modules.py:330-333.
    return F - F.mean((3, 4), keepdim=True) + F.mean() if center else F


def correspondence_loss(features_a, features_b, codes_a, codes_b, shift,
                        center=True, zero_clamp=True, stabilize=False):
    """L_corr, elementwise: codes of corresponding points are pulled together, of others pushed apart (Eq. 4).

        F = cos(f_a, f_b)    S = cos(s_a, s_b)    L = -max(S, 0) (F - shift)

    Points attract where F > shift and repel where F < shift. The clamp at 0 leaves two codes alone once they are at
    right angles. center: F is centred, see feature_correspondence. zero_clamp=False: without the max. stabilize: S is
    also clamped from above at 0.8. No gradient flows to the features.

    All inputs (N, C, h, w), of b (N, C, i, j), sampled at the same points. Returns (L, S), both (N, h, w, i, j).
    """
    F = feature_correspondence(features_a, features_b, center)
    S = correlation(codes_a, codes_b)
    clamped = S.clamp(0.0 if zero_clamp else -torch.inf, 0.8 if stabilize else torch.inf)
    return -clamped * (F - shift), S


def derangement(n, device="cpu"):
    """A random permutation of 0..n-1 without fixed points: one random cycle through all. Raises ValueError for n < 2.

    # differs from the authors' code: theirs adds 1 to fixed points and so may repeat an image (modules.py:291-295).
    """
    if n < 2:
        raise ValueError("negatives need at least two images in a batch")
    order = torch.randperm(n, device=device)
    partner = torch.empty_like(order)
    partner[order] = order.roll(1)
    return partner


def stego_loss(features, features_knn, codes, codes_knn, lambdas, shifts,
               center=True, zero_clamp=True, stabilize=False, n_points=11, n_negatives=5):
    """STEGO's objective for a batch (Eq. 5).

        L = lambda_self L_corr(x, x) + lambda_knn L_corr(x, x^knn) + lambda_rand mean over negatives L_corr(x, x^rand)

    features, codes: of the images x, (N, D, h, w) and (N, K, h, w); *_knn of one nearest neighbour each. Of x the terms
    share one set of n_points x n_points uniformly random points, of x^knn and x^rand a second. x^rand are other images of
    the batch. lambdas, shifts: (self, knn, rand). Returns (L, {"self", "knn", "rand"}), scalars.
    """
    N, device = len(features), features.device
    points_a, points_b = (2 * torch.rand(N, n_points, n_points, 2, device=device) - 1 for _ in range(2))
    f_a, s_a = sample(features, points_a), sample(codes, points_a)
    f_b, s_b = sample(features_knn, points_b), sample(codes_knn, points_b)
    switches = {"center": center, "zero_clamp": zero_clamp, "stabilize": stabilize}

    loss_self = correspondence_loss(f_a, f_a, s_a, s_a, shifts[0], **switches)[0].mean()
    loss_knn = correspondence_loss(f_a, f_b, s_a, s_b, shifts[1], **switches)[0].mean()
    loss_rand = 0
    for _ in range(n_negatives):
        rand = derangement(N, device)
        # Image rand[n] is read at points_b[n]: sampled first, at the points of the inverse permutation, and permuted then,
        # which spares a copy of all maps.
        points = points_b[rand.argsort()]
        f_b, s_b = sample(features, points)[rand], sample(codes, points)[rand]
        loss_rand = loss_rand + correspondence_loss(f_a, f_b, s_a, s_b, shifts[2], **switches)[0].mean() / n_negatives

    terms = {"self": loss_self, "knn": loss_knn, "rand": loss_rand}
    return sum(weight * term for weight, term in zip(lambdas, terms.values(), strict=True)), terms


# ---- Shifts without tuning: as many pairs attract as seem to show the same class ----

def same_class_rates(F_self, F_knn, F_rand, n_classes):
    """Shares of the self, the knn and the rand pairs of points that show the same class, estimated without labels.

    Ours, not the paper's. It assumes that (1) two points of random images share one of n classes with a chance of

        pi_rand = n E[size^2] / (n E[size])^2 = 4 / (3 n)

    as if the sizes of classes lay evenly between nothing and twice their mean; (2) F of pairs of different classes has the
    same distribution in an image, in neighbours and in random images; (3) pairs of one class hardly ever lie below m, the
    median of F_rand. Then

        P(F_t <= m) / P(F_rand <= m) = (1 - pi_t) / (1 - pi_rand),    t = self, knn

    F_self, F_knn, F_rand: feature correspondences of random pairs of points of each kind, any shape. n_classes: n, which
    is taken to be the number of clusters. Returns (pi_self, pi_knn, pi_rand), none below pi_rand.
    """
    pi_rand = min(1, 4 / (3 * n_classes))
    m = F_rand.median()
    below = F_rand.le(m).float().mean()
    return tuple(max(pi_rand, 1 - (1 - pi_rand) * (F.le(m).float().mean() / below).item()) for F in (F_self, F_knn, F_rand))


# ---- Probes, trained on detached codes: they read the codes and teach the head nothing ----

class ClusterProbe(nn.Module):
    """Cosine k-means by gradient descent: the paper's minibatch k-means (as the authors' code, modules.py:134-161).

    centroids: (n_clusters, code_dim). forward(codes (N, K, h, w)) -> cosine with each centroid, (N, n_clusters, h, w).
    """

    def __init__(self, code_dim, n_clusters):
        super().__init__()
        self.centroids = nn.Parameter(torch.randn(n_clusters, code_dim))

    def forward(self, codes):
        return torch.einsum("nchw,kc->nkhw", unit(codes), nnf.normalize(self.centroids, dim=1))

    def loss(self, codes):
        """-mean max_k cos(code, centroid_k): each code pulls its nearest centroid. Scalar."""
        return -self(codes).amax(1).mean()


def linear_probe_loss(logits, labels):
    """Cross-entropy at the labels' resolution, void left out. logits: (N, n, h, w); labels: (N, H, W) uint8."""
    # Bilinear interpolation as two small matrix products, one image at a time: on a CPU three times faster than
    # nnf.interpolate of the batch, and in less memory.
    rows, columns = (nnf.interpolate(torch.eye(n, device=logits.device)[None], size, mode="linear")[0].T  # (size, n)
                     for n, size in zip(logits.shape[2:], labels.shape[1:]))
    total = sum(nnf.cross_entropy(rows @ image @ columns.T, label.long(), ignore_index=VOID, reduction="sum")
                for image, label in zip(logits.split(1), labels.split(1)))
    return total / (labels != VOID).sum().clamp(min=1)  # a batch without labels costs 0, not NaN


class Stego(nn.Module):
    """Backbone, head and probes. forward(images (N, 3, H, W)) -> codes (N, K, H / patch, W / patch).

    n_classes: classes of the labels that teach the linear probe, None without labels (linear_probe is then None).
    refit_probe holds centroids that k-means found on the finished codes, None before training ends.
    facet: which features the backbone gives, see VisionTransformer.forward. bfloat16: its matrix products in bfloat16,
    about twice as fast where the processor has it; head, probes and losses stay in float32.
    """

    def __init__(self, backbone, code_dim, n_clusters, n_classes=None, dropout=0.1, facet="token"):
        super().__init__()
        self.backbone = backbone.eval().requires_grad_(False)
        self.facet, self.bfloat16 = facet, False
        self.head = SegmentationHead(backbone.embed_dim, code_dim, dropout)
        self.cluster_probe = ClusterProbe(code_dim, n_clusters)
        self.refit_probe = None
        self.linear_probe = nn.Conv2d(code_dim, n_classes, 1) if n_classes else None

    def features(self, images):
        return frozen_features(self.backbone, images, self.facet, self.bfloat16)

    def forward(self, images):
        return self.head(self.features(images))


# ---- Files: what comes from elsewhere is read as data and never run as code; what is written is whole ----

class Record:
    """Stands for an object of a foreign class: what was stored in it, and nothing that it could do."""

    def __init__(self, *args):
        pass

    def __setstate__(self, state):  # also keeps pickle from setting attributes of this class
        if isinstance(state, dict):
            vars(self).update(state)


# What other programs' checkpoints hold beside tensors and plain data, all of it read as Records: the authors' and DINO's
# settings with the types of their values, Lightning's callbacks with their scores.
RECORD_PACKAGES = {"omegaconf", "pytorch_lightning", "lightning", "lightning_fabric", "torchmetrics", "typing", "numpy"}
RECORD_CLASSES = {"argparse.Namespace", *(f"builtins.{kind.__name__}" for kind in (
    bool, int, float, complex, str, bytes, list, tuple, dict, set))}


def harmless(name, path):
    """What stands for the class or function of this name in the file: never itself. Raises InputError for any other."""
    if name == "collections.defaultdict":
        return lambda *_: {}
    if name.endswith(".AttributeDict"):  # Lightning's, a dict; so is a Counter, which torch.load can fill
        return collections.Counter
    if name.partition(".")[0] in RECORD_PACKAGES or name in RECORD_CLASSES:
        return Record
    raise InputError(f"{path}: refused, because it asks for {name}, which is neither tensors nor settings; get the file from "
                     "those who made it")


def check_weights(state, path):
    """Raises InputError unless `state`, from this file, is str -> tensor of real numbers, all of which the file holds."""
    if not isinstance(state, dict) or not all(
            isinstance(key, str) and isinstance(value, torch.Tensor) and value.layout is torch.strided
            and value.is_floating_point() and not value.is_meta for key, value in state.items()):
        raise InputError("not a state dict of tensors")
    if sum(value.numel() * value.element_size() for value in state.values()) > os.path.getsize(path):
        raise InputError("the tensors are larger than the file")  # a stride of 0 makes any size of a single number


def read_tensors(path, device="cpu"):
    """What torch.save wrote, running no code from the file: tensors, plain data and Records.

    Raises InputError for any other file, and for one that tries to run code.
    """
    if not os.path.isfile(path):
        raise InputError(f"{path}: there is no such file")
    if str(path).endswith(".safetensors"):
        raise InputError(f"{path}: safetensors files are not read; where that package is installed, convert it once with "
                         f"torch.save(safetensors.torch.load_file({str(path)!r}), 'weights.pth')")
    try:
        # torch.load itself takes old files that are no zip files with tensors and plain data alone
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path) if zipfile.is_zipfile(path) else []
        with torch.serialization.safe_globals([(harmless(name, path), name) for name in names]):
            return torch.load(path, map_location=device, weights_only=True)
    except InputError:
        raise
    except Exception as error:  # whatever it is that bytes from anywhere lead to
        reason = (str(error) or repr(error)).splitlines()[0]
        if isinstance(error, pickle.UnpicklingError):  # torch goes on about how to run it all the same
            reason = "not tensors and settings alone; get the file from those who made it"
        raise InputError(f"{path}: not a readable file of PyTorch weights ({reason})") from error


@contextlib.contextmanager
def replacing(path):
    """Gives a temporary name to write to, and then puts that file in the place of `path`: never half-written there.

    Of a write that fails nothing is left, and the OSError names the file.
    """
    temporary = f"{path}.tmp"
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        error.filename = error.filename or str(path)
        raise
    finally:
        Path(temporary).unlink(missing_ok=True)


@contextlib.contextmanager
def lock(path, sentence, wait=True):
    """Locks `path`, a file for nothing else, against other processes for the body of a with, or until this process dies.

    Where another holds it, prints the sentence and waits, or raises it as InputError.
    """
    with open(path, "w") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # flock's would live on in the workers of a killed process
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):  # otherwise: a file system without locks
                if not wait:
                    raise InputError(sentence) from None
                print(sentence, flush=True)
                fcntl.lockf(file, fcntl.LOCK_EX)
        yield


def download(url):
    """The file of `url` in torch.hub's cache, fetched if it is not there. Raises InputError if that fails.

    torch.hub takes a connection that broke off for the end of the file, so a file gets its name once it could be read.
    """
    file = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    if file.is_file():
        return file
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with lock(f"{file}.lock", f"waiting for another run, which is downloading {url}"):
            if file.is_file():
                return file
            print(f"downloading {url}")
            for left in file.parent.glob(f"{file.name}.tmp.*.partial"):  # torch.hub's, of runs that were killed
                left.unlink()
            with replacing(file) as temporary:
                torch.hub.download_url_to_file(url, temporary)  # shows its progress
                read_tensors(temporary)
    except (OSError, http.client.HTTPException, InputError) as error:
        raise InputError(f"cannot download {url} ({error}); try again, or fetch it on another machine and put it into "
                         f"{file.parent}/") from error
    print(f"{file}: sha256 {hashlib.sha256(file.read_bytes()).hexdigest()}")  # we know of none published to compare it with
    return file


# ---- Checkpoints: one file that needs nothing else, the backbone and the configuration included ----

def save_checkpoint(path, model, config, **training):
    """Writes model, config (a dict of plain values) and whatever training state a resumed run needs, atomically."""
    content = io.BytesIO()  # on a full disk torch.save itself does not say what is wrong
    torch.save({"format": "stego 1", "config": config, "model": model.state_dict(), "facet": model.facet,
                "num_heads": model.backbone.num_heads, "dropout": model.head.dropout.p, "training": training}, content)
    with replacing(path) as temporary:
        Path(temporary).write_bytes(content.getbuffer())


# Settings under their names here and in the authors' configs/train_config.yml. theirs: pos_intra is the image itself,
# pos_inter a nearest neighbour, neg_inter the other images.
AUTHORS_SETTINGS = {
    "dataset": "dataset_name", "crop": "crop_type", "resolution": "res", "code_dim": "dim",
    "batch_size": "batch_size", "steps": "max_steps", "lr": "lr", "neighbors": "num_neighbors",
    "center": "pointwise", "zero_clamp": "zero_clamp", "stabilize": "stabalize",
    "lambda_self": "pos_intra_weight", "lambda_knn": "pos_inter_weight", "lambda_rand": "neg_inter_weight",
    "b_self": "pos_intra_shift", "b_knn": "pos_inter_shift", "b_rand": "neg_inter_shift"}
AUTHORS_WEIGHTS = {"net.model.": "backbone.", "net.cluster1.0.": "head.linear.", "net.cluster2.": "head.nonlinear.",
                   "linear_probe.": "linear_probe.", "cluster_probe.clusters": "cluster_probe.centroids"}


def plain(value):
    """Settings without the nodes that omegaconf keeps them in: dicts, lists and scalars."""
    if isinstance(value, Record):
        fields = vars(value)  # of omegaconf's containers, of its leaves, or of something else
        return plain(fields.get("_content", fields.get("_val", fields)))
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def from_authors(saved):
    """What save_checkpoint would have written of a model that the authors' code trained.

    saved: their Lightning checkpoint. What only training needs is left out, and so is their decoder, which nothing
    reads. Raises LookupError, TypeError or AttributeError for another program's.
    """
    state = {ours + key.removeprefix(theirs): value for key, value in saved["state_dict"].items()
             for theirs, ours in AUTHORS_WEIGHTS.items() if key.startswith(theirs)}
    settings = plain(saved["hyper_parameters"])["cfg"]
    config = {ours: settings[theirs] for ours, theirs in AUTHORS_SETTINGS.items() if theirs in settings}
    vit = f"vit{settings['model_type'].removeprefix('vit_')[0]}{settings['dino_patch_size']}"  # vits8, vitb8, ...
    preset = f"{config['dataset']}-{vit}"
    config.update(
        preset=preset if preset in PRESETS else None, data_root=None,  # theirs is a folder of the machine it was trained on
        backbone=f"dino_{vit}_300ep" if vit == "vits8" else f"dino_{vit}", crop=config.get("crop") or "none",
        num_classes=len(state["linear_probe.weight"]), num_clusters=len(state["cluster_probe.centroids"]),
        eval_resolution=320,  # as the authors' code, configs/eval_config.yml
        facet={"feat": "token", "KK": "key"}[settings["dino_feat_type"]], dropout=0.1)
    return {"format": "stego 1", "config": config, "model": state, "facet": config["facet"], "num_heads": None,
            "dropout": config["dropout"]}


def load_checkpoint(path, device="cpu"):
    """(model in eval mode, config) from save_checkpoint's file, or from one of the authors' (.ckpt).

    Theirs has all that evaluation needs: weights, classes and settings, without a refit_probe. Raises InputError for any
    other file.
    """
    saved = read_tensors(path, device)
    try:
        if "hyper_parameters" in saved:
            saved = from_authors(saved)
        if (saved["format"] != "stego 1" or not isinstance(saved["config"], dict)
                or saved["num_heads"] not in (None, *range(1, 1000))):
            raise KeyError("format")
        check_settings({"facet": saved["facet"], "dropout": saved["dropout"]}, path)
        state = saved["model"]
        check_weights(state, path)
        backbone = vit_from_state_dict({key.removeprefix("backbone."): value for key, value in state.items()
                                        if key.startswith("backbone.")}, saved["num_heads"])
        model = Stego(backbone, *state["cluster_probe.centroids"].shape[::-1], dropout=saved["dropout"], facet=saved["facet"],
                      n_classes=len(state["linear_probe.weight"]) if "linear_probe.weight" in state else None)
        if "refit_probe.centroids" in state:
            model.refit_probe = ClusterProbe(*state["refit_probe.centroids"].shape[::-1])
        model.load_state_dict(state)
    except (LookupError, TypeError, AttributeError, RuntimeError, ValueError) as error:
        raise InputError(f"{path}: neither a checkpoint of this program nor one of the authors' STEGO ({error})") from error
    return model.to(device).eval(), saved["config"]
