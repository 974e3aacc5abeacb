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
- slice is a sparse matrix whose rows are ordered so that 16 neighbours use much the same columns; each 16 rows are one
  dense block over those columns, and the product is a batch of small matrix products;
- splat is these blocks transposed, then the sum of what several blocks add to a vertex;
- n and sqrt(w) are folded into the blocks, so that normalisation and kernel weights are free;
- blur puts the lines of an axis side by side, so that all neighbours are one fixed stride away;
- where k_g reaches but three pixels, slice . blur . splat is composed, once for all images of a size.

As pydensecrf, whose results it equals to rounding: the term j = i stays in the sum, probs are clipped at 1e-5.
As in the authors' code (src/crf.py, eb4d6b5) colours enter as BGR; a lattice is not symmetric in the order of features.
One call keeps one core busy: for many images run one process a core, each with one BLAS thread.
"""
import functools
import itertools

import numpy as np

TILE = 4  # side of a square of pixels
GROUP = TILE ** 2  # rows of a dense block: more share more columns, but multiply more zeros
ROWS = 8192  # rows handled by one NumPy call: few calls, yet the rows stay in the processor's cache


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
    *scratch, messages = _buffers(kernels, n_classes)

    log_probs = probs.reshape(n_classes, -1).T.astype(np.float32, order="C")  # (P, C), as all below
    np.log(np.clip(log_probs, 1e-5, 1, out=log_probs), out=log_probs)
    q, part = np.empty_like(log_probs), np.empty((ROWS, n_classes), np.float32)
    for iteration in range(iterations + 1):  # number 0, without messages, is the start Q = softmax(-U)
        active = list(zip(kernels, messages)) if iteration else []
        for kernel, message in active:
            kernel.filter(q, *scratch, message)
        for lo in range(0, len(q), ROWS):
            x, total = q[lo:lo + ROWS], log_probs[lo:lo + ROWS]
            for kernel, message in active:
                received = np.take(message, kernel.place[lo:lo + ROWS], axis=0, out=part[:len(x)], mode="clip")
                total = np.add(total, received, out=x)
            if total.max() > 80:  # exp would overflow; below it needs no shift, as messages >= 0 and -U >= log 1e-5
                total -= total.max(axis=1, keepdims=True)
            np.exp(total, out=x)
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
    features = np.vstack([_positions(height, width) / np.float32(xy_std), colour / np.float32(rgb_std)])
    return _Kernel(features, weight)


def _simplices(features):
    """Enclosing simplex of each point (Adams et al., section 3): features (d, P) float32, in standard deviations.

    Returns the vertex whose coordinates are multiples of d + 1, (d + 1, P), the rank of each coordinate by falling
    distance of the point from it, (d + 1, P), and the barycentric weights (d + 1, P) of the vertices, this one first.
    """
    d, n_points = features.shape
    # Onto the hyperplane sum = 0 of d + 1 dimensions, scaled so that the whole filter has unit variance. All in float32
    # and in pydensecrf's order: a point within rounding of a face should fall on the same side of it.
    scale = np.float32(np.sqrt(2 / 3) * (d + 1)) / np.sqrt(np.arange(1, d + 1) * np.arange(2, d + 2))
    elevated, total = np.empty((d + 1, n_points), np.float32), np.zeros(n_points, np.float32)
    for j in range(d, 0, -1):
        scaled = features[j - 1] * np.float32(scale[j - 1])
        elevated[j] = total - np.float32(j) * scaled
        total += scaled
    elevated[0] = total

    steps = np.rint(elevated * np.float32(1 / (d + 1)))
    origin = steps * np.float32(d + 1)
    apart, rank = elevated - origin, np.zeros((d + 1, n_points), np.int64)
    for i in range(d):
        for j in range(i + 1, d + 1):
            less = apart[i] < apart[j]  # of equals the lower index ranks first
            rank[i] += less
            rank[j] += ~less
    # Rounding leaves the hyperplane by sum(steps): take it back from the coordinates that were rounded furthest.
    rank += steps.sum(axis=0).astype(np.int64)
    wrap = (d + 1) * ((rank < 0).astype(np.int64) - (rank > d))
    rank += wrap
    origin += wrap

    falling = np.empty_like(elevated)
    np.put_along_axis(falling, rank, (elevated - origin) * np.float32(1 / (d + 1)), axis=0)
    weights = (falling - np.roll(falling, -1, axis=0))[::-1]
    weights[0] += 1
    return origin, rank, weights


def _runs(sizes, rows):
    """Cut items of falling size into runs (start, stop, size of the first) that fill about `rows` rows when padded."""
    start = 0
    while start < len(sizes):
        size = int(sizes[start])
        stop = min(len(sizes), start + max(1, rows // size))
        yield start, stop, size
        start = stop


def _dense_blocks(columns, values):
    """A sparse matrix, of each row the columns and values (R, n), as blocks: GROUP rows by the K columns that any uses.

    Returns runs (lo, hi, columns, blocks (groups, K, GROUP)) of rows in order of falling K, filled up with zeros of
    column 0, and the place of each row in that order.
    """
    padding = (0, -len(columns) % GROUP), (0, 0)
    columns = np.pad(columns, padding, mode="edge").reshape(-1, GROUP * columns.shape[1])
    values = np.pad(values, padding).reshape(columns.shape)
    n = columns.shape[1]  # entries of a group; numbered behind their columns, as sort is faster than argsort
    columns, entry = np.divmod(np.sort(columns * n + np.arange(n), axis=1), n)
    values, lanes = np.take_along_axis(values, entry, axis=1), entry // (n // GROUP)
    within = np.cumsum(np.diff(columns, axis=1, prepend=columns[:, :1]) != 0, axis=1)  # column of its block
    width = within[:, -1] + 1
    by_width, runs = np.argsort(-width, kind="stable"), []
    for start, stop, size in _runs(width[by_width], ROWS):
        chosen = by_width[start:stop]
        cells = size * np.arange(stop - start)[:, None] + within[chosen]
        used, blocks = np.zeros(size * (stop - start), np.int64), np.zeros((stop - start, size, GROUP), np.float32)
        used[cells] = columns[chosen]
        blocks.reshape(-1, GROUP)[cells, lanes[chosen]] = values[chosen]
        runs.append((start * GROUP, stop * GROUP, used, blocks))
    return runs, (GROUP * np.argsort(by_width)[:, None] + np.arange(GROUP)).ravel()


class _Kernel:
    """sqrt(w) n K n sqrt(w) for one kernel over P points, ready to filter; nothing in it changes once it is built."""

    def __init__(self, features, weight):
        """features (d, P) float32, in standard deviations."""
        d, n_points = features.shape
        too_small = "a standard deviation is too small for this image: its lattice has too many cells to number"
        if np.ptp(features, axis=1).max() > 1e5:  # float32 no longer tells neighbouring simplices apart
            raise ValueError(too_small)
        origin, rank, weights = _simplices(features)
        origin = origin[:d].astype(np.int64)  # the last of d + 1 coordinates is implied: they sum to zero
        origin -= origin.min(axis=1, keepdims=True)
        extent = origin.max(axis=1) + 4 * (d + 1)  # with room to step along any axis without a carry
        if np.prod(extent.astype(float)) > 2.0 ** 60:
            raise ValueError(too_small)

        # Points of a simplex share its vertices, and near simplices share some.
        simplex = np.ravel_multi_index((*origin // (d + 1), *rank[:d]), (*extent // (d + 1), *[d + 1] * d))
        order = np.argsort(simplex)
        is_new = np.append(True, np.diff(simplex[order]) != 0)
        heads = order[is_new]
        # From a vertex of a simplex to the next one coordinate drops by d, in order of falling rank, others grow by 1.
        radix = np.append(np.ravel_multi_index(np.eye(d, dtype=np.int64), extent), 0)
        walk = np.empty((d + 1, len(heads)), np.int64)
        np.put_along_axis(walk, (d + 1 - rank[:, heads]) % (d + 1), radix.sum() - (d + 1) * radix[:, None], axis=0)
        walk[0] = radix[:d] @ origin[:, heads]
        keys, corners = np.unique(np.cumsum(walk, axis=0).T, return_inverse=True)

        corners = 1 + corners.reshape(-1, d + 1)[np.cumsum(is_new) - 1]  # vertices count from 1: row 0 holds zeros
        self.runs, place = _dense_blocks(corners, weights.T[order])
        self.n_out = len(place)
        self.place = np.empty(n_points, np.int64)  # row of each point in the output
        self.place[order] = place[:n_points]
        self.point = np.zeros(self.n_out, np.int64)  # and the reverse; rows that fill up meet zeros
        self.point[self.place] = np.arange(n_points)
        row = np.append(0, self._plan_blur(keys, radix, self._plan_sums(np.concatenate([run[2] for run in self.runs]))))
        self.runs = [(lo, hi, row[columns], blocks) for lo, hi, columns, blocks in self.runs]
        self.n_buffer = max(max(run[1] - run[0], len(run[2])) for run in itertools.chain(self.runs, self.sums, *self.axes))

        *scratch, (norm,) = _buffers([self], 1)
        self.filter(np.ones((n_points, 1), np.float32), *scratch, norm)  # K 1
        norm = np.sqrt(np.float32(weight) / (norm[:, 0] + np.float32(1e-20)))
        for lo, hi, _, blocks in self.runs:
            blocks *= norm[lo:hi].reshape(-1, 1, GROUP)

    def _plan_sums(self, vertex):
        """Each block adds to the vertices it uses: vertex of each such partial sum. Returns the row of each vertex."""
        partial = np.append(1 + np.argsort(vertex, kind="stable"), 0)  # rows by vertex; last the row of zeros
        degree = np.bincount(vertex)
        start, by_degree = np.cumsum(degree) - degree, 1 + np.argsort(-degree[1:], kind="stable")
        self.sums, self.n_rows = [], len(partial)
        for lo, hi, size in _runs(degree[by_degree], ROWS):
            position, chosen = np.arange(size)[:, None], by_degree[lo:hi]
            source = partial[np.where(position < degree[chosen], start[chosen] + position, -1)]
            self.sums.append((1 + lo, 1 + hi, source.ravel()))
        return 1 + np.argsort(by_degree)

    def _plan_blur(self, keys, radix, row):
        """For each axis lay the lines of adjacent vertices side by side, longest first: neighbours are a stride apart.

        keys: packed vertices, rising; row: of each vertex before the blur (row 0 holds zeros). Returns it after.
        """
        self.axes, row = [], np.append(row, 0)
        for axis in range(len(radix)):
            key = keys + (len(radix) * radix[axis] - radix.sum())  # one step: d on the axis itself, -1 on the others
            found = np.minimum(np.searchsorted(keys, key), len(keys) - 1)
            following = np.append(np.where(keys[found] == key, found, -1), -1)  # -1: past the end, and stays there
            is_first = np.ones(len(row), bool)
            is_first[following] = False
            first = np.flatnonzero(is_first[:-1])
            length, reached = np.ones(len(first), np.int64), following[first]
            while (reached >= 0).any():
                length += reached >= 0
                reached = following[reached]
            by_length = np.argsort(-length, kind="stable")

            runs, new_row, end = [], np.zeros_like(row), 1
            for start, stop, size in _runs(length[by_length], ROWS // 4):
                lines = np.empty((size, stop - start), np.int64)
                lines[0] = first[by_length[start:stop]]
                for position in range(1, size):
                    lines[position] = following[lines[position - 1]]  # shorter lines go on with -1, the row of zeros
                begin, end = end, end + lines.size
                new_row[lines.ravel()] = np.arange(begin, end)
                runs.append((begin, end, row[lines.ravel()], stop - start))
            new_row[-1], row = 0, new_row
            self.axes.append(runs)
            self.n_rows = max(self.n_rows, end)
        return row[:-1]

    def filter(self, q, vertices, blurred, buffer, out):
        """q (P, C) -> message of this kernel, that of point i in row self.place[i] of out."""
        n_classes, end = q.shape[1], 1
        for lo, hi, _, blocks in self.runs:  # splat
            begin, end = end, end + blocks.shape[0] * blocks.shape[1]
            x = np.take(q, self.point[lo:hi], axis=0, out=buffer[:hi - lo], mode="clip")
            np.matmul(blocks, x.reshape(-1, GROUP, n_classes),
                      out=blurred[begin:end].reshape(len(blocks), -1, n_classes))
        for lo, hi, source in self.sums:
            x = np.take(blurred, source, axis=0, out=buffer[:len(source)], mode="clip")
            np.add.reduce(x.reshape(-1, hi - lo, n_classes), axis=0, out=vertices[lo:hi])
        for runs in self.axes:
            for begin, end, source, stride in runs:
                x = np.take(vertices, source, axis=0, out=blurred[begin:end], mode="clip")
                half = np.multiply(x, np.float32(0.5), out=buffer[:len(x)])
                x[stride:] += half[:-stride]
                x[:-stride] += half[stride:]
            vertices, blurred = blurred, vertices
        for lo, hi, columns, blocks in self.runs:  # slice
            x = np.take(vertices, columns, axis=0, out=buffer[:len(columns)], mode="clip")
            np.matmul(blocks.swapaxes(1, 2), x.reshape(len(blocks), -1, n_classes),
                      out=out[lo:hi].reshape(-1, GROUP, n_classes))


class _Stencil:
    """A spatial kernel of small reach, composed: a tile of 4 x 4 pixels is a dense block times the window it sees."""

    def __init__(self, kernel, height, width, reach):
        """reach of a pixel: a simplex, two steps of blur and a simplex again, all of side std, ends excluded."""
        self.side, period = TILE + 2 * reach, 2 * reach + 1
        y, x = np.divmod(np.arange(height * width), width)
        # No two pixels of a period by period square are of one class, so one filtering tells all that a pixel receives.
        *scratch, (out,) = _buffers([kernel], period ** 2)
        kernel.filter(np.eye(period ** 2, dtype=np.float32)[y % period * period + x % period], *scratch, out)
        step = np.arange(period) - reach
        sender = ((y[:, None] + step) % period * period)[:, :, None] + ((x[:, None] + step) % period)[:, None]
        received = np.take_along_axis(out[kernel.place], sender.reshape(len(y), -1), axis=1)

        n_bands, n_tiles = -(-width // TILE), -(-height // TILE)  # a band: the tiles above each other
        self.place = ((x // TILE * n_tiles + y // TILE) * TILE + y % TILE) * TILE + x % TILE
        self.n_rows, self.n_out = 0, n_bands * n_tiles * GROUP
        lanes = np.zeros((n_bands, n_tiles, TILE, TILE, period, period), np.float32)
        lanes.reshape(self.n_out, -1)[self.place] = received
        self.blocks = np.zeros((n_bands, n_tiles, self.side, self.side, TILE, TILE), np.float32)
        for i, j in np.ndindex(TILE, TILE):
            self.blocks[:, :, i:i + period, j:j + period, i, j] = lanes[:, :, i, j]
        self.blocks = self.blocks.reshape(n_bands, n_tiles, self.side ** 2, GROUP)
        y = np.arange(n_tiles * TILE + 2 * reach)[:, None] - reach  # what lies outside of the image meets zeros
        x = np.arange(n_bands)[:, None, None] * TILE + np.arange(self.side) - reach
        self.columns = (y.clip(0, height - 1) * width + x.clip(0, width - 1)).reshape(n_bands, -1)
        self.n_buffer = self.columns.shape[1]

    def filter(self, q, vertices, blurred, buffer, out):
        """As _Kernel.filter; a window is 4 rows of its band below the one before."""
        row = buffer.strides[0]
        for columns, blocks, tiles in zip(self.columns, self.blocks, np.split(out, len(self.blocks))):
            band = np.take(q, columns, axis=0, out=buffer[:len(columns)], mode="clip")
            windows = np.ndarray((*blocks.shape[:2], q.shape[1]), q.dtype, band, 0, (TILE * self.side * row, row, 4))
            np.matmul(blocks.swapaxes(1, 2), windows, out=tiles.reshape(-1, GROUP, q.shape[1]))


def _buffers(kernels, n_classes):
    """What _Kernel.filter writes to: vertices twice (row 0 stays zero), gathered rows, an output for each kernel."""
    n_rows = max((kernel.n_rows for kernel in kernels), default=0)
    n_buffer = max((kernel.n_buffer for kernel in kernels), default=0)
    buffers = [np.zeros((n, n_classes), np.float32) for n in (n_rows, n_rows, n_buffer)]
    return *buffers, [np.empty((kernel.n_out, n_classes), np.float32) for kernel in kernels]
