"""crf.py against values of pydensecrf and dense matrices of the lattice as defined."""
from pathlib import Path

import numpy as np
import pytest

import crf
from crf import dense_crf


def example(height=11, width=14, n_classes=4):
    """A noisy image of two colours that the classes weakly follow: (H, W, 3) uint8, (C, H, W) float32."""
    rng = np.random.default_rng(0)
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
    colours = [] if rgb_std is None else list(image.reshape(-1, 3).T[::-1] / rgb_std)
    return np.stack([x / xy_std, y / xy_std, *colours], axis=1)


def lattice_kernel(features):
    """The (P, P) matrix of the permutohedral filter in float64.

    Its lattice is (d + 1) Z^(d+1), projected along (1, ..., 1) onto the hyperplane of sum 0. The vertices
    around a point come from rounding down all its coordinates but the m of largest fraction, for m = 0..d.
    """
    d = features.shape[1]
    corners = []  # of each point {vertex: weight}
    for point in features:
        scaled = [point[i] * (d + 1) * np.sqrt(2 / 3) / np.sqrt((i + 1) * (i + 2)) for i in range(d)]
        elevated = np.array([sum(scaled[i:]) - (i * scaled[i - 1] if i else 0) for i in range(d + 1)])
        rounded = np.floor(elevated / (d + 1))
        fraction = (elevated - (d + 1) * rounded) / (d + 1)
        order = np.argsort(-fraction, kind="stable")  # decides which simplex has a point on a face
        weights = -np.diff(fraction[order], prepend=1 + fraction[order[-1]])
        corners.append({})
        for m in range(d + 1):
            corners[-1][tuple((d + 1) * rounded - rounded.sum())] = weights[m]
            rounded[order[m]] += 1
    vertices = np.array(sorted(set().union(*corners)))  # (V, d + 1)
    splat = np.array([[weights.get(tuple(v), 0) for weights in corners] for v in vertices])  # (V, P)
    gap, blurred = vertices[:, None] - vertices, splat
    for axis in range(d + 1):
        step = np.where(np.arange(d + 1) == axis, d, -1)
        is_neighbour = (gap == step).all(-1) | (gap == -step).all(-1)
        blurred = blurred + 0.5 * (is_neighbour @ blurred)
    return splat.T @ blurred


def mean_field(probs, weighted_kernels, iterations):
    """The update of the paper with dense (P, P) matrices: the definition of what dense_crf computes."""
    def softmax(x):
        return np.exp(x - x.max(0)) / np.exp(x - x.max(0)).sum(0)
    unary = np.log(probs.astype(float).clip(1e-5, 1)).reshape(len(probs), -1)  # (C, P)
    normalised = [(w, k / np.sqrt(np.outer(k.sum(1), k.sum(1)))) for w, k in weighted_kernels]
    q = softmax(unary)
    for _ in range(iterations):
        q = softmax(unary + sum(w * q @ k.T for w, k in normalised))
    return q.reshape(probs.shape)


@pytest.mark.parametrize("key, options", [
    ("crf", {}), ("gaussian_only", {"bilateral_weight": 0}),
    ("bilateral_only_1iter", {"gaussian_weight": 0, "iterations": 1})])
def test_equals_pydensecrf(key, options):
    golden = np.load(Path(__file__).with_name("golden_crf.npz"))  # 5 classes, 61 x 83, from pydensecrf2 1.1
    refined = dense_crf(golden["image"], golden["probs"], **options)
    assert refined.dtype == np.float32
    np.testing.assert_array_equal(refined.argmax(0), golden[key].argmax(0))
    np.testing.assert_allclose(refined, golden[key], rtol=0, atol=1e-5)


@pytest.mark.parametrize("height, width", [(11, 14), (1, 9), (10, 1), (1, 1), (4, 8)])
@pytest.mark.parametrize("gaussian_std", [0.2, 0.5, 0.8, 1, 1.3])  # up to 1 a stencil, above a lattice
def test_equals_matrices_of_the_lattice(height, width, gaussian_std):
    image, probs = example(height, width)
    probs[:, 0, 0] = [1, 0, 0, 0]  # is clipped
    spatial = (3, lattice_kernel(features_of(image, gaussian_std)))
    bilateral = (4, lattice_kernel(features_of(image, 5, 9)))
    for kernels, weight in (([spatial], 0), ([spatial, bilateral], 4)):
        refined = dense_crf(image, probs, 5, gaussian_std, 3, 5, 9, weight)
        np.testing.assert_allclose(refined, mean_field(probs, kernels, 5), rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 7, 1), (2, 3, 40), (1, 3000, 2), (37, 50, 3)])
def test_probabilities_of_any_size_sum_to_one(shape):
    image, probs = example(*shape)
    for weight in (3, 1e3):  # exp would overflow with the larger.
        refined = dense_crf(image, probs, 3, 1, weight, 67, 3, weight)
        assert refined.shape == probs.shape and refined.flags.c_contiguous and (refined >= 0).all()
        np.testing.assert_allclose(refined.sum(0), 1, atol=1e-5)


def test_precision_layout_and_order_of_classes_do_not_matter():
    image, probs = example()
    half = probs.astype(np.float16)
    before, expected = half.copy(), dense_crf(image, half.astype(np.float32))
    for same in (half, half.astype(np.float64), np.asfortranarray(half), np.repeat(half, 2, 2)[:, :, ::2]):
        np.testing.assert_array_equal(dense_crf(np.asfortranarray(image), same), expected)
    np.testing.assert_array_equal(half, before)
    permuted = dense_crf(image, half[[3, 0, 1, 2]])
    np.testing.assert_allclose(permuted, expected[[3, 0, 1, 2]], atol=1e-6)


def test_caches_change_no_result():
    image, probs = example()
    one, other, again = (dense_crf(photo, probs) for photo in (image, image[::-1], image))
    crf._bilateral_kernel.cache_clear()
    np.testing.assert_array_equal(dense_crf(image[::-1], probs), other)
    assert np.array_equal(one, again) and not np.array_equal(one, other)


@pytest.mark.parametrize("change, message", [
    ({"image": np.zeros((11, 14, 3), np.float32)}, "uint8"),
    ({"image": np.zeros((11, 14, 4), np.uint8)}, "image must be"),
    ({"image": np.zeros((14, 11, 3), np.uint8)}, "probs must be"),
    ({"probs": np.ones((4, 11, 14), np.int64)}, "float"),
    ({"probs": np.full((4, 11, 14), np.nan, np.float32)}, "finite")])
def test_wrong_input_is_refused(change, message):
    image, probs = example()
    with pytest.raises(ValueError, match=message):
        dense_crf(**{"image": image, "probs": probs, **change})
