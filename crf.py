"""Dense CRF in NumPy: mean field over all pairs of pixels, filtered on permutohedral lattices.

Two Gaussian kernels join every two pixels i, j with positions p and colours I (Krähenbühl & Koltun,
"Efficient Inference in Fully Connected CRFs with Gaussian Edge Potentials", NeurIPS 2011):

    k_g(i, j) = exp(-|p_i - p_j|^2 / (2 gaussian_std^2))
    k_b(i, j) = exp(-|p_i - p_j|^2 / (2 bilateral_xy_std^2) - |I_i - I_j|^2 / (2 bilateral_rgb_std^2))

Mean field approximates the labelling by independent Q_i and repeats, with n = (K_m 1)^(-1/2),

    Q_i(l) <- softmax_l( log probs_i(l) + sum_m w_m sum_j n_i k_m(i, j) n_j Q_j(l) )

A permutohedral lattice takes the sum over j in linear time (Adams, Baek & Davis, "Fast High-Dimensional
Filtering Using the Permutohedral Lattice", Eurographics 2010). Its simplices tile the space of d = 2 or 5
features. Splat: a pixel adds its values, times barycentric weights, to the d + 1 vertices of its simplex.
Blur: [1/2, 1, 1/2] along each of d + 1 axes. Slice: a pixel reads its sum back with the same weights.
This gives K up to a constant factor, which n cancels.

NumPy is slow at irregular access, so values are rows of C classes, splat and slice multiply by small dense
matrices, and the blur adds neighbouring rows. Results equal pydensecrf's up to rounding: the sum includes
j = i, probs are clipped at 1e-5, and colours enter as BGR, since the order of features matters slightly.
A call keeps one core busy; for many images, run one process per core, each with one BLAS thread.
"""
import functools

import numpy as np

TILE = 4  # side of the square of pixels that a stencil computes at once
GROUP = TILE ** 2  # pixels of a block: larger blocks share more vertices, but multiply more zeros
ROWS = 4096  # rows per NumPy call: enough to hide the cost of a call, few enough to stay in the cache


def dense_crf(image, probs, iterations=10, gaussian_std=1, gaussian_weight=3,
              bilateral_xy_std=67, bilateral_rgb_std=3, bilateral_weight=4):
    """Refine class probabilities so that close pixels agree, and so do less close ones of similar colour.

        Q <- softmax(log probs + gaussian_weight * K_g Q + bilateral_weight * K_b Q),  K normalised to n k n

    image: (H, W, 3) uint8, RGB. probs: (C, H, W) floats that sum to 1 over C. gaussian_std and
    bilateral_xy_std in pixels, bilateral_rgb_std in grey levels 0..255. A kernel of weight 0 costs nothing.
    Returns Q after `iterations` updates, (C, H, W) float32 that sum to 1 over C.
    Raises ValueError for a wrong shape or dtype, for probs that are not finite and for a standard deviation
    too small to number the cells of its lattice. That it is positive, and no weight negative, is not checked.
    """
    image, probs = np.asarray(image), np.asarray(probs)
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(f"image must be (H, W, 3) uint8, got {image.shape} {image.dtype}")
    if probs.shape[1:] != image.shape[:2] or probs.dtype.kind != "f" or not np.isfinite(probs).all():
        raise ValueError(f"probs must be (C, H, W) finite floats for an image of {image.shape[:2]}, got "
                         f"{probs.shape} {probs.dtype}, or values that are not finite")

    n_classes, height, width = probs.shape
    kernels = []
    if gaussian_weight:
        kernels.append(_spatial_kernel(height, width, gaussian_std, gaussian_weight))
    if bilateral_weight:
        kernels.append(_bilateral_kernel(image.tobytes(), height, width, bilateral_xy_std, bilateral_rgb_std,
                                         bilateral_weight))

    log_probs = np.log(probs.reshape(n_classes, -1).T.astype(np.float32, order="C").clip(1e-5, 1))  # (P, C)
    q = np.empty_like(log_probs)
    _update(q, log_probs, [])
    for _ in range(iterations):
        _update(q, log_probs, kernels)
    return np.ascontiguousarray(q.T).reshape(probs.shape)  # (C, H, W)


def _update(q, log_probs, kernels):
    """One mean-field update of q in place, (P, C) as log_probs. Without kernels it is softmax(log_probs)."""
    messages = [kernel.filter(q) for kernel in kernels]
    for start in range(0, len(q), ROWS):
        chunk = slice(start, start + ROWS)
        total = log_probs[chunk]
        for kernel, message in zip(kernels, messages):
            total = total + message.take(kernel.row_of_pixel[chunk], axis=0)
        if total.max() > 80:  # exp would overflow; it cannot underflow, as total is at least log 1e-5
            total = total - total.max(axis=1, keepdims=True)
        exp = np.exp(total, out=q[chunk])
        exp /= (exp @ np.ones(q.shape[1], np.float32))[:, None]


def _positions(height, width):
    return np.mgrid[:height, :width][::-1].reshape(2, -1).astype(np.float32)  # (2, P): x, y


@functools.lru_cache(maxsize=2)  # images are of one size, or of two: portrait and landscape
def _spatial_kernel(height, width, std, weight):
    kernel = _LatticeKernel(_positions(height, width) / np.float32(std), weight)
    # Splat and slice each reach less than one simplex and the blur two, all of side std.
    return _StencilKernel(kernel, height, width, reach=int(np.ceil(4 * std)) - 1) if std <= 1 else kernel


@functools.lru_cache(maxsize=1)  # the predictions of several probes for one image follow each other
def _bilateral_kernel(pixels, height, width, xy_std, rgb_std, weight):
    colours = np.frombuffer(pixels, np.uint8).reshape(-1, 3).T[::-1]  # (3, P): blue, green, red
    features = [_positions(height, width) / np.float32(xy_std), colours / np.float32(rgb_std)]
    return _LatticeKernel(np.vstack(features), weight)


def _lattice(features):
    """The lattice around P points with features (d, P) float32, in standard deviations.

    Returns an order of the points that keeps near simplices together; in this order, the vertices of each
    point and their barycentric weights, (P, d + 1) each; the ascending keys of the vertices, which pack their
    coordinates into one number; and how much the keys of neighbours differ along each of the d + 1 axes.
    """
    # The lattice lies in the hyperplane of d + 1 coordinates with sum 0, scaled for a filter of variance 1.
    # Precision and order of operations are pydensecrf's, so points near a face fall on the same side of it.
    d = len(features)
    axis = np.arange(1, d + 1)[:, None]
    scale = np.float32(np.sqrt(2 / 3) * (d + 1)) / np.sqrt(axis * (axis + 1))
    scaled = features * scale.astype(np.float32)
    elevated = np.cumsum(np.vstack([0 * scaled[:1], scaled[::-1]]), axis=0)[::-1]  # (d + 1, P)
    elevated[1:] -= axis.astype(np.float32) * scaled

    # The origin of a simplex is its vertex whose coordinates are multiples of d + 1. Rank 0 is the coordinate
    # in which a point is furthest ahead of it. Rounding leaves the hyperplane by sum(steps), which the
    # coordinates that were rounded furthest take back.
    steps = np.rint(elevated * np.float32(1 / (d + 1)))
    origin = steps * np.float32(d + 1)
    ahead = elevated - origin
    rank = np.stack([np.sum(ahead[:i] >= ahead[i], axis=0, dtype=np.int8)
                     + np.sum(ahead[i + 1:] > ahead[i], axis=0, dtype=np.int8) for i in range(d + 1)])
    carry, rank = np.divmod(rank + steps.sum(axis=0).astype(np.int64), d + 1)
    origin -= (d + 1) * carry
    descending = np.empty_like(elevated)
    np.put_along_axis(descending, rank, (elevated - origin) * np.float32(1 / (d + 1)), axis=0)
    weights = (descending - np.roll(descending, -1, axis=0))[::-1]  # (d + 1, P)
    weights[0] += 1

    # Vertex k is the origin + k, less d + 1 in the k coordinates of the highest ranks. The others imply the
    # last coordinate. The margin in `extent` lets a key step along any axis without a carry.
    origin, rank = origin[:d].astype(np.int64), rank[:d]
    origin -= origin.min(axis=1, keepdims=True)
    extent = origin.max(axis=1) + 4 * (d + 1)
    simplex = np.ravel_multi_index((*origin // (d + 1), *rank), (*extent // (d + 1), *[d + 1] * d))
    order = np.argsort(simplex)
    is_new = np.diff(simplex[order], prepend=-1) != 0  # the points of a simplex share its vertices
    origin, rank = origin[:, order[is_new]], rank[:, order[is_new]]
    radix = np.ravel_multi_index(np.eye(d, dtype=np.int64), extent)
    keys = np.stack([radix @ (origin + k - (d + 1) * (rank > d - k)) for k in range(d + 1)], axis=1)
    keys, vertices = np.unique(keys, return_inverse=True)
    vertices = vertices.reshape(-1, d + 1)[np.cumsum(is_new) - 1]  # (P, d + 1)
    key_steps = (d + 1) * np.append(radix, 0) - radix.sum()  # d on the axis itself, -1 on the others
    return order, vertices, weights.T[order], keys, abs(key_steps)


def _batches(sizes):
    """Batch the segments of a sequence by size, longest first, each padded to the longest of its batch.

    Yields, for each batch, its segments, their slice among all segments in this order, the slice of their
    padded items, and the index of these items in the sequence, (longest, segments), where -1 is padding.
    """
    first, order = np.cumsum(sizes) - sizes, np.argsort(-sizes, kind="stable")
    done = row = 0
    while done < len(order):
        longest = sizes[order[done]]
        segments = order[done:done + max(1, ROWS // longest)]
        item = np.arange(longest)[:, None]
        index = np.where(item < sizes[segments], first[segments] + item, -1)
        yield segments, slice(done, done + len(segments)), slice(row, row + index.size), index
        done, row = done + len(segments), row + index.size


class _LatticeKernel:
    """sqrt(w) n K n sqrt(w) over P pixels with features (d, P) float32, in standard deviations."""

    def __init__(self, features, weight):
        d, n_pixels = features.shape
        features = np.pad(features, ((0, 0), (0, -n_pixels % GROUP)), mode="edge")  # to fill the last block
        pixels, vertices, weights, keys, key_steps = _lattice(features)
        weights[pixels >= n_pixels] = 0  # so that the added pixels do not count

        # Near pixels share vertices, so the weights of GROUP pixels for their vertices form a dense block.
        # Here and below, index -1 is padding: it selects a last element that stands for no vertex.
        pixels, vertices = pixels.reshape(-1, GROUP), vertices.reshape(-1, GROUP * (d + 1))  # (groups, .)
        entry = np.argsort(vertices, axis=1)
        vertices = np.take_along_axis(vertices, entry, axis=1)
        weights = np.take_along_axis(weights.reshape(entry.shape), entry, axis=1)  # (groups, .)
        is_new = np.diff(vertices, axis=1, prepend=-1) != 0
        vertices = np.append(vertices[is_new], len(keys))
        block = np.zeros((len(vertices), GROUP), np.float32)
        block[np.cumsum(is_new) - 1, entry.ravel() // (d + 1)] = weights.ravel()
        self.blocks, row_of_pixel = [], np.empty(pixels.size, np.int64)
        for chosen, groups, items, index in _batches(is_new.sum(axis=1)):
            self.blocks.append((groups, items, pixels[chosen], vertices[index.T], block[index.T]))
            row_of_pixel[pixels[chosen].ravel()] = np.arange(groups.start * GROUP, groups.stop * GROUP)
        self.row_of_pixel = row_of_pixel[:n_pixels]

        # Splat: a vertex sums the items that several blocks have for it.
        vertices = np.concatenate([columns.ravel() for *_, columns, _ in self.blocks])
        items = np.append(np.argsort(vertices, kind="stable"), -1)
        self.sums, row_of_vertex = [], np.full(len(keys) + 1, -1)
        for chosen, rows, _, index in _batches(np.bincount(vertices)[:len(keys)]):
            self.sums.append((rows, items[index]))
            row_of_vertex[chosen] = np.arange(rows.start, rows.stop)

        # Blur: each line of neighbours is read from the rows of the last stage and written side by side.
        self.axes = []
        for step in key_steps:
            order = np.append(np.argsort(keys % step, kind="stable"), -1)
            starts = np.flatnonzero(np.append(True, np.diff(keys[order[:-1]]) != step))
            source, lines = row_of_vertex[order], []
            for _, _, rows, index in _batches(np.diff(starts, append=len(keys))):
                lines.append((rows, source[index]))
                row_of_vertex[order[index].ravel()] = np.arange(rows.start, rows.stop)
            row_of_vertex[-1] = -1
            self.axes.append(lines)

        # Slice: reads the rows of the last blur. Multiplied into the blocks, n and sqrt(w) cost nothing.
        for *_, columns, _ in self.blocks:
            columns[:] = row_of_vertex[columns]
        norm = self.filter(np.ones((n_pixels, 1), np.float32)) + np.float32(1e-20)
        norm = np.sqrt(np.float32(weight) / norm).reshape(-1, 1, GROUP)  # (groups, 1, GROUP)
        for groups, *_, block in self.blocks:
            block *= norm[groups]

    def filter(self, q):
        """The message of this kernel for q (P, C): row self.row_of_pixel[i] is that of pixel i."""
        n_classes, n_rows = q.shape[1], max(lines[-1][0].stop for lines in self.axes)
        partial = np.empty((self.blocks[-1][1].stop + 1, n_classes), np.float32)
        vertices = np.empty((n_rows + 1, n_classes), np.float32)
        blurred = np.empty_like(vertices)
        partial[-1] = vertices[-1] = blurred[-1] = 0
        for _, items, pixels, columns, block in self.blocks:  # splat
            out = partial[items].reshape(*columns.shape, n_classes)  # (groups, vertices, C)
            np.matmul(block, q.take(pixels, axis=0, mode="clip"), out=out)
        for rows, source in self.sums:
            partial.take(source, axis=0).sum(axis=0, out=vertices[rows])
        for lines in self.axes:  # blur
            for rows, source in lines:
                out = blurred[rows].reshape(*source.shape, n_classes)  # (vertices, lines, C)
                half = np.float32(0.5) * vertices.take(source, axis=0, out=out, mode="wrap")
                out[1:] += half[:-1]
                out[:-1] += half[1:]
            vertices, blurred = blurred, vertices
        del partial, blurred  # leaves their memory to the message
        message = np.empty((self.blocks[-1][0].stop, GROUP, n_classes), np.float32)
        for groups, _, _, columns, block in self.blocks:  # slice
            np.matmul(block.swapaxes(1, 2), vertices.take(columns, axis=0), out=message[groups])
        return message.reshape(-1, n_classes)  # (groups * GROUP, C)


class _StencilKernel:
    """A spatial kernel of small reach: a tile of pixels receives a dense block times the window around it."""

    def __init__(self, kernel, height, width, reach):
        side, period, n_pixels = TILE + 2 * reach, 2 * reach + 1, height * width
        y, x = np.divmod(np.arange(n_pixels), width)
        tile, cell = y // TILE * (x[-1] // TILE + 1) + x // TILE, y % TILE * TILE + x % TILE
        self.row_of_pixel = tile * GROUP + cell
        # Where a window leaves the image, any pixel will do, as its weight is 0.
        offsets = (np.arange(side)[:, None] - reach) * width + np.arange(side) - reach
        self.windows = (np.flatnonzero(cell == 0)[:, None] + offsets.ravel()).clip(0, n_pixels - 1)
        self.blocks = np.zeros((*self.windows.shape, GROUP), np.float32)
        # Senders with equal y and x modulo period reach no common pixel, so one pass separates all of them.
        received = kernel.filter(np.eye(period ** 2, dtype=np.float32)[y % period * period + x % period])
        for i, j in np.ndindex(period, period):
            sender = (y + i - reach) % period * period + (x + j - reach) % period
            place = (y % TILE + i) * side + x % TILE + j
            self.blocks[tile, place, cell] = received[kernel.row_of_pixel, sender]

    def filter(self, q):
        """As _LatticeKernel.filter."""
        message = np.empty((len(self.blocks), GROUP, q.shape[1]), np.float32)
        for start in range(0, len(message), ROWS // GROUP):
            chunk = slice(start, start + ROWS // GROUP)
            window = q.take(self.windows[chunk], axis=0)
            np.matmul(self.blocks[chunk].swapaxes(1, 2), window, out=message[chunk])
        return message.reshape(-1, q.shape[1])  # (tiles * GROUP, C)
