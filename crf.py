"""Dense CRF: mean field in a fully connected CRF, filtered on permutohedral lattices. NumPy only.

Every two pixels i, j are joined by two Gaussian kernels of their positions p and colours I (Krähenbühl & Koltun,
"Efficient Inference in Fully Connected CRFs with Gaussian Edge Potentials", NeurIPS 2011):

    k_g(i, j) = exp(-|p_i - p_j|^2 / (2 gaussian_std^2))                                                    smoothness
    k_b(i, j) = exp(-|p_i - p_j|^2 / (2 bilateral_xy_std^2) - |I_i - I_j|^2 / (2 bilateral_rgb_std^2))      appearance

Mean field approximates the labelling by independent Q_i and repeats (their algorithm 1, with a Potts model)

    Q_i(l) <- softmax_l( -U_i(l) + sum_m w_m sum_j n_i k_m(i, j) n_j Q_j(l) ),     U = -log probs,  n = (K_m 1)^(-1/2)

The sum over all j takes linear time on a permutohedral lattice (Adams, Baek & Davis, "Fast High-Dimensional Filtering
Using the Permutohedral Lattice", Eurographics 2010), K ~ slice . blur . splat: simplices tile the d-dimensional feature
space (d = 2 or 5); a pixel adds its values to the d + 1 vertices of its simplex with barycentric weights (splat), the
occupied vertices are blurred with [1/2, 1, 1/2] along d + 1 axes in turn, and the pixel reads its sum back with the
same weights (slice). Constant factors of K cancel in n.

What makes it fast in NumPy (values are rows of C floats, irregular access is `np.take` of whole rows):
- slice: 16 pixels of near simplices, which share vertices, have one dense block of weights; many are one `np.matmul`;
- splat: the same blocks transposed, then for each vertex the sum of what several blocks add to it;
- blur: the lines of vertices along an axis lie side by side, so that whole rows of neighbours are added;
- blocks, sums and lines of like size make one batch, filled up with zeros; n and sqrt(w) are folded into the blocks;
- where k_g reaches but three pixels, slice . blur . splat is composed, once for all images of a size.

As pydensecrf, whose results it equals to rounding: the term j = i stays in the sum, probs are clipped at 1e-5.
As in the authors' code (src/crf.py, eb4d6b5) colours enter as BGR; a lattice is not symmetric in the order of features.
One call keeps one core busy: for many images run one process a core, each with one BLAS thread.
"""
import functools

import numpy as np

TILE = 4  # side of a square of pixels
GROUP = TILE ** 2  # pixels of a dense block: more share more vertices, but multiply more zeros
ROWS = 4096  # rows handled by one NumPy call: few calls, yet the rows stay in the processor's cache


def dense_crf(image, probs, iterations=10, gaussian_std=1, gaussian_weight=3,
              bilateral_xy_std=67, bilateral_rgb_std=3, bilateral_weight=4):
    """Refine class probabilities so that pixels that are near, or of like colour and not far, agree.

        Q <- softmax(log probs + gaussian_weight * K_g Q + bilateral_weight * K_b Q),    K normalised to n k n

    image: (H, W, 3) uint8, RGB. probs: (C, H, W) floats that sum to 1 over C. gaussian_std and bilateral_xy_std in pixels,
    bilateral_rgb_std in grey levels of 0..255. A kernel of weight 0 is left out, at no cost.
    Returns Q after `iterations` updates, (C, H, W) float32 that sum to 1 over C.
    Raises ValueError for a wrong shape or dtype, for probs that are not finite, for a standard deviation that is not
    positive (or too small to number the cells of its lattice), for a negative weight or number of iterations.
    """
    image, probs = np.asarray(image), np.asarray(probs)
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(f"image must be (H, W, 3) uint8, got {image.shape} {image.dtype}")
    if probs.ndim != 3 or probs.shape[1:] != image.shape[:2] or probs.size == 0:
        raise ValueError(f"probs must be (C, H, W) with H, W of the image, {image.shape[:2]}, got {probs.shape}")
    if not np.issubdtype(probs.dtype, np.floating) or not np.isfinite(probs).all():
        raise ValueError(f"probs must be finite floats, got {probs.dtype}, or NaN or infinity among them")
    for std in (gaussian_std, bilateral_xy_std, bilateral_rgb_std):
        if not 1e-6 < std < np.inf:
            raise ValueError(f"standard deviations must be positive (above 1e-6) and finite, got {std}")
    for number in (gaussian_weight, bilateral_weight, iterations):
        if not 0 <= number < np.inf:
            raise ValueError(f"weights and iterations must be finite and not negative, got {number}")

    n_classes, height, width = probs.shape
    kernels = []
    if gaussian_weight:
        kernels.append(_spatial_kernel(height, width, float(gaussian_std), float(gaussian_weight)))
    if bilateral_weight:
        kernels.append(_bilateral_kernel(image.tobytes(), height, width, float(bilateral_xy_std), float(bilateral_rgb_std),
                                         float(bilateral_weight)))

    log_probs = np.log(probs.reshape(n_classes, -1).T.astype(np.float32, order="C").clip(1e-5, 1))  # (P, C), as all below
    q = np.empty_like(log_probs)
    for iteration in range(iterations + 1):  # number 0, without messages, is the start Q = softmax(-U)
        messages = [(kernel.filter(q), kernel.place) for kernel in kernels] if iteration else []
        for lo in range(0, len(q), ROWS):
            total = log_probs[lo:lo + ROWS]
            for message, place in messages:
                total = total + message.take(place[lo:lo + ROWS], axis=0)
            if total.max() > 80:  # exp would overflow; below it needs no shift, as messages >= 0 and -U >= log 1e-5
                total -= total.max(axis=1, keepdims=True)
            x = np.exp(total, out=q[lo:lo + ROWS])
            x /= (x @ np.ones(n_classes, np.float32))[:, None]
    return np.ascontiguousarray(q.T).reshape(probs.shape)


def _positions(height, width):
    return np.mgrid[:height, :width][::-1].reshape(2, -1).astype(np.float32)  # x, y


@functools.lru_cache(maxsize=2)  # a data set has one image size, or few
def _spatial_kernel(height, width, std, weight):
    kernel = _Kernel(_positions(height, width) / np.float32(std), weight)
    return _Stencil(kernel, height, width, reach=int(np.ceil(4 * std)) - 1) if std <= 1 else kernel


@functools.lru_cache(maxsize=1)  # predictions of several probes for one image follow each other
def _bilateral_kernel(pixels, height, width, xy_std, rgb_std, weight):
    colour = np.frombuffer(pixels, np.uint8).reshape(-1, 3).T[::-1]  # BGR
    return _Kernel(np.vstack([_positions(height, width) / np.float32(xy_std), colour / np.float32(rgb_std)]), weight)


def _lattice(features):
    """Permutohedral lattice around points (Adams et al., section 3): features (d, P) float32, in standard deviations.

    Returns the points in an order that keeps those of near simplices together; in this order the vertices of the simplex
    of each, (P, d + 1), and its barycentric weights, (P, d + 1); for each vertex its coordinates packed to one number,
    rising; and how far this number is from that of the next vertex along each of the d + 1 axes.
    """
    d = len(features)
    # Onto the hyperplane sum = 0 of d + 1 dimensions, scaled so that the whole filter has unit variance. All in float32
    # and in pydensecrf's order: a point within rounding of a face should fall on the same side of it.
    axis = np.arange(1, d + 1)[:, None]
    scaled = features * (np.float32(np.sqrt(2 / 3) * (d + 1)) / np.sqrt(axis * (axis + 1))).astype(np.float32)
    elevated = np.cumsum(np.vstack([0 * scaled[:1], scaled[::-1]]), axis=0)[::-1]
    elevated[1:] -= axis.astype(np.float32) * scaled

    # Origin of a simplex: the vertex whose coordinates are multiples of d + 1. A coordinate ranks by how far the point lies
    # ahead of it there, the furthest first, of equals the lower coordinate first.
    steps = np.rint(elevated * np.float32(1 / (d + 1)))
    origin = steps * np.float32(d + 1)
    apart = elevated - origin
    rank = np.stack([np.sum(apart[:i] >= apart[i], axis=0, dtype=np.int8)
                     + np.sum(apart[i + 1:] > apart[i], axis=0, dtype=np.int8) for i in range(d + 1)])
    # Rounding leaves the hyperplane by sum(steps): take it back from the coordinates that were rounded furthest.
    carry, rank = np.divmod(rank + steps.sum(axis=0).astype(np.int64), d + 1)
    origin -= (d + 1) * carry
    falling = np.empty_like(elevated)
    np.put_along_axis(falling, rank, (elevated - origin) * np.float32(1 / (d + 1)), axis=0)
    weights = (falling - np.roll(falling, -1, axis=0))[::-1]
    weights[0] += 1

    origin, rank = origin[:d].astype(np.int64), rank[:d]  # the last of d + 1 coordinates is implied: they sum to zero
    origin -= origin.min(axis=1, keepdims=True)
    extent = origin.max(axis=1) + 4 * (d + 1)  # with room to step along any axis without a carry
    if np.prod(extent.astype(float)) > 2.0 ** 60 or np.ptp(features, axis=1).max() > 1e5:  # float32 is too coarse
        raise ValueError("a standard deviation is too small for this image: its lattice has too many cells to number")
    simplex = np.ravel_multi_index((*origin // (d + 1), *rank), (*extent // (d + 1), *[d + 1] * d))
    order = np.argsort(simplex)
    is_new = np.diff(simplex[order], prepend=-1) != 0  # other points have the vertices of the one before
    origin, rank = origin[:, order[is_new]], rank[:, order[is_new]]
    radix = np.ravel_multi_index(np.eye(d, dtype=np.int64), extent)
    # Vertex k of a simplex is origin + k, less d + 1 in the last k coordinates by rank; weights has its weight in row k.
    keys = np.stack([radix @ (origin + k - (d + 1) * (rank > d - k)) for k in range(d + 1)], axis=1)
    keys, corners = np.unique(keys, return_inverse=True)
    corners = corners.reshape(-1, d + 1)[np.cumsum(is_new) - 1]
    steps = (d + 1) * np.append(radix, 0) - radix.sum()  # d on the axis itself, -1 on the others
    return order, corners, weights.T[order], keys, abs(steps)


def _batches(sizes):
    """Cut a sequence into segments of the given sizes; side by side, those of like size make batches of about ROWS items.

    Yields of each batch, longest first: its segments; their slice of all segments in this order; the slice of their items;
    the index of these in the sequence, (size of the longest, number of segments), where -1 fills up shorter segments.
    """
    first, order = np.cumsum(sizes) - sizes, np.argsort(-sizes, kind="stable")
    lo = begin = 0
    while lo < len(order):
        size = sizes[order[lo]]
        segments = order[lo:lo + max(1, ROWS // size)]
        item = np.arange(size)[:, None]
        index = np.where(item < sizes[segments], first[segments] + item, -1)
        yield segments, slice(lo, lo + len(segments)), slice(begin, begin + index.size), index
        lo, begin = lo + len(segments), begin + index.size


class _Kernel:
    """sqrt(w) n K n sqrt(w) for one kernel over P points, ready to filter; nothing in it changes once it is built."""

    def __init__(self, features, weight):
        """features (d, P) float32, in standard deviations."""
        d, n_points = features.shape
        features = np.pad(features, ((0, 0), (0, -n_points % GROUP)), mode="edge")  # points that fill the last block
        points, corners, weights, keys, steps = _lattice(features)
        weights[points >= n_points] = 0  # and weigh nothing

        # Blocks: the weights of GROUP points for the K vertices that any of them has.
        points, corners = points.reshape(-1, GROUP), corners.reshape(-1, GROUP * (d + 1))
        entry = np.argsort(corners, axis=1)
        corners = np.take_along_axis(corners, entry, axis=1)
        weights = np.take_along_axis(weights.reshape(entry.shape), entry, axis=1)
        is_new = np.diff(corners, axis=1, prepend=-1) != 0
        vertices = np.append(corners[is_new], len(keys))  # the last is none
        block = np.zeros((len(vertices), GROUP), np.float32)
        block[np.cumsum(is_new) - 1, entry.ravel() // (d + 1)] = weights.ravel()
        blocks, self.place = [], np.empty(points.size, np.int64)  # row of each point in the output
        for chosen, groups, items, index in _batches(is_new.sum(axis=1)):
            blocks.append((groups, items, points[chosen], vertices[index.T], block[index.T]))
            self.place[points[chosen].ravel()] = np.arange(groups.start * GROUP, groups.stop * GROUP)
        self.place = self.place[:n_points]

        # Sums: for each vertex the rows that blocks add to it. Row -1 is that of none, here and below, and holds zeros.
        vertices = np.concatenate([columns.ravel() for *_, columns, _ in blocks])
        items = np.append(np.argsort(vertices, kind="stable"), -1)
        self.sums, row = [], np.full(len(keys) + 1, -1)  # row of each vertex
        for chosen, rows, _, index in _batches(np.bincount(vertices)[:len(keys)]):
            self.sums.append((rows, items[index]))
            row[chosen] = np.arange(rows.start, rows.stop)

        # Lines of adjacent vertices along each axis: the rows for them after the blur, and their rows before.
        self.axes = []
        for step in steps:
            order = np.append(np.argsort(keys % step, kind="stable"), -1)  # line after line
            first = np.flatnonzero(np.append(True, np.diff(keys[order[:-1]]) != step))
            before, row = row[order], np.full_like(row, -1)
            self.axes.append([])
            for _, _, rows, index in _batches(np.diff(first, append=len(keys))):
                self.axes[-1].append((rows, before[index]))
                row[order[index].ravel()] = np.arange(rows.start, rows.stop)
            row[-1] = -1
        self.blocks = [(groups, items, points, row[columns], block) for groups, items, points, columns, block in blocks]

        norm = self.filter(np.ones((n_points, 1), np.float32))  # K 1
        norm = np.sqrt(np.float32(weight) / (norm + np.float32(1e-20))).reshape(-1, 1, GROUP)
        for groups, *_, block in self.blocks:
            block *= norm[groups]

    def filter(self, q):
        """q (P, C) -> message of this kernel, that of point i in row self.place[i]."""
        n_classes, n_rows = q.shape[1], max(batches[-1][0].stop for batches in self.axes)
        partial = np.empty((self.blocks[-1][1].stop + 1, n_classes), np.float32)
        vertices, blurred = np.empty((2, n_rows + 1, n_classes), np.float32)
        partial[-1] = vertices[-1] = blurred[-1] = 0
        for _, items, points, columns, block in self.blocks:  # splat
            np.matmul(block, q.take(points, axis=0, mode="clip"), out=partial[items].reshape(*columns.shape, n_classes))
        for rows, source in self.sums:
            partial.take(source, axis=0).sum(axis=0, out=vertices[rows])
        for batches in self.axes:  # blur
            for rows, source in batches:
                x = vertices.take(source, axis=0, out=blurred[rows].reshape(*source.shape, n_classes), mode="wrap")
                half = x * np.float32(0.5)
                x[1:] += half[:-1]
                x[:-1] += half[1:]
            vertices, blurred = blurred, vertices
        del partial, blurred  # their memory is enough for the output
        out = np.empty((self.blocks[-1][0].stop, GROUP, n_classes), np.float32)
        for groups, _, _, columns, block in self.blocks:  # slice
            np.matmul(block.swapaxes(1, 2), vertices.take(columns, axis=0), out=out[groups])
        return out.reshape(-1, n_classes)


class _Stencil:
    """A spatial kernel of small reach, composed: a tile of 4 x 4 pixels is a dense block times the window it sees."""

    def __init__(self, kernel, height, width, reach):
        """reach of a pixel, in pixels: a simplex, two steps of blur and a simplex again, all of side std, ends excluded."""
        self.side, period = TILE + 2 * reach, 2 * reach + 1
        y, x = np.divmod(np.arange(height * width), width)
        band, tile, lane = x // TILE, y // TILE, y % TILE * TILE + x % TILE  # a band: the tiles above each other
        n_bands, n_tiles = band[-1] + 1, tile[-1] + 1
        self.place = (band * n_tiles + tile) * GROUP + lane
        self.blocks = np.zeros((n_bands, n_tiles, self.side ** 2, GROUP), np.float32)
        # No two pixels of a period by period square are of one class, so one filtering tells all that a pixel receives.
        received = kernel.filter(np.eye(period ** 2, dtype=np.float32)[y % period * period + x % period])
        for i, j in np.ndindex(period, period):
            sender = (y + i - reach) % period * period + (x + j - reach) % period
            cell = (y % TILE + i) * self.side + x % TILE + j
            self.blocks[band, tile, cell, lane] = received[kernel.place, sender]
        y = np.arange(n_tiles * TILE + 2 * reach)[:, None] - reach  # what lies outside of the image meets zeros
        x = np.arange(n_bands)[:, None, None] * TILE + np.arange(self.side) - reach
        self.columns = (y.clip(0, height - 1) * width + x.clip(0, width - 1)).reshape(n_bands, -1)

    def filter(self, q):
        """As _Kernel.filter; a window is 4 rows of its band below the one before."""
        out = np.empty((*self.blocks.shape[:2], GROUP, q.shape[1]), np.float32)
        for columns, blocks, tiles in zip(self.columns, self.blocks, out):
            band = q.take(columns, axis=0)
            below = TILE * self.side * band.strides[0]
            windows = np.ndarray((*blocks.shape[:2], q.shape[1]), q.dtype, band, strides=(below, *band.strides))
            np.matmul(blocks.swapaxes(1, 2), windows, out=tiles)
        return out.reshape(-1, q.shape[1])
