"""crf.py against pydensecrf's figures, a slow lattice written as the paper tells it, and exact Gaussian kernels."""
import threading
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

import crf
from crf import dense_crf

GAUSSIAN_ONLY, BILATERAL_ONLY = {"bilateral_weight": 0}, {"gaussian_weight": 0}


def example(height=11, width=14, n_classes=4, seed=0):
    """A noisy two-colour image whose classes weakly follow the colours: (H, W, 3) uint8, (C, H, W) float32."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    disc = np.hypot(y - height / 2, x - width / 2) < min(height, width) / 3
    image = np.where(disc[:, :, None], (200, 60, 30), (40, 90, 150)) + rng.normal(0, 4, (height, width, 3))
    logits = rng.normal(size=(n_classes, height, width))
    logits[0] += disc
    logits[-1] += ~disc
    probs = np.exp(logits) / np.exp(logits).sum(0)
    return image.clip(0, 255).astype(np.uint8), probs.astype(np.float32)


def features_of(image, xy_std, rgb_std=None):
    """(P, 2) or (P, 5): x, y, then blue, green, red."""
    y, x = np.mgrid[:image.shape[0], :image.shape[1]].reshape(2, -1)
    columns = [x / xy_std, y / xy_std] + ([] if rgb_std is None else list(image.reshape(-1, 3).T[::-1] / rgb_std))
    return np.stack(columns, axis=1)


# ---- oracles -------------------------------------------------------------------------------------------------------


def lattice_kernel(features):
    """The (P, P) matrix of the permutohedral filter, pixel by pixel and vertex by vertex, in float64."""
    d = features.shape[1]
    splat = []  # for each pixel {vertex: weight}
    for point in features:
        scaled = [point[i] * (d + 1) * np.sqrt(2 / 3) / np.sqrt((i + 1) * (i + 2)) for i in range(d)]
        elevated = np.array([sum(scaled[i:]) - (i * scaled[i - 1] if i else 0) for i in range(d + 1)])
        origin = np.round(elevated / (d + 1)) * (d + 1)
        order = sorted(range(d + 1), key=lambda i: origin[i] - elevated[i])  # largest remainder first
        excess = int(origin.sum()) // (d + 1)
        for i in order[len(order) - excess:] if excess > 0 else order[:-excess]:
            origin[i] -= (d + 1) * np.sign(excess)
        order = sorted(range(d + 1), key=lambda i: origin[i] - elevated[i])
        remainder = [(elevated - origin)[i] / (d + 1) for i in order]
        weights = [1 - remainder[0] + remainder[d]] + [remainder[d - k] - remainder[d - k + 1] for k in range(1, d + 1)]
        assert min(weights) > -1e-9 and abs(sum(weights) - 1) < 1e-9
        corners = {}
        for k, weight in enumerate(weights):
            vertex = origin + k
            vertex[order[d + 1 - k:]] -= d + 1
            corners[tuple(vertex.astype(int))] = weight
        splat.append(corners)

    occupied = {vertex for corners in splat for vertex in corners}
    kernel = np.zeros((len(features), len(features)))
    for j, corners in enumerate(splat):
        values = dict.fromkeys(occupied, 0.0) | corners
        for axis in range(d + 1):
            step = np.full(d + 1, -1)
            step[axis] = d
            blurred = {}
            for vertex, value in values.items():
                ahead, behind = tuple(np.add(vertex, step).tolist()), tuple(np.subtract(vertex, step).tolist())
                blurred[vertex] = value + 0.5 * values.get(ahead, 0.0) + 0.5 * values.get(behind, 0.0)
            values = blurred
        for i, readers in enumerate(splat):
            kernel[i, j] = sum(weight * values[vertex] for vertex, weight in readers.items())
    return kernel


def exact_kernel(features):
    return np.exp(-0.5 * ((features[:, None] - features) ** 2).sum(-1))


def mean_field(probs, weighted_kernels, iterations):
    """The update of the paper with dense (P, P) matrices: the definition of what dense_crf computes."""
    def softmax(x):
        return np.exp(x - x.max(0)) / np.exp(x - x.max(0)).sum(0)
    unary = np.log(probs.astype(float).clip(1e-5, 1)).reshape(len(probs), -1)
    normalised = [(w, k / np.sqrt(np.outer(k.sum(1), k.sum(1)))) for w, k in weighted_kernels]
    q = softmax(unary)
    for _ in range(iterations):
        q = softmax(unary + sum(w * q @ k.T for w, k in normalised))
    return q.reshape(probs.shape)


# ---- values --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key, options", [("crf", {}), ("gaussian_only", GAUSSIAN_ONLY),
                                          ("bilateral_only_1iter", {**BILATERAL_ONLY, "iterations": 1})])
def test_equals_pydensecrf_golden(key, options):
    golden = np.load(Path(__file__).with_name("golden_crf.npz"))  # 5 classes, 61 x 83, from pydensecrf2 1.1
    refined = dense_crf(golden["image"], golden["probs"], **options)
    assert refined.dtype == np.float32 and refined.shape == golden[key].shape
    assert (refined.argmax(0) == golden[key].argmax(0)).mean() >= 0.9999
    assert np.abs(refined - golden[key]).mean() <= 1e-6
    assert np.abs(refined - golden[key]).max() <= 1e-5


def test_golden_depends_on_bgr_order():
    golden = np.load(Path(__file__).with_name("golden_crf.npz"))
    swapped = dense_crf(golden["image"][:, :, ::-1], golden["probs"])
    assert np.abs(swapped - golden["crf"]).mean() > 1e-4


def test_equals_pydensecrf():
    densecrf = pytest.importorskip("pydensecrf.densecrf", reason="pydensecrf2 is not installed (an optional oracle)")
    image, probs = example(40, 50, 6)
    oracle = densecrf.DenseCRF2D(50, 40, 6)
    oracle.setUnaryEnergy(-np.log(probs.clip(1e-5, 1)).reshape(6, -1))
    oracle.addPairwiseGaussian(sxy=1, compat=3)
    oracle.addPairwiseBilateral(sxy=67, srgb=3, rgbim=np.ascontiguousarray(image[:, :, ::-1]), compat=4)
    expected = np.array(oracle.inference(10)).reshape(probs.shape)
    refined = dense_crf(image, probs)
    assert (refined.argmax(0) == expected.argmax(0)).mean() >= 0.9999 and np.abs(refined - expected).mean() <= 1e-6


@pytest.mark.parametrize("gaussian_weight, bilateral_weight", [(3, 0), (0, 4), (3, 4)])
def test_equals_slow_lattice(gaussian_weight, bilateral_weight):
    image, probs = example()
    refined = dense_crf(image, probs, 5, 1.3, gaussian_weight, 5, 9, bilateral_weight)
    kernels = [(gaussian_weight, lattice_kernel(features_of(image, 1.3))) if gaussian_weight else None,
               (bilateral_weight, lattice_kernel(features_of(image, 5, 9))) if bilateral_weight else None]
    np.testing.assert_allclose(refined, mean_field(probs, filter(None, kernels), 5), rtol=0, atol=1e-5)


@pytest.mark.parametrize("height, width", [(11, 14), (12, 8), (1, 9), (10, 1), (3, 2)])
@pytest.mark.parametrize("std", [0.2, 0.5, 0.8, 1, 1.1])
def test_small_spatial_kernel_equals_slow_lattice(height, width, std):
    """Up to 1 it is composed to a stencil, in tiles of 4 x 4 pixels that the image need not fill."""
    image, probs = example(height, width)
    assert isinstance(crf._spatial_kernel(height, width, float(std), 3.0), crf._Stencil) == (std <= 1)
    refined = dense_crf(image, probs, 5, gaussian_std=std, **GAUSSIAN_ONLY)
    expected = mean_field(probs, [(3, lattice_kernel(features_of(image, std)))], 5)
    np.testing.assert_allclose(refined, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("weights, kernel_stds", [((3, 0), (2,)), ((0, 4), (6, 20))])
def test_approximates_exact_gaussians(weights, kernel_stds):
    """The lattice is an approximation: measured here 0.002 mean difference in probability, 99 % of the labels."""
    image, probs = example(24, 30)
    refined = dense_crf(image, probs, 5, 2, weights[0], 6, 20, weights[1])
    exact = mean_field(probs, [(max(weights), exact_kernel(features_of(image, *kernel_stds)))], 5)
    assert np.abs(refined - exact).mean() < 0.005
    assert (refined.argmax(0) == exact.argmax(0)).mean() > 0.98
    assert np.abs(probs - exact).mean() > 0.03  # so that the bound above says something


# ---- properties ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("height, width, n_classes", [(1, 1, 3), (1, 1, 1), (1, 23, 3), (23, 1, 3), (5, 7, 1),
                                                      (2, 3, 40), (9, 8, 2), (1, 3000, 2)])
def test_any_size_sums_to_one(height, width, n_classes):
    image, probs = example(height, width, n_classes)
    refined = dense_crf(image, probs, 3)
    assert refined.shape == probs.shape and refined.dtype == np.float32 and refined.flags.c_contiguous
    assert (refined >= 0).all()
    np.testing.assert_allclose(refined.sum(0), 1, atol=1e-5)


def test_constant_image_and_uniform_probs_stay_uniform():
    refined = dense_crf(np.full((12, 17, 3), 80, np.uint8), np.full((5, 12, 17), 0.2, np.float32))
    np.testing.assert_allclose(refined, 0.2, atol=1e-6)


def test_one_pixel_in_closed_form():
    # n k n = 1 for the only pair (i, i), so Q <- softmax(log p + 7 Q)
    image, p = np.full((1, 1, 3), 9, np.uint8), np.array([0.6, 0.3, 0.1])
    q = p
    for _ in range(10):
        q = p * np.exp(7 * q) / (p * np.exp(7 * q)).sum()
    np.testing.assert_allclose(dense_crf(image, p.reshape(3, 1, 1)).ravel(), q, atol=1e-6)


def test_classes_may_be_permuted():
    image, probs = example(n_classes=6)
    order = [3, 0, 5, 1, 4, 2]
    np.testing.assert_allclose(dense_crf(image, probs[order]), dense_crf(image, probs)[order], atol=1e-6)


@pytest.mark.parametrize("options", [{"gaussian_weight": 0, "bilateral_weight": 0}, {"iterations": 0}])
def test_nothing_to_do_returns_the_clipped_probs(options):
    image, probs = example()
    probs[:, 0, 0] = [1, 0, 0, 0]
    clipped = probs.clip(1e-5, 1)
    np.testing.assert_allclose(dense_crf(image, probs, **options), clipped / clipped.sum(0), atol=1e-6)


def test_zero_weight_builds_no_lattice(monkeypatch):
    image, probs = example()
    built = []
    monkeypatch.setattr(crf._Kernel, "__init__", lambda self, *_, **__: built.append(self))
    dense_crf(image, probs, gaussian_weight=0, bilateral_weight=0)
    assert not built


def test_smooths_noise_away():
    image, probs = example(40, 40, 2)
    truth = (image[:, :, 0] < 120).astype(int)
    assert (probs.argmax(0) == truth).mean() < 0.8
    assert (dense_crf(image, probs).argmax(0) == truth).mean() > 0.98


def test_input_layouts_and_dtypes():
    image, probs = example()
    before, expected = probs.copy(), dense_crf(image, probs)
    np.testing.assert_array_equal(dense_crf(image, probs.astype(np.float64)), expected)
    np.testing.assert_array_equal(dense_crf(np.asfortranarray(image), np.asfortranarray(probs)), expected)
    spread = np.repeat(np.repeat(probs, 2, 1), 2, 2)[:, ::2, ::2]
    np.testing.assert_array_equal(dense_crf(image[::-1][::-1], spread), expected)
    np.testing.assert_array_equal(probs, before)  # the input is left alone
    np.testing.assert_allclose(dense_crf(image, probs.astype(np.float16)), expected, atol=0.02)


def test_huge_weights_do_not_overflow():
    image, probs = example()
    refined = dense_crf(image, probs, gaussian_weight=1e3, bilateral_weight=1e3)
    assert np.isfinite(refined).all()
    np.testing.assert_allclose(refined.sum(0), 1, atol=1e-5)


def test_repeats_and_threads_agree():
    cases = [example(10 + 3 * i, 20 - i, 3, seed=i) for i in range(6)]
    serial, threaded = [dense_crf(*case) for case in cases], [None] * len(cases)
    crf._spatial_kernel.cache_clear()

    def work(i):
        threaded[i] = dense_crf(*cases[i])

    workers = [threading.Thread(target=work, args=(i,)) for i in range(len(cases))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for one, other in zip(serial, threaded):
        np.testing.assert_array_equal(one, other)


def test_memory_of_a_full_size_image():
    image, probs = example(320, 320, 27)
    tracemalloc.start()
    dense_crf(image, probs, iterations=1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 400e6


# ---- errors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change, message", [
    ({"image": np.zeros((11, 14, 3), np.float32)}, "uint8"),
    ({"image": np.zeros((11, 14), np.uint8)}, "image must be"),
    ({"image": np.zeros((14, 11, 3), np.uint8)}, "probs must be"),
    ({"probs": np.zeros((4, 11, 0), np.float32)}, "probs must be"),
    ({"probs": np.zeros((0, 11, 14), np.float32)}, "probs must be"),
    ({"probs": np.zeros((4, 11, 14), np.int64)}, "float"),
    ({"probs": np.full((4, 11, 14), np.nan, np.float32)}, "NaN"),
    ({"probs": np.full((4, 11, 14), np.inf)}, "finite"),
    ({"gaussian_std": 0}, "positive"),
    ({"bilateral_xy_std": -1}, "positive"),
    ({"bilateral_rgb_std": float("nan")}, "positive"),
    ({"bilateral_rgb_std": 1e-3}, "too small"),
    ({"gaussian_std": 1e-5}, "too small"),
    ({"gaussian_weight": -1}, "negative"),
    ({"bilateral_weight": float("inf")}, "finite"),
    ({"iterations": -1}, "negative"),
])
def test_wrong_input_is_named(change, message):
    image, probs = example()
    with pytest.raises(ValueError, match=message):
        dense_crf(**{"image": image, "probs": probs, **change})
