"""Procedural landscapes with exact labels: the data set that needs no download.

    from scenes import draw_scene
    image, label = draw_scene(7)       # PIL "RGB" 128 x 128 and PIL "L" 128 x 128 with class ids 0..8

Nine classes in five layouts (lake, beach, street, city, meadow). They are told apart by texture, shape and context,
not by colour: every picture has a palette of its own, in which any class may be light or dark, warm or cold. k-means
on the colours is near chance.

How a picture comes about: flat shapes are drawn from the back to the front at twice the final size, with the same
coordinates on the image and on the label map; each class's texture is laid over its pixels; the image is graded and
averaged down to the final size (which smooths the edges), the label map is sampled (which keeps the ids exact).

The same seed gives the same picture everywhere: sines are taken in float64 and rounded to float32, so that a
platform's last bit does not show, all else is plain arithmetic and Pillow's integer resampling.
"""
import colorsys
import functools

import numpy as np
from PIL import Image, ImageDraw

VERSION = 1  # raise it when a drawing changes: feature caches are keyed by it

CLASSES = ("sky", "mountain", "water", "sand", "grass", "road", "building", "tree", "vehicle")
SKY, MOUNTAIN, WATER, SAND, GRASS, ROAD, BUILDING, TREE, VEHICLE = range(9)
# Paul Tol's "muted" colours, made for colour-blind readers, each given to the class that one expects in it
PALETTE = ((136, 204, 238), (170, 68, 153), (51, 34, 136), (221, 204, 119), (153, 153, 51),
           (187, 187, 187), (204, 102, 119), (17, 119, 51), (136, 34, 85))

SIZE = 128  # side of a finished picture
S = 2 * SIZE  # side while drawing; every coordinate below is in these pixels, y points down

# where the palettes start from: hue (in turns), saturation and lightness of each class
NATURAL = np.array([(0.57, 0.50, 0.74), (0.64, 0.22, 0.46), (0.54, 0.45, 0.50), (0.11, 0.45, 0.72), (0.25, 0.45, 0.50),
                    (0.66, 0.08, 0.42), (0.05, 0.40, 0.62), (0.33, 0.42, 0.34), (0.98, 0.60, 0.50)])
DARK, LAMP, RED_LAMP, CHROME = (26, 26, 30), (255, 246, 205), (224, 40, 40), (190, 190, 192)


class Painter:
    """One picture in the making; all chance comes from `rng`."""

    def __init__(self, seed):
        self.rng = np.random.default_rng(seed)
        self.image, self.label = Image.new("RGB", (S, S)), Image.new("L", (S, S))
        self.ink, self.ids = ImageDraw.Draw(self.image), ImageDraw.Draw(self.label)
        self.horizon = int(S * self.u(0.28, 0.42))
        self.vanish = int(S * self.u(0.25, 0.75))  # x of the vanishing point
        # The palette: every class strays from its natural hue, all are turned together, and even steps of
        # lightness are dealt out at random, so that neighbours stay apart while no class keeps a colour.
        n, turn, colourful = len(CLASSES), self.rng.normal(0, 0.18), self.u(0.3, 1)
        hue, saturation, lightness = NATURAL.T
        hue = hue + turn + self.rng.normal(0, 0.07, n)
        lightness = 0.3 * lightness + 0.7 * self.rng.permutation(np.linspace(0.24, 0.84, n))
        saturation = np.clip(colourful * saturation * self.rng.uniform(0.6, 1.5, n), 0, 0.8)
        self.palette = np.stack([hue, saturation, lightness], 1).tolist()
        self.tree_kind = self.rng.integers(0, 3)
        self.near = self.vanish + self.u(-70, 70)  # x at which a road ahead leaves the picture
        self.glow, self.cloudy, self.snow = self.u(0.1, 0.5), self.u(-0.3, 0.7), self.u(-14, 22)
        self.dash, self.phase = self.u(0, 0.5), self.u(0, 2 * np.pi)

    # ---- tools ------------------------------------------------------------------------------------------------
    def u(self, low, high):
        return low + (high - low) * float(self.rng.random())

    def chance(self, p):
        return self.rng.random() < p

    def side(self):
        return 1 if self.chance(0.5) else -1

    def tone(self, cls, lighter=0.0, hue=0.0, saturation=1.0):
        """The class's colour in this picture, moved by `lighter` (-1..1) towards black or white."""
        h, s, light = self.palette[cls]
        light += lighter * (1 - light if lighter > 0 else light)
        return tuple(round(255 * v) for v in colorsys.hls_to_rgb((h + hue) % 1, light, min(s * saturation, 1)))

    def shape(self, cls, points, colour=None, kind="polygon"):
        """Draw in the image, and the same in the label map. kind: polygon, rectangle or ellipse."""
        points = [(round(float(x)), round(float(y))) for x, y in points]
        getattr(self.ink, kind)(points, fill=colour or self.tone(cls))
        getattr(self.ids, kind)(points, fill=cls)

    def box(self, cls, x0, y0, x1, y1, colour=None, kind="rectangle"):
        if x1 >= x0 and y1 >= y0:
            self.shape(cls, [(x0, y0), (x1, y1)], colour, kind)

    def disc(self, cls, x, y, rx, ry, colour):
        self.box(cls, x - rx, y - ry, x + rx, y + ry, colour, "ellipse")

    def noise(self, across, down, shape=(S, S)):
        """Smooth noise in -1..1 of `across` x `down` independent values, (rows, columns) = shape."""
        grid = Image.fromarray(self.rng.integers(0, 256, (down, across), dtype=np.uint8))
        return np.asarray(grid.resize(shape[::-1], Image.Resampling.BICUBIC), dtype=np.float32) / 127.5 - 1

    def profile(self, rough):
        """A jagged line of S + 1 heights around 0, by midpoint displacement; `rough` in 0..1."""
        y, step = self.rng.uniform(-1, 1, 5), 0.5
        while len(y) < S + 1:
            middle = (y[1:] + y[:-1]) / 2 + self.rng.uniform(-step, step, len(y) - 1)
            y = np.insert(y, np.arange(1, len(y)), middle)
            step *= rough
        return y - y.mean()

    # ---- land and sky -----------------------------------------------------------------------------------------
    def land(self, cls, y, height=0.0, rough=0.3, lighter=0.0):
        """One class from about row y down; its upper edge wanders by `height`."""
        top = y - height * self.profile(rough)
        self.shape(cls, [(0, S), *zip(range(S + 1), top), (S, S)], self.tone(cls, lighter))

    def bank(self, cls, y, bay, wave=1, lighter=0.0):
        """Near ground from about row y down, its edge a shore that falls by `bay` from left to right."""
        x = np.linspace(0, S, 65)
        edge = y + bay * (x / S - 0.5) + 10 * np.sin(self.phase + x / 46) + wave * np.sin(self.phase + x / 9)
        self.shape(cls, [(0, S), *zip(x, edge), (S, S)], self.tone(cls, lighter))

    def sky(self):
        top = self.u(-0.35, 0.1)
        for y in range(0, self.horizon + 12, 4):
            t = y / self.horizon
            self.box(SKY, 0, y, S, y + 4, self.tone(SKY, top + (self.glow - top) * min(t, 1), 0.06 * t))
        if self.chance(0.5):  # sun or moon
            x, y, r = self.u(20, S - 20), self.u(12, self.horizon * 0.7), self.u(7, 14)
            for k, light in ((1.8, self.glow * 0.6), (1.35, 0.5), (1, 0.85)):
                self.disc(SKY, x, y, k * r, k * r, self.tone(SKY, light, -0.08))

    def mountains(self):
        ridges = self.rng.integers(1, 4)
        for i in range(ridges):
            away = (ridges - 1 - i) / 3
            y = self.horizon * (1 - self.u(0.5, 0.72) * (0.45 + 0.55 * away))
            self.land(MOUNTAIN, y, self.u(20, 44), self.u(0.48, 0.6), 0.45 * away - 0.05)

    # ---- things -----------------------------------------------------------------------------------------------
    def tree(self, x, y, h):
        """A tree that stands at (x, y), h high: broad-leaved, conifer or poplar, one kind in a picture."""
        light, hue = self.u(-0.12, 0.12), self.u(-0.03, 0.03)
        self.box(TREE, x - 0.045 * h, y - 0.4 * h, x + 0.045 * h, y, self.tone(TREE, -0.5, 0.2, 0.6))
        if self.tree_kind == 0:
            for _ in range(9):
                a, r = self.u(0, 2 * np.pi), self.u(0.14, 0.24) * h
                up = 0.2 * np.sin(a)
                self.disc(TREE, x + 0.22 * h * np.cos(a), y + (up - 0.64) * h, r, r,
                          self.tone(TREE, light + 0.25 * (0.04 - up), hue))
        elif self.tree_kind == 1:
            for i in range(5):
                top, w = y - h + 0.16 * i * h, h * (0.12 + 0.055 * i)
                self.shape(TREE, [(x, top), (x + w, top + 0.32 * h), (x, top + 0.27 * h), (x - w, top + 0.32 * h)],
                           self.tone(TREE, light + 0.1 * (i % 2) - 0.06, hue))
        else:
            self.disc(TREE, x, y - 0.56 * h, 0.15 * h, 0.44 * h, self.tone(TREE, light, hue))
            self.disc(TREE, x - 0.035 * h, y - 0.635 * h, 0.075 * h, 0.335 * h, self.tone(TREE, light + 0.1, hue))

    def palm(self, x, y, h):
        lean, w = self.u(-0.25, 0.25) * h, 0.04 * h
        top_x, top_y = x + lean, y - 0.85 * h
        self.shape(TREE, [(x - w, y), (x + 0.4 * lean, y - 0.5 * h), (top_x, top_y),
                          (x + 0.4 * lean + 1.2 * w, y - 0.5 * h), (x + w, y)], self.tone(TREE, -0.35, 0.2, 0.6))
        for a in np.linspace(-0.25, np.pi + 0.25, 8):  # fronds
            dx, dy = 0.42 * h * np.cos(a), 0.3 * h * np.sin(a)
            bend_x, bend_y = top_x + 0.6 * dx, top_y - 0.9 * dy
            self.shape(TREE, [(top_x, top_y), (bend_x, bend_y - 0.07 * h), (top_x + dx, top_y - dy + 0.16 * h),
                              (bend_x, bend_y + 0.07 * h)], self.tone(TREE, self.u(-0.15, 0.2)))

    def windows(self, x0, y0, x1, y1, across, down, light):
        dx, dy = (x1 - x0) / across, (y1 - y0) / down
        for x in x0 + dx * np.arange(across):
            for y in y0 + dy * np.arange(down):
                self.box(BUILDING, x + 0.22 * dx, y + 0.2 * dy, x + 0.78 * dx, y + 0.76 * dy,
                         self.tone(BUILDING, light if self.chance(0.85) else -light, 0.45))

    def house(self, x, y, w, h):
        """A house with a hipped roof, chimney, windows and door; (x, y) is its lower left corner."""
        wall, roof, glass = self.u(-0.1, 0.2), self.u(-0.5, -0.3), self.u(-0.75, -0.5)
        eave, hip = y - 0.58 * h, self.u(0.12, 0.5) * w
        self.box(BUILDING, x + 0.68 * w, y - h, x + 0.78 * w, eave, self.tone(BUILDING, roof))
        self.box(BUILDING, x, eave, x + w, y, self.tone(BUILDING, wall))
        self.shape(BUILDING, [(x - 0.06 * w, eave), (x + hip, y - 0.97 * h), (x + w - hip, y - 0.97 * h),
                              (x + 1.06 * w, eave)], self.tone(BUILDING, roof, self.u(-0.1, 0.1)))
        self.windows(x + 0.04 * w, eave, x + 0.96 * w, y - 0.25 * h, max(2, int(w / 15)), 1, glass)
        self.box(BUILDING, x + 0.42 * w, y - 0.27 * h, x + 0.57 * w, y, self.tone(BUILDING, roof, 0.1))

    def tower(self, x, y, w, h, away=0.0):
        """A block of flats or offices; (x, y) is its lower left corner."""
        wall, light = self.u(-0.3, 0.2) + away, self.u(0.45, 0.8) * self.side()
        self.box(BUILDING, x, y - h, x + w, y, self.tone(BUILDING, wall, self.u(-0.08, 0.08)))
        self.box(BUILDING, x + 0.82 * w, y - h, x + w, y, self.tone(BUILDING, wall - 0.25))  # the wall in shade
        self.box(BUILDING, x - 1, y - h, x + w + 1, y - h + 3, self.tone(BUILDING, wall - 0.4))
        self.windows(x, y - h + 4, x + 0.82 * w, y - 2, max(2, int(w / 9)), max(2, int(h / 12)), light)

    def paint(self):
        """(hue, lightness, body, glass) of one vehicle."""
        hue, light = self.u(-0.5, 0.5), self.u(-0.25, 0.35)
        return hue, light, self.tone(VEHICLE, light, hue), self.tone(VEHICLE, -0.7, hue + 0.5, 0.3)

    def car(self, x, y, w):
        """A car (kind 0, 1), van (2) or bus (3) from the side, w long, its wheels on row y."""
        kind, face = self.rng.integers(0, 4), self.side()
        hue, light, body, glass = self.paint()
        h, r = w * (0.36, 0.36, 0.46, 0.42)[kind], 0.095 * w

        def part(points, colour):  # points in 0..1 from the tail to the nose and from the sill to the roof
            points = [(x + w * (px if face > 0 else 1 - px), y - 0.6 * r - h * py) for px, py in points]
            self.shape(VEHICLE, points, colour)
        self.box(VEHICLE, x + 0.03 * w, y - 0.5 * r, x + 0.97 * w, y + 0.5 * r, DARK)  # its shadow
        if kind < 2:
            part([(0, 0), (0, .38), (.06, .5), (.2, .55), (.34, 1), (.68, 1), (.84, .55), (.98, .46), (1, 0)], body)
            part([(.26, .56), (.37, .92), (.5, .92), (.5, .56)], glass)
            part([(.54, .56), (.54, .92), (.66, .92), (.77, .56)], glass)
        else:
            part([(0, 0), (0, .96), (.03, 1), (.84, 1), (.9, .93), (1, .5), (1, 0)], body)
            for a, b in ((.06, .24), (.28, .46), (.5, .68)) if kind == 3 else ((.62, .7),):
                part([(a, .5), (a, .85), (b, .85), (b, .5)], glass)
            part([(.74, .5), (.74, .85), (.87, .85), (.96, .5)], glass)
        part([(0, .12), (0, .2), (1, .2), (1, .12)], self.tone(VEHICLE, light - 0.25, hue))
        part([(.95, .28), (.95, .4), (1, .38), (1, .28)], LAMP)
        for hub in (x + .2 * w, x + .8 * w):
            self.disc(VEHICLE, hub, y - 0.6 * r, r, r, DARK)
            self.disc(VEHICLE, hub, y - 0.6 * r, .45 * r, .45 * r, CHROME)

    def car_ahead(self, x, y, w):
        """A car from behind or from the front, w wide, its wheels on row y."""
        hue, light, body, glass = self.paint()
        h, lamps = w * self.u(0.75, 0.95), RED_LAMP if self.chance(0.6) else LAMP

        def part(x0, y0, x1, y1, colour, taper=0.0):  # a trapezium in 0..1; `taper`: how far its roof is drawn in
            self.shape(VEHICLE, [(x + x0 * w, y - y0 * h), (x + (x0 + taper) * w, y - y1 * h),
                                 (x + (x1 - taper) * w, y - y1 * h), (x + x1 * w, y - y0 * h)], colour)
        part(.06, 0, .24, .3, DARK), part(.76, 0, .94, .3, DARK)  # wheels
        part(0, .12, 1, .55, body), part(.04, .55, .96, 1, body, .12), part(.13, .57, .87, .92, glass, .09)
        part(.04, .36, .22, .48, lamps), part(.78, .36, .96, .48, lamps)
        part(.36, .25, .64, .36, LAMP), part(0, .11, 1, .17, self.tone(VEHICLE, light - 0.4, hue))

    def marking(self):
        return self.tone(ROAD, 0.85 if self.palette[ROAD][2] < 0.6 else -0.8, 0, 0.3)

    def at(self, k, t, half, top):
        """The point k (-1..1) across a road ahead, t of the way from the vanishing point to the lower border."""
        return self.vanish + (self.near + k * half - self.vanish) * t, top + (S - top) * t

    def road_ahead(self, half, top):
        """A straight road from the lower border to row `top` of the vanishing point; half its width below is `half`."""
        def strip(k0, k1, t0, t1, colour):
            self.shape(ROAD, [self.at(k, t, half, top) for k, t in ((k0, t0), (k1, t0), (k1, t1), (k0, t1))], colour)
        strip(-1, 1, 0, 1, self.tone(ROAD))
        strip(-0.94, -0.88, 0.04, 1, self.marking()), strip(0.88, 0.94, 0.04, 1, self.marking())
        for k in range(1, 9):  # dashes of one length on the ground are harmonic in the picture
            t = 1 / (0.55 + 0.55 * k + self.dash)
            strip(-0.035, 0.035, t, min(t / (1 - 0.26 * t), 1), self.marking())

    def road_across(self, y, h):
        """A road from left to right, with kerb and dashes."""
        self.box(ROAD, 0, y, S, y + h)
        self.box(ROAD, 0, y, S, y + 3, self.tone(ROAD, 0.35))
        self.box(ROAD, 0, y + 4, S, y + 6, self.tone(ROAD, -0.35))
        y += 0.56 * h
        for x in range(-int(self.u(0, 50)), S, 52):
            self.shape(ROAD, [(x + 3, y), (x + 31, y), (x + 29, y + 4), (x, y + 4)], self.marking())

    # ---- layouts: each from the back to the front -------------------------------------------------------------
    def lake(self):
        h = self.horizon
        self.mountains()
        self.land(GRASS, h + 4, 6, 0.4, -0.15)
        if self.chance(0.6):
            self.house(self.u(0, S - 60), h + self.u(4, 9), self.u(44, 60), self.u(38, 48))
        for _ in range(self.rng.integers(1, 5)):
            self.tree(self.u(0, S), h + self.u(4, 9), self.u(40, 60))
        self.land(WATER, h + self.u(8, 12))
        y, bay = h + self.u(0.45, 0.65) * (S - h), self.u(-30, 30)
        near = SAND if self.chance(0.4) else GRASS
        self.bank(near, y - 3, bay, lighter=-0.3)
        self.bank(near, y, bay)
        for _ in range(self.rng.integers(1, 4)):
            self.tree(self.u(0, S), self.u(y + 18, S), self.u(70, 120))

    def beach(self):
        h = self.horizon
        if self.chance(0.5):
            self.land(MOUNTAIN, h - 8, self.u(10, 24), 0.5)
        self.land(WATER, h)
        y, bay = h + self.u(0.25, 0.5) * (S - h), self.u(-60, 60)
        self.bank(WATER, y - 5, bay, 3, lighter=0.75)  # foam
        self.bank(SAND, y, bay, 3)
        left = bay > 0  # where the land is higher
        for _ in range(self.rng.integers(0, 3)):
            x = self.u(0, 70) if left else self.u(S - 130, S - 60)
            self.house(x, y + self.u(10, 40), self.u(40, 62), self.u(40, 56))
        if self.chance(0.5):
            self.car(self.u(0, S - 90), self.u(y + 60, S - 8), self.u(84, 116))
        for _ in range(self.rng.integers(1, 4)):
            x = self.u(-10, 100) if left else self.u(S - 100, S + 10)
            (self.palm if self.chance(0.8) else self.tree)(x, self.u(y + 30, S), self.u(90, 150))

    def street(self):
        h = self.horizon
        if self.chance(0.6):
            self.mountains()
        self.land(GRASS if self.chance(0.4) else SAND, h)
        half = self.u(70, 110)
        self.road_ahead(half, h)
        for t in np.sort(self.rng.uniform(0.15, 0.9, 7)):  # things along the road, the far ones first
            side = self.side()
            x, y = self.at(1.15 * side, t, half, h)
            if self.chance(0.5):
                w, high = 130 * t + 12, (170 * t + 16) * self.u(0.8, 1.1)
                (self.house if self.chance(0.6) else self.tower)(x if side > 0 else x - w, y, w, high)
            else:
                self.tree(x + 24 * t * side, y, (190 * t + 14) * self.u(0.8, 1.1))
        for t in np.sort(self.rng.uniform(0.4, 0.95, self.rng.integers(1, 4))):
            w, (x, y) = 0.74 * half * t, self.at(0.5 * self.side(), t, half, h)
            self.car_ahead(x - w / 2, y, w)

    def city(self):
        y = S * self.u(0.62, 0.72)
        self.box(SKY, 0, self.horizon, S, y, self.tone(SKY, self.glow))
        for near in (0, 1):  # a far row of towers, a near one
            x = -self.u(0, 30)
            while x < S:
                w = self.u(24, 40) + 10 * near
                self.tower(x, y, w, self.u(0.62, 0.92) * (1 - 0.3 * near) * y, 0.25 * (1 - near))
                x += w * self.u(1, 1.5 + 0.6 * near)
        front = self.rng.integers(0, 3)
        if front == 0:
            self.land(GRASS, y - 12, 2)
        elif front == 1:  # a river and its quay
            self.land(WATER, y - 26)
            self.land(SAND, y - 5)
        for x in np.arange(self.u(-10, 30), S, self.u(46, 80)):
            if self.chance(0.7):
                self.tree(x, y + 3, self.u(54, 84))
        self.road_across(y, S - y)
        self.car(self.u(-20, S - 120), y + 0.34 * (S - y), self.u(84, 106))
        if self.chance(0.75):
            self.car(self.u(-20, S - 100), S - self.u(4, 14), self.u(106, 138))

    def meadow(self):
        h = self.horizon

        def beside(gap):  # some x left or right of the way
            return self.vanish + self.side() * self.u(gap, 0.75 * S)
        if self.chance(0.75):
            self.mountains()
        for i in range(3):
            self.land(GRASS, h + 26 * i, 14, 0.22, 0.16 - 0.12 * i)
            for _ in range(self.rng.integers(0, 3)):
                self.tree(beside(20), h + 26 * i + self.u(8, 20), 34 + 18 * i)
        if self.chance(0.5):
            self.road_ahead(self.u(36, 70), h + self.u(16, 40))
        if self.chance(0.7):
            w = self.u(60, 90)
            self.house(beside(70) - w / 2, h + self.u(40, 70), w, w * self.u(0.75, 0.95))
        if self.chance(0.5):
            self.car(self.u(0, S - 90), self.u(h + 90, S - 10), self.u(80, 110))
        for _ in range(self.rng.integers(1, 3)):
            self.tree(beside(90), self.u(h + 70, S), self.u(80, 130))

    # ---- texture and light ------------------------------------------------------------------------------------
    def texture(self):
        """The picture with each class's texture laid over its pixels, (S, S, 3) float32 in about 0..255."""
        def sine(angle):
            return np.sin(angle.astype(np.float64)).astype(np.float32)
        rgb, label = np.array(self.image, dtype=np.float32), np.asarray(self.label)
        grain = self.rng.random((S, S), dtype=np.float32) * 2 - 1
        for cls in np.unique(label):
            where = label == cls
            rows, columns = np.flatnonzero(where.any(1)), np.flatnonzero(where.any(0))
            part = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)  # work in the bounding box
            where, fine, (y, x) = where[part], grain[part], np.ogrid[part]
            (height, width), noise = where.shape, functools.partial(self.noise, shape=where.shape)
            depth = np.maximum(y - self.horizon, 0).astype(np.float32) + 14  # of level ground, growing towards the eye
            u, v = (x - self.vanish) * (90 / depth), 4200 / depth  # the place on that ground
            if cls == SKY:  # clouds
                shade = 0.4 * np.clip(noise(4, 6) + 0.4 * noise(14, 20) + 0.2 * noise(30, 40) - self.cloudy, 0, 0.8)
            elif cls == MOUNTAIN:  # lit and shaded flanks that run down from the ridge, snow above
                under = (y - rows[0] - where.argmax(0)).astype(np.float32)  # rows below the ridge
                along = (x - columns[0] + 0.6 * under * np.sign(noise(7, 1)[:1])).astype(int) % width
                flanks = np.tanh(3 * noise(width // 14 + 2, 1)[0].astype(np.float64)).astype(np.float32)
                shade = 0.22 * flanks[along] + 0.05 * noise(50, 30) - 0.002 * under
                shade += 0.5 * (under + 8 * noise(40, 9) < self.snow)
            elif cls == WATER:  # wave crests, closer towards the horizon
                wave = sine(1.3 * v + 0.02 * u + 3 * noise(9, 14)) * np.clip(depth / 50, 0.4, 1)
                shade = 0.75 * np.maximum(wave, 0) ** 2 + 0.12 * noise(12, height // 2 + 1) - 0.2
            elif cls == SAND:  # grains and ripples
                grains = noise(width // 3 + 2, height // 3 + 2)
                ripples = sine(0.11 * x + 0.16 * (y - self.horizon) + 3 * noise(5, 5))
                shade = 0.25 * np.sign(grains) * grains ** 2 + 0.14 * fine + 0.16 * ripples
            elif cls == GRASS:  # blades, longer towards the eye
                near = np.clip(depth / 130, 0, 1)
                long, short = noise(width // 2 + 1, height // 10 + 1), noise(width // 2 + 1, height // 6 + 1)
                shade = 0.36 * near * long + 0.34 * (1 - near) * short + 0.08 * noise(7, 7)
            elif cls == TREE:  # leaves
                leaves = noise(width // 4 + 1, height // 4 + 1)
                shade = 0.3 * np.sign(leaves) * np.sqrt(np.abs(leaves)) + 0.12 * fine
            else:
                shade = {ROAD: 0.03, BUILDING: 0.04, VEHICLE: 0.0}[cls] * fine
            rgb[part] += (130 * shade * where)[..., None]
        return rgb

    def grade(self, rgb):
        """Light from one side, white balance, gamma, noise: one camera on one day. The finished PIL image."""
        slope = np.linspace(-1, 1, S, dtype=np.float32)
        light = 1 + slope[:, None] * np.float32(self.u(-0.12, 0.12)) + slope * np.float32(self.u(-0.15, 0.15))
        rgb *= light[..., None]
        image = Image.fromarray(np.clip(rgb, 0, 255, out=rgb).astype(np.uint8)).reduce(2)
        gains, gamma = self.rng.uniform(0.9, 1.08, 3), self.u(0.8, 1.25)
        curve = gains[:, None] * (np.arange(256) / 255) ** gamma
        image = image.point(np.minimum(np.rint(255 * curve), 255).astype(int).ravel().tolist())
        noise = self.rng.integers(-24, 25, (SIZE, SIZE, 1)) * self.u(0.02, 0.14)
        return Image.fromarray(np.clip(np.asarray(image) + noise, 0, 255).astype(np.uint8))


@functools.lru_cache(maxsize=16)  # for those who ask for the image and then for the label
def draw_scene(seed):
    """(image, label) of one landscape: PIL "RGB" and PIL "L" (ids into CLASSES), both 128 x 128."""
    painter = Painter(seed)
    painter.sky()
    layouts = painter.lake, painter.beach, painter.street, painter.city, painter.meadow
    layouts[painter.rng.integers(0, len(layouts))]()
    image = painter.grade(painter.texture())
    return image, Image.fromarray(np.asarray(painter.label)[::2, ::2])
