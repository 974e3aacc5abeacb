"""Dense CRF: mean field in a fully connected CRF, filtered on permutohedral lattices. NumPy only.

Every pixel i is joined to every other pixel j by two Gaussian kernels (Krähenbühl & Koltun, NeurIPS 2011):

    k_g(i, j) = exp(-|p_i - p_j|^2 / 2 gaussian_std^2)                                                (smoothness)
    k_b(i, j) = exp(-|p_i - p_j|^2 / 2 bilateral_xy_std^2 - |I_i - I_j|^2 / 2 bilateral_rgb_std^2)    (appearance)

with positions p and colours I. The mean-field approximation Q of the labelling is the fixed point of

    Q_i(l) = softmax_l( -U_i(l) + sum_m w_m sum_j n_i k_m(i, j) n_j Q_j(l) ),    n = (K_m 1)^(-1/2)   (algorithm 1)

where U = -log(probs). The sums over all j are what is expensive; the permutohedral lattice (Adams, Baek & Davis,
Eurographics 2010) approximates them in linear time: K = slice . blur . splat. In d dimensions (2 or 5) it tiles the
feature space with simplices; a pixel adds its values to the d + 1 vertices of its simplex with barycentric weights
(splat), the occupied vertices are blurred with [1/2, 1, 1/2] along each of the d + 1 axes, and the pixel reads the
result back with the same weights (slice). Constant factors of K cancel in the normalisation n.

Written for NumPy: values are rows of C floats, and all irregular access is `np.take` of whole rows.
- 16 pixels that share vertices form a group with one small dense (16, K) weight matrix over the K vertices that they
  touch. Slice is a batch of products `weights @ vertices`, splat is its transpose followed by a sum over groups.
- n and sqrt(w) are folded into those weights, so normalisation and kernel weight cost nothing per iteration.
- Sequences of unequal length (terms of a sum, vertices along an axis) are sorted by length and cut into rectangles,
  so that sums and blurs are contiguous additions of whole arrays.

As pydensecrf: the lattice keeps the self term j = i, `probs` is clipped at 1e-5, and colours enter as BGR (as the
STEGO authors feed them; a lattice is not symmetric in the order of its features). Results equal it to rounding.
"""
import functools

import numpy as np

TILE = 4  # pixels of one image tile are neighbours in memory
GROUP = TILE * TILE  # pixels that share one dense weight matrix: more amortises calls, fewer wastes less on zeros
ROWS = 8192  # rows gathered at a time: ROWS x C floats stay in the processor's cache


def dense_crf(image, probs, iterations=10, gaussian_std=1, gaussian_weight=3,
              bilateral_xy_std=67, bilateral_rgb_std=3, bilateral_weight=4):
    """Refine per-pixel class probabilities so that near pixels of like colour agree.

        Q <- softmax(log probs + gaussian_weight * K_g Q + bilateral_weight * K_b Q),  K normalised as n k n

    image: (H, W, 3) uint8, RGB. probs: (C, H, W) floats, softmax over C, clipped at 1e-5 before the logarithm.
    gaussian_std, bilateral_xy_std: pixels; bilateral_rgb_std: grey levels (0..255). The defaults are the authors'.
    A kernel of weight 0 is left out. Returns Q after `iterations` updates, (C, H, W) float32, sums over C to 1.
    Raises ValueError for wrong shapes or dtypes, for values that are not finite, for a standard deviation that is not
    positive (or so small that the lattice cannot be indexed), and for a negative weight or number of iterations.
    """
    image, probs = np.asarray(image), np.asarray(probs)
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(f"image must be (H, W, 3) uint8, got {image.shape} {image.dtype}")
    if probs.ndim != 3 or probs.shape[1:] != image.shape[:2] or probs.size == 0:
        raise ValueError(f"probs must be (C, H, W) with the H, W of the image {image.shape[:2]}, got {probs.shape}")
    if not np.issubdtype(probs.dtype, np.floating) or not np.isfinite(probs).all():
        raise ValueError(f"probs must be finite floats, got {probs.dtype} or a NaN or infinite value")
    for std in (gaussian_std, bilateral_xy_std, bilateral_rgb_std):
        if not 0 < np.float32(std) < np.inf:
            raise ValueError(f"standard deviations must be positive and finite, got {std}")
    for weight in (gaussian_weight, bilateral_weight, iterations):
        if not 0 <= weight < np.inf:
            raise ValueError(f"weights and iterations must be finite and not negative, got {weight}")

    n_classes, height, width = probs.shape
    order, position = _tiles(height, width)  # rows of all arrays below are pixels in this order
    kernels = []
    if gaussian_weight:
        kernels.append(_spatial_kernel(height, width, gaussian_std, gaussian_weight))
    if bilateral_weight:
        colour = image.reshape(-1, 3)[order, ::-1].astype(np.float32)
        features = np.hstack([position / np.float32(bilateral_xy_std), colour / np.float32(bilateral_rgb_std)])
        kernels.append(_Kernel(features, bilateral_weight, sort=True))

    unary = np.log(np.clip(probs, 1e-5, 1)).astype(np.float32, copy=False).reshape(n_classes, -1)
    log_probs = np.empty((height * width, n_classes), np.float32)
    for lo in range(0, len(order), ROWS):
        log_probs[lo:lo + ROWS] = np.take(unary, order[lo:lo + ROWS], axis=1).T
    q, part, ones = np.empty_like(log_probs), np.empty((ROWS, n_classes), np.float32), np.ones((n_classes, 1), np.float32)
    *scratch, messages = _scratch(kernels, n_classes)
    for iteration in range(iterations + 1):  # the first, without messages, is Q = softmax(-U)
        for kernel, message in zip(kernels, messages if iteration else []):
            kernel.filter(q, *scratch, message)
        for lo in range(0, len(q), ROWS):
            x = q[lo:lo + ROWS]
            x[:] = log_probs[lo:lo + ROWS]
            for kernel, message in zip(kernels, messages if iteration else []):
                if kernel.place is None:
                    x += message[lo:lo + len(x)]
                else:
                    x += np.take(message, kernel.place[lo:lo + ROWS], axis=0, out=part[:len(x)], mode="clip")
            if x.max() > 80:  # exp would overflow; else no shift is needed, as messages are >= 0 and -U >= log 1e-5
                x -= x.max(axis=1, keepdims=True)
            np.exp(x, out=x)
            x /= x @ ones
    result, inverse = unary, np.argsort(order)
    for lo in range(0, len(order), ROWS):
        result[:, lo:lo + ROWS] = np.take(q, inverse[lo:lo + ROWS], axis=0).T
    return result.reshape(probs.shape)


@functools.lru_cache(maxsize=2)
def _tiles(height, width):
    """Pixels tile by tile -> raster index (P,), position (x, y) (P, 2) float32."""
    y, x = (a.ravel() for a in np.mgrid[:height, :width])
    order = np.lexsort((x, y, x // TILE, y // TILE))
    return order, np.stack([x, y], axis=1)[order].astype(np.float32)


@functools.lru_cache(maxsize=2)
def _spatial_kernel(height, width, std, weight):
    _, position = _tiles(height, width)
    return _Kernel(position / np.float32(std), weight, sort=False)


def _simplices(features):
    """Enclosing simplex of each point (Adams et al., section 3.1): features (P, d) float32, in standard deviations.

    Returns the simplex's vertex of remainder 0 (d, P), the rank of each coordinate in the falling order of the
    differences from it (d, P), integers, and the barycentric weights (P, d + 1) of the vertices of remainder 0..d.
    """
    n_points, d = features.shape
    # Elevate to the hyperplane sum = 0 in d + 1 dimensions; the scale makes the blur a Gaussian of unit variance.
    scale = (np.sqrt(2 / 3) * (d + 1) / np.sqrt(np.arange(1, d + 1) * np.arange(2, d + 2))).astype(np.float32)
    elevated, total = np.empty((d + 1, n_points), np.float32), np.zeros(n_points, np.float32)
    for j in range(d, 0, -1):
        scaled = features[:, j - 1] * scale[j - 1]
        elevated[j] = total - np.float32(j) * scaled
        total += scaled
    elevated[0] = total

    nearest = np.rint(elevated * np.float32(1 / (d + 1)))
    origin = nearest * np.float32(d + 1)
    rank = np.zeros((d + 1, n_points), np.int32)
    difference = elevated - origin
    for i in range(d):
        for j in range(i + 1, d + 1):
            less = difference[i] < difference[j]  # ties go to the lower index
            rank[i] += less
            rank[j] += ~less
    # Rounding may have left the hyperplane by sum(nearest) steps: move the coordinates that were rounded most.
    rank += nearest.sum(axis=0).astype(np.int32)
    wrap = (d + 1) * ((rank < 0).astype(np.int32) - (rank > d))
    rank += wrap
    origin += wrap

    falling = np.empty((d + 1, n_points), np.float32)
    np.put_along_axis(falling, rank, (elevated - origin) * np.float32(1 / (d + 1)), axis=0)
    weights = np.empty((n_points, d + 1), np.float32)
    weights[:, 1:] = (falling[d - 1::-1] - falling[:0:-1]).T
    weights[:, 0] = falling[d] + (1 - falling[0])
    return origin[:d], rank, weights


def _runs(sizes):
    """Cut items sorted by falling size into runs (start, stop, size of the first) of about ROWS padded elements."""
    start = 0
    while start < len(sizes):
        size = int(sizes[start])
        stop = min(len(sizes), start + max(1, ROWS // size))
        yield start, stop, size
        start = stop


def _argsort(keys):
    """Stable argsort of integers in [0, 2^32), 16 bits at a time: NumPy sorts those by radix, ten times faster."""
    order = np.argsort((keys & 0xFFFF).astype(np.uint16), kind="stable")
    if keys.max() > 0xFFFF:
        order = order[np.argsort((keys[order] >> 16).astype(np.uint16), kind="stable")]
    return order


class _Sparse:
    """A sparse matrix as dense blocks: GROUP consecutive rows times the K columns that any of them uses."""

    def __init__(self, row, column, value, keep_order=False):
        """Entries row, column, value, listed so that equal columns of a group follow each other."""
        group = row // GROUP
        lane = row - group * GROUP
        order = _argsort(group)
        group, lane, column, value = group[order], lane[order], column[order], value[order]
        is_new = np.append(True, (np.diff(group) != 0) | (np.diff(column) != 0))
        width = np.bincount(group[is_new])  # K of each group
        within = np.cumsum(is_new) - 1 - (np.cumsum(width) - width)[group]  # column of an entry within its block
        if keep_order:
            width[:] = width.max()
        by_width = _argsort(width.max() - width)

        begin, bounds, n_cells = np.empty_like(width), [], 0
        for start, stop, size in _runs(width[by_width]):
            begin[by_width[start:stop]] = n_cells + size * np.arange(stop - start)
            bounds.append((start * GROUP, stop * GROUP, n_cells, n_cells + size * (stop - start)))
            n_cells = bounds[-1][-1]
        columns, blocks = np.zeros(n_cells, np.int64), np.zeros(n_cells * GROUP, np.float32)
        cell = begin[group] + within
        columns[cell] = column
        blocks[cell * GROUP + lane] = value
        self.runs = [(lo, hi, columns[at:end], blocks[at * GROUP:end * GROUP].reshape((hi - lo) // GROUP, -1, GROUP))
                     for lo, hi, at, end in bounds]
        self.n_rows = len(width) * GROUP
        self.place = np.empty(self.n_rows, np.int64)  # where each row of the matrix is in the output
        self.place.reshape(-1, GROUP)[by_width] = np.arange(self.n_rows).reshape(-1, GROUP)

    def scale(self, rows=None, columns=None):
        """Multiply by a diagonal matrix from the left (`rows`, in the order of the output) or from the right."""
        for lo, hi, index, blocks in self.runs:  # blocks are stored transposed, (groups, K, GROUP)
            blocks *= rows[lo:hi].reshape(-1, 1, GROUP) if columns is None else columns[index].reshape(len(blocks), -1, 1)

    def multiply(self, x, out, buffer):
        """x (columns, C) -> out (rows, C), both row-major float32."""
        n_classes = x.shape[1]
        for lo, hi, index, blocks in self.runs:
            used = np.take(x, index, axis=0, out=buffer[:len(index)], mode="clip").reshape(len(blocks), -1, n_classes)
            np.matmul(blocks.swapaxes(1, 2), used, out=out[lo:hi].reshape(-1, GROUP, n_classes))


class _Kernel:
    """One kernel sqrt(w) n K n sqrt(w) over P points, ready to filter; nothing in it changes after __init__."""

    def __init__(self, features, weight, sort):
        """features (P, d); sort: put points of one simplex next to each other, else keep their order."""
        n_points, d = features.shape
        origin, rank, weights = _simplices(features)

        # A vertex is d integers (the last of its d + 1 coordinates is implied), packed into one int64 in mixed radix;
        # the slack keeps a step along an axis from carrying into the next digit.
        extent = np.ptp(origin, axis=1).astype(np.float64) + 4 * (d + 1)
        if not np.prod(extent) < 2.0 ** 62:
            raise ValueError("standard deviations are too small for this image: its lattice has too many cells to index")
        radix = np.cumprod(np.append(1, extent[:0:-1]))[::-1].astype(np.int64)
        origin = origin.astype(np.int64)
        base = radix @ origin
        # One number for each simplex, rising with origin, then rank: points that are near in this order share vertices.
        digits = np.append(1, np.cumprod(extent[:0:-1] / (d + 1)))[::-1].astype(np.int64)
        simplex = digits @ (origin // (d + 1)) * (d + 1) ** d + (d + 1) ** np.arange(d) @ rank[:d]
        order = np.argsort(simplex) if sort else np.arange(n_points)
        is_new = np.append(True, np.diff(simplex[order]) != 0)
        heads = order[is_new]
        # From one vertex to the next all coordinates grow by 1, and the largest that has not yet been taken drops by d + 1.
        drop = np.empty((d + 1, len(heads)), np.int64)
        np.put_along_axis(drop, rank[:, heads], (d + 1) * np.append(radix, 0)[:, None], axis=0)
        corners = np.cumsum(np.vstack([base[heads], radix.sum() - drop[:0:-1]]), axis=0)
        keys, corners = np.unique(corners.T, return_inverse=True)

        # Number the vertices in the order in which the points meet them, so that near numbers share points.
        corners = corners.reshape(-1, d + 1)
        first = np.empty(len(keys), np.int64)
        first[corners[::-1].ravel()] = np.arange(corners.size)[::-1]
        number = np.empty(len(keys), np.int64)
        number[np.argsort(first)] = np.arange(len(keys))
        vertex = number[corners][np.cumsum(is_new) - 1].ravel()
        point, value = np.repeat(np.arange(n_points), d + 1), weights[order].ravel()

        self.splat = _Sparse(vertex, order[point], value)
        row = self._plan_blur(keys, radix, 1 + self.splat.place[number])
        column = np.empty(len(keys), np.int64)
        column[number] = row
        by_vertex = _argsort(vertex)
        self.slice = _Sparse(point[by_vertex], column[vertex[by_vertex]], value[by_vertex], keep_order=not sort)
        self.place = None  # of each point in the output; None: in order
        if sort:
            self.place = np.empty(n_points, np.int64)
            self.place[order] = self.slice.place[:n_points]

        self.n_buffer = max(max(len(index) for matrix in (self.splat, self.slice) for _, _, index, _ in matrix.runs),
                            max(len(source) for runs in self.axes for source, *_ in runs))
        (*scratch, (norm,)), ones = _scratch([self], 1), np.ones((n_points, 1), np.float32)
        self.filter(ones, *scratch, norm)  # K 1
        norm = np.sqrt(np.float32(weight) / (norm + np.float32(1e-20)))
        self.slice.scale(rows=norm)
        self.splat.scale(columns=norm[:, 0] if self.place is None else norm[self.place, 0])

    def _plan_blur(self, keys, radix, row):
        """For each axis, lay lines of adjacent vertices side by side, so that neighbours are a fixed stride apart.

        keys: packed coordinates, rising; row: row of each vertex before the blur (row 0 is a zero). Returns it after.
        """
        n_vertices, d = len(keys), len(radix)
        self.axes, self.n_rows, row = [], 1 + self.splat.n_rows, np.append(row, 0)
        for axis in range(d + 1):
            step = ((d + 1) * radix[axis] if axis < d else 0) - radix.sum()  # -1 everywhere but d on the axis itself
            found = np.minimum(np.searchsorted(keys, keys + step), n_vertices - 1)
            following = np.append(np.where(keys[found] == keys + step, found, -1), -1)  # -1, also of -1: past the end
            is_first = np.ones(n_vertices + 1, bool)
            is_first[following] = False
            first = np.flatnonzero(is_first[:-1])
            length, reached = np.ones(len(first), np.int64), following[first]
            while (reached >= 0).any():
                length += reached >= 0
                reached = following[reached]
            by_length = _argsort(length.max() - length)
            first, length = first[by_length], length[by_length]

            runs, new_row, at = [], np.zeros_like(row), 1
            for start, stop, size in _runs(length):
                line = np.empty((size, stop - start), np.int64)
                line[0] = first[start:stop]
                for position in range(1, size):
                    line[position] = following[line[position - 1]]
                line, end = line.ravel(), at + line.size
                new_row[line] = np.arange(at, end)
                runs.append((row[line], at, end, stop - start))
                at = end
            new_row[-1], row = 0, new_row
            self.axes.append(runs)
            self.n_rows = max(self.n_rows, at)
        return row[:-1]

    def filter(self, q, vertices, blurred, buffer, out):
        """q (P, C) -> message of this kernel in `out`, with point i in row self.place[i]."""
        self.splat.multiply(q, vertices[1:], buffer)
        for runs in self.axes:
            for source, begin, end, stride in runs:
                x = np.take(vertices, source, axis=0, out=blurred[begin:end], mode="clip")
                if len(x) > stride:
                    half = np.multiply(x, np.float32(0.5), out=buffer[:len(x)])
                    x[stride:] += half[:-stride]
                    x[:-stride] += half[stride:]
            vertices, blurred = blurred, vertices
        self.slice.multiply(vertices, out, buffer)


def _scratch(kernels, n_classes):
    """Buffers for _Kernel.filter: vertices twice (row 0 stays zero), gathered rows, and an output for each kernel."""
    n_rows = max((kernel.n_rows for kernel in kernels), default=0)
    n_buffer = max((kernel.n_buffer for kernel in kernels), default=0)
    buffers = [np.zeros((n, n_classes), np.float32) for n in (n_rows, n_rows, n_buffer)]
    return *buffers, [np.empty((kernel.slice.n_rows, n_classes), np.float32) for kernel in kernels]
