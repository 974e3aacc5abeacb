"""STEGO: unsupervised semantic segmentation by distilling feature correspondences.

Hamilton, Zhang, Hariharan, Snavely and Freeman, ICLR 2022, arXiv:2203.08414. A frozen self-supervised ViT
gives dense features, a small head turns them into compact codes, and the head is trained so that two points
have similar codes where their features correspond. This file follows the paper in its order; the reading and
writing of models come last.

    paper              here                         meaning
    f, g               features_a, features_b       frozen features of two images, (N, D, h, w)
    s, t               codes_a, codes_b             codes, s = head(f), (N, K, h, w)
    F, F^SC            F                            feature correspondence, plain and spatially centred
    S                  S                            code correspondence, the same cosine for codes
    L_corr             correspondence_loss          the loss of one pair of images
    x, x^knn, x^rand   self, knn, rand              the pairs (authors: pos_intra, pos_inter, neg_inter)
    lambda, b          lambdas, shifts              weight and shift of each of the three terms

"The authors' code" is github.com/mhamilton723/STEGO at commit eb4d6b5, and its paths start at src/.
"""
import collections
import contextlib
import hashlib
import io
import json
import math
import os
import pickle
import re
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as nnf  # so that F can be the paper's F
from torch import nn

VOID = 255  # the label of pixels that are left out in training and in scores


# ---- Frozen backbone: f = ViT(x) ----

class Attention(nn.Module):
    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x, rotation=None):
        q, k, v = (part.unflatten(2, (self.num_heads, -1)).transpose(1, 2)  # (N, heads, T, D / heads)
                   for part in self.qkv(x).chunk(3, 2))
        if rotation is not None:
            q, k = rotate(q, *rotation), rotate(k, *rotation)
        x = nnf.scaled_dot_product_attention(q, k, v)  # (N, heads, T, D / heads)
        return self.proj(x.transpose(1, 2).flatten(2))


def rotate(x, cos, sin):
    """Rotary positions (Su et al. 2021), half-split, in float32, for x (N, heads, T, d). cos, sin: (T, d)."""
    first, second = x.float().chunk(2, dim=3)  # (N, heads, T, d / 2)
    return (x.float() * cos + torch.cat([-second, first], 3) * sin).to(x.dtype)


def rotary_periods(head_dim):
    """DINOv3's wavelengths, from 1 to 100, (head_dim / 4,), rounded as in Meta's weights."""
    return (100 ** (torch.arange(head_dim // 4) / (head_dim // 4))).bfloat16().float()


class SwiGLU(nn.Module):
    def __init__(self, dim, hidden_dim):
        super().__init__()
        self.w1 = nn.Linear(dim, hidden_dim)
        self.w2 = nn.Linear(dim, hidden_dim)
        self.w3 = nn.Linear(hidden_dim, dim)

    def forward(self, x):
        return self.w3(nnf.silu(self.w1(x)) * self.w2(x))


class Block(nn.Module):
    def __init__(self, dim, num_heads, hidden_dim, layer_scale, swiglu, eps):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attn = Attention(dim, num_heads)
        self.ls1 = nn.ParameterDict({"gamma": torch.ones(dim)} if layer_scale else {})
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = SwiGLU(dim, hidden_dim) if swiglu else nn.Sequential(collections.OrderedDict(
            fc1=nn.Linear(dim, hidden_dim), gelu=nn.GELU(), fc2=nn.Linear(hidden_dim, dim)))
        self.ls2 = nn.ParameterDict({"gamma": torch.ones(dim)} if layer_scale else {})

    def forward(self, x, rotation=None):
        x = x + self.attn(self.norm1(x), rotation) * self.ls1.get("gamma", 1)
        return x + self.mlp(self.norm2(x)) * self.ls2.get("gamma", 1)


class VisionTransformer(nn.Module):
    """The ViT of DINO (Caron et al. 2021), DINOv2 (Oquab et al. 2023) and DINOv3 (Siméoni et al. 2025).

    State-dict names are Meta's, with register_tokens for DINOv3's storage_tokens. image_size: the side in
    pixels that the position embedding is for; it is interpolated for others. registers: tokens besides
    the class token. hidden_dim: of the MLPs, 4 embed_dim by default. rotary: rotary positions, no embedding.
    """

    def __init__(self, patch_size, embed_dim, depth, num_heads, image_size=224, registers=0,
                 layer_scale=False, hidden_dim=None, swiglu=False, rotary=False):
        super().__init__()
        if num_heads < 1 or embed_dim % num_heads:
            raise ValueError(f"embed_dim {embed_dim} cannot be split over {num_heads} heads")
        self.patch_size, self.embed_dim, self.num_heads = patch_size, embed_dim, num_heads
        self.registers, self.rotary = registers, rotary
        eps = 1e-5 if rotary else 1e-6  # of DINOv3 and of the others
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, embed_dim, patch_size, stride=patch_size)})
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        if registers:
            self.register_tokens = nn.Parameter(torch.zeros(1, registers, embed_dim))
        if rotary:
            self.rope_embed = nn.Module()
            self.rope_embed.register_buffer("periods", rotary_periods(embed_dim // num_heads))
        else:
            self.pos_embed = nn.Parameter(torch.zeros(1, 1 + (image_size // patch_size) ** 2, embed_dim))
            nn.init.trunc_normal_(self.pos_embed, std=0.02)
        hidden_dim = hidden_dim or 4 * embed_dim
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads, hidden_dim, layer_scale, swiglu, eps)
                                    for _ in range(depth))
        self.norm = nn.LayerNorm(embed_dim, eps=eps)
        nn.init.trunc_normal_(self.cls_token, std=0.02)

    def position_embedding(self, h, w):
        """The position embedding for h x w patches, (1, 1 + h w, D), interpolated as the weights expect."""
        side = math.isqrt(self.pos_embed.shape[1] - 1)
        if h == w == side:
            return self.pos_embed
        grid = self.pos_embed[:, 1:].reshape(1, side, side, -1).permute(0, 3, 1, 2)  # (1, D, side, side)
        if self.registers:  # DINOv2's register models were trained with antialiasing, without the 0.1 below
            grid = nnf.interpolate(grid, size=(h, w), mode="bicubic", antialias=True)
        else:  # DINO adds 0.1 against rounding, which moves every sampled position a little
            grid = nnf.interpolate(grid, scale_factor=((h + 0.1) / side, (w + 0.1) / side), mode="bicubic")
        return torch.cat([self.pos_embed[:, :1], grid.flatten(2).transpose(1, 2)], 1)

    def rotation(self, h, w):
        """cos and sin of DINOv3's rotary angles for h x w patches, (1 + registers + h w, D / heads) each.

        angle = 2 pi coordinate / period; the coordinates y and x of the patch centres run from -1 to 1. The
        class and register tokens before the patches have angle 0, so that they pass unchanged.
        """
        periods = self.rope_embed.periods
        y, x = (2 * (torch.arange(n, device=periods.device) + 0.5) / n - 1 for n in (h, w))
        positions = torch.cartesian_prod(y, x)[:, :, None]  # (h w, 2, 1)
        angles = (2 * math.pi * positions / periods).flatten(1).repeat(1, 2)  # (h w, D / heads)
        angles = nnf.pad(angles, (0, 0, 1 + self.registers, 0))  # (1 + registers + h w, D / heads)
        return angles.cos(), angles.sin()

    def forward(self, images, facet="token"):
        """Dense features of the last block: its patch tokens after the final norm, or ("key") its keys.

        images: (N, 3, H, W), normalised with IMAGE_MEAN and IMAGE_STD of data.py, H and W multiples of the
        patch. Returns (N, D, H / patch, W / patch). Raises ValueError for other sizes or facets.
        """
        N, _, H, W = images.shape
        if H % self.patch_size or W % self.patch_size:
            raise ValueError(f"an image of {H} x {W} pixels cannot be cut into patches of {self.patch_size}")
        if facet not in ("token", "key"):
            raise ValueError(f"facet is 'token' or 'key', not {facet!r}")
        h, w = H // self.patch_size, W // self.patch_size
        patches = self.patch_embed["proj"](images).flatten(2).transpose(1, 2)  # (N, h w, D)
        x = torch.cat([self.cls_token.expand(N, -1, -1), patches], 1)  # (N, 1 + h w, D)
        x = x if self.rotary else x + self.position_embedding(h, w)
        rotation = self.rotation(h, w) if self.rotary else None
        if self.registers:
            x = torch.cat([x[:, :1], self.register_tokens.expand(N, -1, -1), x[:, 1:]], 1)
        for block in self.blocks[:-1]:
            x = block(x, rotation)
        last = self.blocks[-1]
        x = self.norm(last(x, rotation)) if facet == "token" else last.attn.qkv(last.norm1(x)).chunk(3, 2)[1]
        return x[:, 1 + self.registers:].transpose(1, 2).reshape(N, self.embed_dim, h, w)


# ---- Segmentation head: s = head(f) ----

class SegmentationHead(nn.Module):
    """Codes from features: a linear map plus a two-layer perceptron, both 1x1.

    (N, in_dim, h, w) -> (N, code_dim, h, w). Each branch has its own channel dropout (as in the authors'
    code, modules.py:109-111).
    """

    def __init__(self, in_dim, code_dim, dropout=0.1):
        super().__init__()
        self.dropout = nn.Dropout2d(dropout)
        self.linear = nn.Conv2d(in_dim, code_dim, 1)
        self.nonlinear = nn.Sequential(nn.Conv2d(in_dim, in_dim, 1), nn.ReLU(),
                                       nn.Conv2d(in_dim, code_dim, 1))

    def forward(self, features):
        return self.linear(self.dropout(features)) + self.nonlinear(self.dropout(features))


# ---- Correspondence distillation ----

def sample(maps, points):
    """Bilinear values of maps at points: out[n, :, i, j] = maps[n] at points[n, i, j].

    maps: (N, C, h, w). points: (N, p, q, 2) as (x, y) in [-1, 1], where -1 and 1 are the centres of the first
    and the last column or row; beyond them the border is repeated. Returns (N, C, p, q).
    """
    return nnf.grid_sample(maps, points, mode="bilinear", padding_mode="border", align_corners=True)


def unit(maps):
    """Scales maps (N, C, h, w) to length 1 along C; vectors shorter than 1e-10 are divided by 1e-10."""
    # Written out because nnf.normalize along dimension 1 is several times slower on a CPU.
    return maps / maps.square().sum(1, keepdim=True).clamp(min=1e-20).sqrt()


def correlation(a, b):
    """Cosine of every position of a with every position of b (Eq. 1).

        out[n, h, w, i, j] = sum_c a[n, c, h, w] b[n, c, i, j] / (|a[n, :, h, w]| |b[n, :, i, j]|)

    a: (N, C, h, w). b: (N, C, i, j). Returns (N, h, w, i, j).
    """
    return torch.einsum("nchw,ncij->nhwij", unit(a), unit(b))


@torch.no_grad()
def feature_correspondence(a, b, center=True):
    """F, the cosines of features a (N, C, h, w) and b (N, C, i, j), spatially centred if `center` (Eq. 3):

        F <- F - mean_ij F + mean F

    Then a point that corresponds to everything stands out as little as one that corresponds to nothing.
    mean_ij runs over the positions in b for one point of a, mean over the batch. Returns (N, h, w, i, j).
    """
    F = correlation(a, b)
    # differs from the paper: the global mean is put back, as in the authors' code, modules.py:330-333.
    return F - F.mean((3, 4), keepdim=True) + F.mean() if center else F


def correspondence_loss(features_a, features_b, codes_a, codes_b, shift,
                        center=True, zero_clamp=True, stabilize=False):
    """L_corr, elementwise: pulls the codes of corresponding points together, pushes others apart (Eq. 4).

        F = cos(f_a, f_b)    S = cos(s_a, s_b)    L = -max(S, 0) (F - shift)

    Points attract where F > shift and repel where F < shift. The clamp at 0 leaves two codes alone once they
    are at right angles. center: F is centred, see feature_correspondence. zero_clamp=False: without the max;
    without both it is Eq. 2. stabilize: S is also clamped from above at 0.8. The features get no gradient.

    *_a: (N, C, h, w), both at the same points; *_b: (N, C, i, j), likewise. Returns (L, S), (N, h, w, i, j).
    """
    F = feature_correspondence(features_a, features_b, center)
    S = correlation(codes_a, codes_b)
    clamped = S.clamp(0.0 if zero_clamp else -torch.inf, 0.8 if stabilize else torch.inf)
    return -clamped * (F - shift), S


def derangement(n, device="cpu"):
    """A random permutation of 0..n-1 without fixed points, one cycle. Raises ValueError for n < 2."""
    # differs from the authors' code, modules.py:291-295: theirs adds 1 to fixed points and so repeats some.
    if n < 2:
        raise ValueError("negatives need at least two images in a batch")
    order = torch.randperm(n, device=device)
    return order.roll(1)[order.argsort()]  # maps each number to the one before it in `order`


def stego_loss(features, features_knn, codes, codes_knn, lambdas, shifts,
               center=True, zero_clamp=True, stabilize=False, n_points=11, n_negatives=5):
    """STEGO's objective for a batch (Eq. 5).

        L = lambda_self L_corr(x, x, b_self) + lambda_knn L_corr(x, x^knn, b_knn)
            + lambda_rand mean L_corr(x, x^rand, b_rand)

    features (N, D, h, w), codes (N, K, h, w): of the images x; *_knn: of one nearest neighbour of each.
    x^rand: n_negatives other images of the batch for each. n_points x n_points uniformly random points are
    drawn twice: of x, for all three terms, and of x^knn and x^rand. lambdas, shifts b: (self, knn, rand).
    Returns (L, {"self", "knn", "rand"}), scalars.
    """
    N, device = len(features), features.device
    points_a, points_b = (2 * torch.rand(N, n_points, n_points, 2, device=device) - 1 for _ in range(2))
    f_a, s_a = sample(features, points_a), sample(codes, points_a)  # (N, D, p, p), (N, K, p, p)

    def term(f_b, s_b, shift):
        # differs from the paper: a mean over random pairs, as in the authors' modules.py:355-393, not a sum.
        return correspondence_loss(f_a, f_b, s_a, s_b, shift, center, zero_clamp, stabilize)[0].mean()

    loss_self = term(f_a, s_a, shifts[0])
    loss_knn = term(sample(features_knn, points_b), sample(codes_knn, points_b), shifts[1])
    rands = [derangement(N, device) for _ in range(n_negatives)]
    # Image rand[n] is read at points_b[n]. Sampling all negatives before permuting them is faster.
    points = torch.cat([points_b[rand.argsort()] for rand in rands], 1)  # (N, negatives p, p, 2)
    f_rand, s_rand = (sample(maps, points).split(n_points, 2) for maps in (features, codes))  # (N, C, p, p)
    losses = [term(f[rand], s[rand], shifts[2]) for rand, f, s in zip(rands, f_rand, s_rand)]
    loss_rand = sum(losses) / n_negatives
    loss = lambdas[0] * loss_self + lambdas[1] * loss_knn + lambdas[2] * loss_rand
    return loss, {"self": loss_self, "knn": loss_knn, "rand": loss_rand}


# ---- Shifts without tuning: as many pairs attract as seem to show the same class ----

def linkage(sums, sizes, n_groups, threshold=-1.0):
    """Merges G groups of unit vectors, with sums s and sizes m, always the two with the smallest

        (1 - s_i . s_j / (m_i m_j)) (m_i m_j / (m_i + m_j))^(1/16)

    The first factor, from the mean cosine of their members, is average linkage; the second, which is Ward's
    with an exponent of 1, keeps one group from swallowing all. Stops at n_groups, or when the mean cosine of
    these two is not above the threshold. sums: (G, C), of the vectors in each group; sizes: (G,). Returns
    (G,), the new group of each.
    """
    members = torch.eye(len(sums), dtype=torch.double)  # (groups left, G), 1 where one holds an old group
    while len(members) > n_groups:
        s, m = members @ sums.double(), members @ sizes.double()
        products = m[:, None] * m
        cosine = s @ s.T / products
        cost = ((1 - cosine) * (products / (m[:, None] + m)) ** (1 / 16)).fill_diagonal_(torch.inf)
        i, j = sorted(divmod(int(cost.argmin()), len(members)))
        if cosine[i, j] <= threshold:
            break
        members[i] += members[j]
        members = torch.cat([members[:j], members[j + 1:]])
    return members.argmax(0)


def same_class_rates(F_self, F_knn, F_rand, pi_rand):
    """Shares of the self, knn and rand pairs of points that show one class, from that of the rand pairs.

    Ours, not the paper's. If F of pairs of different classes is distributed alike in an image, in neighbours
    and in random images, and F of pairs of one class hardly ever lies below m, the median of F_rand, then

        P(F_t <= m) / P(F_rand <= m) = (1 - pi_t) / (1 - pi_rand),    t = self, knn

    F_self, F_knn, F_rand: at random pairs of points. Returns (pi_self, pi_knn, pi_rand), none below pi_rand.
    """
    m = F_rand.median()
    below = [F.le(m).float().mean() for F in (F_self, F_knn, F_rand)]
    return tuple(max(pi_rand, 1 - (1 - pi_rand) * (share / below[2]).item()) for share in below)


# ---- Probes, trained on detached codes: they read the codes and teach the head nothing ----

class ClusterProbe(nn.Module):
    """Cosine k-means by gradient descent (as in the authors' code, modules.py:134-161).

    centroids: (n_clusters, code_dim). forward(codes (N, K, h, w)) -> cosines, (N, n_clusters, h, w).
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
    """Cross-entropy at the size of the labels (N, H, W) uint8, without void. logits: (N, n, h, w)."""
    # Two small matrix products interpolate bilinearly; on a CPU they take one image at a time, which is three
    # times faster there than nnf.interpolate of the batch and needs less memory.
    rows, columns = (nnf.interpolate(torch.eye(n, device=logits.device)[None], size, mode="linear")[0].T
                     for n, size in zip(logits.shape[2:], labels.shape[1:]))  # (H, h), (W, w)
    at_once = 1 if logits.device.type == "cpu" else len(logits)
    total = sum(nnf.cross_entropy(rows @ maps @ columns.T, label.long(), ignore_index=VOID, reduction="sum")
                for maps, label in zip(logits.split(at_once), labels.split(at_once)))
    return total / (labels != VOID).sum().clamp(min=1)  # a batch without labels costs 0, not NaN


class Stego(nn.Module):
    """Backbone, head and probes. forward(images (N, 3, H, W)) -> codes (N, K, H / patch, W / patch).

    n_classes: of the labels that teach the linear probe; without labels both are None. refit_probe: centroids
    that k-means found on the finished codes, None before training ends. facet: which features the backbone
    gives, see VisionTransformer.forward. precision: torch.dtype of the backbone's matrix products; head,
    probes and losses stay in float32.
    """

    def __init__(self, backbone, code_dim, n_clusters, n_classes=None, dropout=0.1, facet="token",
                 precision=torch.float32):
        super().__init__()
        self.backbone = backbone.eval().requires_grad_(False)
        self.facet, self.precision = facet, precision
        self.head = SegmentationHead(backbone.embed_dim, code_dim, dropout)
        self.cluster_probe = ClusterProbe(code_dim, n_clusters)
        self.refit_probe = None
        self.linear_probe = nn.Conv2d(code_dim, n_classes, 1) if n_classes else None

    @torch.no_grad()
    def features(self, images):
        """The frozen features of normalised images, (N, D, H / patch, W / patch) float32."""
        with torch.autocast(images.device.type, self.precision, enabled=self.precision != torch.float32):
            return self.backbone(images, self.facet).float()

    def forward(self, images):
        return self.head(self.features(images))


# ---- Files: what comes from elsewhere is read as data and never run as code; what we write is whole ----

class InputError(ValueError):
    """A mistake in what the user gave: one sentence that names it and how to fix it."""

    def __str__(self):  # on one line, whatever characters a file name holds
        return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in super().__str__())


@contextlib.contextmanager
def refusing(what):
    """Turns any error within into an InputError, "what (reason)": bytes from anywhere may raise anything."""
    try:
        yield
    except Exception as error:
        reason = str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {error}"
        if isinstance(error, pickle.UnpicklingError):  # torch's own words advise running the file as code
            reason = "no tensors, or something besides tensors and plain values"
        raise InputError(f"{what} ({' '.join(reason.split()):.300})") from error


@contextlib.contextmanager
def replacing(path):
    """Gives a temporary file name, then renames that file to `path`, which is thus never half-written."""
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)


class Record:
    """Stands in for an object of a foreign class: holds what was stored in it, without its methods."""

    def __init__(self, *args):
        pass

    def __setstate__(self, state):  # also keeps pickle from setting attributes of this class
        self.state = state


def stand_in(name):
    """What a foreign class or function is read as. Its name is compared, but nothing is looked up by it."""
    if name == "collections.defaultdict":
        return lambda *_: {}
    if name.endswith(".AttributeDict"):  # Lightning's dict, read as one that torch.load can fill
        return collections.Counter
    return Record


SAFETENSORS_TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
                     "I64": torch.int64, "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool}


def read_safetensors(content):
    """Tensors from the bytes (n,) of a .safetensors file: length of its JSON header, header, tensors."""
    start = 8 + int.from_bytes(content[:8].tobytes(), "little")
    header, data = json.loads(content[8:start].tobytes()), torch.from_numpy(content[start:])
    header.pop("__metadata__", None)
    parts = {name: data[slice(*entry["data_offsets"])] for name, entry in header.items()}
    if sum(map(len, parts.values())) > len(data):
        raise ValueError("its tensors overlap")  # then copies of them could fill the memory
    return {name: part.clone().view(SAFETENSORS_TYPES[header[name]["dtype"]]).reshape(header[name]["shape"])
            for name, part in parts.items()}  # view needs aligned bytes, as a clone's are


def read_tensors(path):
    """What torch.save or safetensors wrote, on the CPU; runs no code from the file. Raises InputError."""
    with refusing(f"{path}: not a readable file of weights"):
        content = np.memmap(path, np.uint8, "c")
        if content[8:9].tobytes() == b"{":  # .safetensors: 8 bytes of length, then JSON
            return read_safetensors(content)
        # Old files, which are not zip files, may hold only tensors and plain data: torch.load sees to it.
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path) if zipfile.is_zipfile(path) else []
        with torch.serialization.safe_globals([(stand_in(name), name) for name in names]):
            return torch.load(path, map_location="cpu", weights_only=True)


def check_weights(state, path):
    """Raises an error unless `state` is str -> tensor of real numbers, no larger than the file `path`."""
    others = [str(key) for key, value in state.items() if not (
        isinstance(key, str) and isinstance(value, torch.Tensor) and value.layout is torch.strided
        and value.numel() > 0 and not value.is_complex() and not value.is_meta)]
    if others:
        raise ValueError(f"not a state dict of tensors, but {', '.join(others):.100}")
    if sum(value.nbytes for value in state.values()) > os.path.getsize(path):
        raise ValueError("its tensors are larger than the file")  # as strides of 0 repeat values


# ---- Weights of the backbone, under the names of Meta, timm or transformers ----

META_URL = "https://dl.fbaipublicfiles.com/"
TIMM_URL = "https://huggingface.co/timm/vit_{}_patch16_dinov3_qkvb.lvd1689m/resolve/main/model.safetensors"
BACKBONES = {  # name -> address or file of the weights
    "vit_tiny_scenes": Path(__file__).parent / "assets/vit_tiny_scenes.pth",  # embedded
    **{f"dino_{name}": f"{META_URL}dino/dino_{long}_pretrain/dino_{long}_pretrain.pth" for name, long in (
        ("vits16", "deitsmall16"), ("vits8", "deitsmall8"), ("vits8_300ep", "deitsmall8_300ep"),
        ("vitb16", "vitbase16"), ("vitb8", "vitbase8"))},
    **{f"dinov2_{vit}{reg[:4]}": f"{META_URL}dinov2/dinov2_{vit}/dinov2_{vit}{reg}_pretrain.pth"
       for vit in ("vits14", "vitb14", "vitl14") for reg in ("", "_reg4")},
    **{f"dinov3_{name}": TIMM_URL.format(long) for name, long in (  # Meta's own are behind a form
        ("vits16", "small"), ("vits16plus", "small_plus"), ("vitb16", "base"), ("vitl16", "large"))},
}
RENAMES = [  # regular expressions, applied in this order: names of transformers and timm -> Meta's
    (r"^(module\.)?((vit|dinov2(_with_registers)?|dinov3_vit|model|backbone)\.(?!layer\.\D))?", ""),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.(projection\.)?", "patch_embed.proj."),
    (r"^embeddings\.", ""),
    (r"^(encoder\.)?layers?\.(?=\d)", "blocks."),
    (r"^layernorm\.", "norm."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.(?:gamma_(\d)|layer_scale(\d)\.lambda1)$", r".ls\1\2.gamma"),
    (r"\.attention\.(output\.dense|o_proj)\.", ".attn.proj."),
    (r"\.attention\.(attention\.)?(q|k|v)(uery|ey|alue|_proj)\.", r".attn.\2."),
    (r"\.attn\.(q|k|v)_bias$", r".attn.\1.bias"),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"^(blocks\.\d+)\.output\.dense\.", r"\1.mlp.fc2."),
    (r"^(storage_tokens|reg_token)$", "register_tokens"),
]
PLAIN_MLP = [(r"\.mlp\.up_proj\.", ".mlp.fc1."), (r"\.mlp\.down_proj\.", ".mlp.fc2.")]
SWIGLU = [(r"\.mlp\.(gate_proj|fc1_g)\.", ".mlp.w1."), (r"\.mlp\.(up_proj|fc1_x)\.", ".mlp.w2."),
          (r"\.mlp\.(down_proj|fc2)\.", ".mlp.w3.")]
UNUSED = r"mask_token$|pooler\.|local_cls_norm\.|(dino_|ibot_)?head\.|.*\.bias_mask$"  # of pretraining only


def meta_names(state):
    """The weights in `state` under Meta's names, in float32, in tensors of their own."""
    swiglu, named = any("gate_proj" in key or "fc1_g" in key for key in state), {}
    for key, value in state.items():
        for pattern, replacement in RENAMES + (SWIGLU if swiglu else PLAIN_MLP):
            key = re.sub(pattern, replacement, key)
        if not re.match(UNUSED, key):
            named[key] = value.to(torch.float32, copy=True)
    for attn in {key.partition(".attn.")[0] + ".attn." for key in named if ".attn." in key}:
        if f"{attn}q.weight" in named:
            named[f"{attn}qkv.weight"] = torch.cat([named.pop(f"{attn}{x}.weight") for x in "qkv"])
        D = len(named[f"{attn}qkv.weight"]) // 3
        if "pos_embed" not in named or f"{attn}q.bias" in named:  # DINOv3 may lack the keys' bias, or all
            biases = [named.pop(f"{attn}{x}.bias", torch.zeros(D)) for x in "qkv"]
            named.setdefault(f"{attn}qkv.bias", torch.cat(biases))
        if "pos_embed" not in named:
            named[f"{attn}qkv.bias"][D:2 * D] = 0  # DINOv3 masks the bias of the keys
    # timm's models with registers have the class token's position in the token itself, so it is 0 here.
    if any(key.endswith("reg_token") for key in state) and "pos_embed" in named:
        named["pos_embed"] = nnf.pad(named["pos_embed"], (0, 0, 1, 0))
    return named


@refusing("no ViT of DINO, DINOv2 or DINOv3")
def vit_from_state_dict(state, num_heads=None):
    """A VisionTransformer that holds `state`, its architecture read off the names and shapes.

    state: name -> tensor of a DINO, DINOv2 or DINOv3 ViT, named as by Meta, timm or transformers. num_heads
    defaults to D // 64, or D // 128 for 4096, as published. Raises an InputError that says what does not fit.
    """
    state = meta_names(state)
    if "patch_embed.proj.weight" not in state:
        raise ValueError(f"it holds no patch_embed.proj.weight, but {', '.join(state):.150} ...")
    D, _, p, _ = state["patch_embed.proj.weight"].shape
    heads = num_heads or max(1, D // (128 if D == 4096 else 64))  # DINOv3's 7B has larger heads
    layer_scale, swiglu = "blocks.0.ls1.gamma" in state, "blocks.0.mlp.w1.weight" in state
    rotary = layer_scale and "pos_embed" not in state
    if rotary:
        state.setdefault("rope_embed.periods", rotary_periods(D // heads))
    with torch.device("meta"):  # shapes alone, which take no memory
        vit = VisionTransformer(
            p, D, depth=len({key.split(".")[1] for key in state if key.startswith("blocks.")}),
            num_heads=heads, image_size=p if rotary else p * math.isqrt(state["pos_embed"].shape[1] - 1),
            registers=state["register_tokens"].shape[1] if "register_tokens" in state else 0,
            layer_scale=layer_scale, swiglu=swiglu, rotary=rotary,
            hidden_dim=len(state["blocks.0.mlp.w1.weight" if swiglu else "blocks.0.mlp.fc1.weight"]))
    vit.load_state_dict(state, assign=True)
    return vit


def download(url):
    """The file of `url` in torch.hub's folder, fetched if it is not there. Raises InputError."""
    name = url.partition("?")[0].rpartition("/")[2]
    if not url.startswith(META_URL):  # elsewhere many files are called model.safetensors
        name = f"{hashlib.sha256(url.encode()).hexdigest()[:8]}-{name}"
    file = Path(torch.hub.get_dir()) / "checkpoints" / name
    if not file.is_file():
        print(f"downloading {url}")
        with (refusing(f"cannot download {url}: get it another way, and give the file with --backbone FILE"),
              replacing(file) as temporary):
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, temporary)
            read_tensors(temporary)  # torch.hub takes a broken connection for the end of the file
    return file


def load_backbone(name_or_path, device="cpu"):
    """A frozen VisionTransformer in eval mode.

    name_or_path: a name in BACKBONES or an address, downloaded once into torch.hub's folder; a file of
    weights (see vit_from_state_dict) or of a training run, whose teacher or model is taken; or a folder that
    holds model.safetensors. Raises an InputError that says what does not fit.
    """
    file = str(BACKBONES.get(str(name_or_path), name_or_path))
    file = Path(download(file) if file.startswith(("https://", "http://")) else file)
    file = file / "model.safetensors" if file.is_dir() else file
    if not file.is_file():
        raise InputError(f"backbone {name_or_path}: neither a file nor one of {', '.join(BACKBONES)}")
    state = read_tensors(file)
    with refusing(f"backbone {name_or_path}: no usable weights"):
        for key in ("teacher", "model", "state_dict"):
            if isinstance(state.get(key), dict):
                state = state[key]
        check_weights(state, file)
        vit = vit_from_state_dict(state)
    return vit.to(device).eval().requires_grad_(False)


# ---- Checkpoints: one file that needs nothing else, the backbone and the settings included ----

def save_checkpoint(path, model, config, **training):
    """Writes the model, config (a dict of plain values) and the training state, all or nothing."""
    content = io.BytesIO()  # on a full disk torch.save itself does not say what is wrong
    torch.save({"config": config, "model": model.state_dict(), "num_heads": model.backbone.num_heads,
                "facet": model.facet, "dropout": model.head.dropout.p, "training": training}, content)
    with replacing(path) as temporary:
        Path(temporary).write_bytes(content.getbuffer())


# Settings under their names here and in the authors' configs/train_config.yml.
AUTHORS_SETTINGS = {
    "dataset": "dataset_name", "crop": "crop_type", "resolution": "res", "code_dim": "dim",
    "steps": "max_steps", "batch_size": "batch_size", "lr": "lr", "neighbors": "num_neighbors",
    "center": "pointwise", "zero_clamp": "zero_clamp", "stabilize": "stabalize",
    "lambda_self": "pos_intra_weight", "lambda_knn": "pos_inter_weight", "lambda_rand": "neg_inter_weight",
    "b_self": "pos_intra_shift", "b_knn": "pos_inter_shift", "b_rand": "neg_inter_shift"}
AUTHORS_WEIGHTS = {
    "net.model.": "backbone.", "net.cluster1.0.": "head.linear.", "net.cluster2.": "head.nonlinear.",
    "linear_probe.": "linear_probe.", "cluster_probe.clusters": "cluster_probe.centroids"}


def from_authors(saved):
    """A Lightning checkpoint of the authors' as save_checkpoint would write it, without training state."""
    state = {ours + key.removeprefix(theirs): value for key, value in saved["state_dict"].items()
             for theirs, ours in AUTHORS_WEIGHTS.items() if key.startswith(theirs)}
    nodes = saved["hyper_parameters"]["cfg"].state["_content"]  # omegaconf's, each with its value
    settings = {key: node.state.get("_val") for key, node in nodes.items()}
    config = {ours: settings[theirs] for ours, theirs in AUTHORS_SETTINGS.items() if theirs in settings}
    backbone = f"dino_vit{settings['model_type'].removeprefix('vit_')[0]}{settings['dino_patch_size']}"
    config.update(
        data_root=None,  # theirs is a folder on the machine that trained it
        backbone={"dino_vits8": "dino_vits8_300ep"}.get(backbone, backbone),  # their modules.py has no other
        crop="five" if config.get("crop") == "five" else "none",  # they also have random crops
        num_classes=len(state["linear_probe.weight"]),
        num_clusters=len(state["cluster_probe.centroids"]),
        eval_resolution=320,  # as in the authors' code, configs/eval_config.yml
        facet={"feat": "token", "KK": "key"}[settings["dino_feat_type"]])
    return {"config": config, "model": state, "facet": config["facet"], "dropout": 0.1, "num_heads": None}


def load_checkpoint(path, device="cpu"):
    """(model in eval mode, config) from save_checkpoint's file, or from one of the authors' (.ckpt).

    The authors' have all that evaluation needs, but no refit_probe. Raises InputError for any other file.
    """
    saved = read_tensors(path)
    with refusing(f"{path}: neither a checkpoint of this program nor one of the authors' STEGO"):
        if "hyper_parameters" in saved:
            saved = from_authors(saved)
        state, config = saved["model"], dict(saved["config"])
        check_weights(state, path)
        backbone = vit_from_state_dict({key.removeprefix("backbone."): value for key, value in state.items()
                                        if key.startswith("backbone.")}, saved["num_heads"])
        with torch.device("meta"):  # shapes alone, which take no memory
            n_clusters, code_dim = state["cluster_probe.centroids"].shape
            model = Stego(backbone, code_dim, n_clusters, len(state.get("linear_probe.weight", ())),
                          saved["dropout"], saved["facet"])
            if "refit_probe.centroids" in state:
                model.refit_probe = ClusterProbe(code_dim, len(state["refit_probe.centroids"]))
        model.load_state_dict({key: value.float() for key, value in state.items()}, assign=True)
        if not all(value.isfinite().all() for value in model.state_dict().values()):
            raise ValueError("its weights are not finite")
        if max(len(value) for key, value in state.items() if key.endswith(".centroids")) > VOID:
            raise ValueError(f"it has more than {VOID} clusters")
        model.eval()(torch.zeros(1, 3, backbone.patch_size, backbone.patch_size))  # a wrong facet fails here
    return model.to(device), config
