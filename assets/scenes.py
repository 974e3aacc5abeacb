"""Procedural landscapes with exact labels: the data set that needs no download.

    from scenes import draw_scene
    image, label = draw_scene(seed=7)       # PIL "RGB" 128 x 128 and PIL "L" 128 x 128 with class ids 0..8

Nine classes in five layouts (lake, beach, street, city, meadow). They are told apart by texture, shape and
context, not by colour: every picture draws its own palette, in which any class may be light or dark, and is
then turned in hue and changed in contrast. k-means on the colours is near chance, as for real photographs.

How a picture comes about: flat shapes are drawn back to front at twice the final size, on the image and with
the same coordinates on the label map; each class's texture is then laid over its pixels; the picture is
graded, reduced to half its size (which smooths the edges) and the label map sampled (which keeps the ids).
"""
import numpy as np
from PIL import Image, ImageDraw

VERSION = 1  # raise it when a drawing changes: feature caches are keyed by it

CLASSES = ("sky", "mountain", "water", "sand", "grass", "road", "building", "tree", "vehicle")
SKY, MOUNTAIN, WATER, SAND, GRASS, ROAD, BUILDING, TREE, VEHICLE = range(9)
# after Paul Tol's "muted" colour-blind safe scheme, each in the hue one expects of its class
PALETTE = ((136, 204, 238), (170, 68, 153), (51, 34, 136), (221, 204, 119), (153, 153, 51),
           (187, 187, 187), (204, 102, 119), (17, 119, 51), (136, 34, 85))

SIZE = 128
S = 2 * SIZE  # everything is drawn at this side

# a natural hue (in turns), saturation and lightness for each class
NATURAL = np.array([(0.57, 0.50, 0.74), (0.64, 0.22, 0.46), (0.54, 0.45, 0.50), (0.11, 0.45, 0.72), (0.25, 0.45, 0.50),
                    (0.66, 0.08, 0.42), (0.05, 0.40, 0.62), (0.33, 0.42, 0.34), (0.98, 0.60, 0.50)])


def hsl(hue, saturation, lightness):
    """(R, G, B) in 0..255 of a colour given as hue in turns, saturation and lightness in 0..1."""
    reach = saturation * min(lightness, 1 - lightness)
    turn = (np.array([0, 8, 4]) + 12 * hue) % 12
    rgb = lightness - reach * np.clip(np.minimum(turn - 3, 9 - turn), -1, 1)
    return tuple(int(round(255 * float(v))) for v in rgb)


class Painter:
    """One picture in the making; everything random comes from `self.rng`."""

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
        self.palette = list(zip(hue % 1, np.clip(colourful * saturation * self.rng.uniform(0.6, 1.5, n), 0, 0.8), lightness))

    def u(self, low, high):
        return low + (high - low) * float(self.rng.random())

    def chance(self, p):
        return self.rng.random() < p

    def tone(self, cls, lighter=0.0, hue=0.0, saturation=1.0):
        """The class's colour of this picture, `lighter` (-1..1) towards white or black."""
        h, s, l = self.palette[cls]
        l = l + lighter * (1 - l if lighter > 0 else l)
        return hsl((h + hue) % 1, min(s * saturation, 1), l)

    def shape(self, kind, cls, xy, colour=None):
        """Draw a polygon, ellipse or rectangle in the picture and its class in the label map."""
        xy = [(round(float(x)), round(float(y))) for x, y in xy]
        getattr(self.ink, kind)(xy, fill=colour or self.tone(cls))
        getattr(self.ids, kind)(xy, fill=cls)

    def box(self, cls, x0, y0, x1, y1, colour=None, kind="rectangle"):
        if x1 >= x0 and y1 >= y0:
            self.shape(kind, cls, [(x0, y0), (x1, y1)], colour)

    # ---- noise ---------------------------------------------------------------------------------------------
    def field(self, across, down, shape=(S, S)):
        """Smooth noise in -1..1 with `across` x `down` independent values."""
        grid = Image.fromarray(self.rng.integers(0, 256, (down, across), dtype=np.uint8))
        return np.asarray(grid.resize(shape[::-1], Image.Resampling.BICUBIC), dtype=np.float32) / 127.5 - 1

    def line(self, rough, points=S + 1):
        """A jagged profile in about -1..1, by midpoint displacement; `rough` in 0..1."""
        y, step = self.rng.uniform(-1, 1, 5), 0.5
        while len(y) < points:
            mid = (y[1:] + y[:-1]) / 2 + self.rng.uniform(-step, step, len(y) - 1)
            y = np.insert(y, np.arange(1, len(y)), mid)
            step *= rough
        return y[:points] - y[:points].mean()

    # ---- things --------------------------------------------------------------------------------------------
    def land(self, cls, y, height=0.0, rough=0.3, lighter=0.0):
        """Ground of one class from about row y down, with a jagged or wavy upper edge."""
        top = y - height * self.line(rough)
        self.shape("polygon", cls, [(0, S), *zip(range(S + 1), top), (S, S)], self.tone(cls, lighter))

    def sky(self):
        top, low = self.u(-0.35, 0.1), self.glow
        for y in range(0, self.horizon + 12, 4):
            t = y / self.horizon
            self.box(SKY, 0, y, S, y + 4, self.tone(SKY, top + (low - top) * min(t, 1), 0.06 * t))
        if self.chance(0.5):
            x, y, r = self.u(20, S - 20), self.u(12, self.horizon * 0.7), self.u(7, 14)
            for k, light in ((1.8, low * 0.6), (1.35, 0.5), (1, 0.85)):
                self.box(SKY, x - k * r, y - k * r, x + k * r, y + k * r, self.tone(SKY, light, -0.08), "ellipse")

    def mountains(self):
        ridges = self.rng.integers(1, 4)
        for i in range(ridges):
            away = (ridges - 1 - i) / 3
            y = self.horizon - self.u(0.5, 0.72) * self.horizon * (0.45 + 0.55 * away)
            self.land(MOUNTAIN, y, self.u(20, 44), self.u(0.48, 0.6), 0.45 * away - 0.05)

    def tree(self, x, y, h):
        """A tree that stands at (x, y), h high: broad-leaved, conifer or poplar."""
        kind, light, hue = self.tree_kind, self.u(-0.12, 0.12), self.u(-0.03, 0.03)
        bark = self.tone(TREE, -0.5, 0.2, 0.6)
        self.box(TREE, x - h * 0.045, y - h * 0.4, x + h * 0.045, y, bark)
        if kind == 0:
            for _ in range(9):
                a, r = self.u(0, 6.2832), self.u(0.14, 0.24) * h
                cx, cy = x + 0.22 * h * np.cos(a), y - 0.64 * h + 0.2 * h * np.sin(a)
                self.box(TREE, cx - r, cy - r, cx + r, cy + r, self.tone(TREE, light + 0.25 * (y - 0.6 * h - cy) / h, hue), "ellipse")
        elif kind == 1:
            for i in range(5):
                top, w = y - h + i * h * 0.16, h * (0.12 + 0.055 * i)
                self.shape("polygon", TREE, [(x, top), (x + w, top + 0.32 * h), (x, top + 0.27 * h), (x - w, top + 0.32 * h)],
                           self.tone(TREE, light + 0.1 * (i % 2) - 0.06, hue))
        else:
            self.box(TREE, x - 0.15 * h, y - h, x + 0.15 * h, y - 0.12 * h, self.tone(TREE, light, hue), "ellipse")
            self.box(TREE, x - 0.11 * h, y - 0.97 * h, x + 0.04 * h, y - 0.3 * h, self.tone(TREE, light + 0.1, hue), "ellipse")

    def palm(self, x, y, h):
        lean, bark = self.u(-0.25, 0.25) * h, self.tone(TREE, -0.35, 0.2, 0.6)
        self.shape("polygon", TREE, [(x - 0.04 * h, y), (x + lean * 0.4, y - 0.5 * h), (x + lean, y - h * 0.85),
                                     (x + lean * 0.4 + 0.05 * h, y - 0.5 * h), (x + 0.04 * h, y)], bark)
        for a in np.linspace(-0.25, np.pi + 0.25, 8):
            dx, dy, w = 0.42 * h * np.cos(a), 0.3 * h * np.sin(a), 0.07 * h
            tip = (x + lean + dx, y - 0.85 * h - dy + 0.16 * h)
            bend = (x + lean + 0.6 * dx, y - 0.85 * h - dy * 0.9)
            self.shape("polygon", TREE, [(x + lean, y - 0.85 * h), (bend[0], bend[1] - w), tip, (bend[0], bend[1] + w)],
                       self.tone(TREE, self.u(-0.15, 0.2)))

    def windows(self, x0, y0, x1, y1, nx, ny, lit):
        """A grid of windows on a wall."""
        dx, dy = (x1 - x0) / nx, (y1 - y0) / ny
        for i in range(nx):
            for j in range(ny):
                light = lit if self.chance(0.85) else -lit
                self.box(BUILDING, x0 + (i + 0.22) * dx, y0 + (j + 0.2) * dy, x0 + (i + 0.78) * dx, y0 + (j + 0.76) * dy,
                         self.tone(BUILDING, light, 0.45))

    def house(self, x, y, w, h):
        """A gabled house with its door, windows, chimney."""
        wall, roof, lit = self.u(-0.1, 0.2), self.u(-0.5, -0.3), self.u(-0.75, -0.5)
        eave = y - 0.58 * h
        self.box(BUILDING, x + 0.68 * w, y - h, x + 0.78 * w, eave, self.tone(BUILDING, roof))
        self.box(BUILDING, x, eave, x + w, y, self.tone(BUILDING, wall))
        cut = self.u(0.12, 0.5)
        self.shape("polygon", BUILDING, [(x - 0.06 * w, eave), (x + cut * w, y - 0.97 * h), (x + (1 - cut) * w, y - 0.97 * h), (x + 1.06 * w, eave)],
                   self.tone(BUILDING, roof, self.u(-0.1, 0.1)))
        self.windows(x + 0.04 * w, eave, x + 0.96 * w, y - 0.25 * h, max(2, int(w / 15)), 1, lit)
        self.box(BUILDING, x + 0.42 * w, y - 0.27 * h, x + 0.57 * w, y, self.tone(BUILDING, roof, 0.1))

    def tower(self, x, y, w, h, away=0.0):
        """A block of flats or offices with its window grid."""
        wall, lit = self.u(-0.3, 0.2) + away, self.u(0.45, 0.8) * (1 if self.chance(0.5) else -1)
        self.box(BUILDING, x, y - h, x + w, y, self.tone(BUILDING, wall, self.u(-0.08, 0.08)))
        self.box(BUILDING, x + 0.82 * w, y - h, x + w, y, self.tone(BUILDING, wall - 0.25))
        self.box(BUILDING, x - 1, y - h, x + w + 1, y - h + 3, self.tone(BUILDING, wall - 0.4))
        self.windows(x, y - h + 4, x + 0.82 * w, y - 2, max(2, int(w / 9)), max(2, int(h / 12)), lit)

    def car(self, x, y, w):
        """A car, van or bus seen from the side, wheels on row y, w long."""
        kind, face = self.rng.integers(0, 4), 1 if self.chance(0.5) else -1
        hue, light = self.u(-0.5, 0.5), self.u(-0.25, 0.35)
        body, glass, tyre = self.tone(VEHICLE, light, hue), self.tone(VEHICLE, -0.7, hue + 0.5, 0.3), (24, 24, 28)
        h, r = w * (0.36, 0.36, 0.46, 0.42)[kind], 0.095 * w

        def at(points):
            return [(x + w / 2 + face * w * (px - 0.5), y - r * 0.6 - h * py) for px, py in points]
        self.box(VEHICLE, x + 0.03 * w, y - 0.5 * r, x + 0.97 * w, y + 0.5 * r, (30, 30, 34))  # its shadow
        if kind < 2:
            self.shape("polygon", VEHICLE, at([(0, 0), (0, .38), (.06, .5), (.2, .55), (.34, 1), (.68, 1), (.84, .55), (.98, .46), (1, 0)]), body)
            self.shape("polygon", VEHICLE, at([(.26, .56), (.37, .92), (.5, .92), (.5, .56)]), glass)
            self.shape("polygon", VEHICLE, at([(.54, .56), (.54, .92), (.66, .92), (.77, .56)]), glass)
        else:
            self.shape("polygon", VEHICLE, at([(0, 0), (0, .96), (.03, 1), (.84, 1), (.9, .93), (1, .5), (1, 0)]), body)
            for a, b in ((.06, .24), (.28, .46), (.5, .68)) if kind == 3 else ((.62, .7),):
                self.shape("polygon", VEHICLE, at([(a, .5), (a, .85), (b, .85), (b, .5)]), glass)
            self.shape("polygon", VEHICLE, at([(.74, .5), (.74, .85), (.87, .85), (.96, .5)]), glass)
        self.shape("polygon", VEHICLE, at([(0, .12), (0, .2), (1, .2), (1, .12)]), self.tone(VEHICLE, light - 0.25, hue))
        self.shape("polygon", VEHICLE, at([(.95, .28), (.95, .4), (1, .38), (1, .28)]), (255, 246, 205))
        for cx in (.2, .8):
            cx = x + cx * w
            self.box(VEHICLE, cx - r, y - 1.6 * r, cx + r, y + 0.4 * r, tyre, "ellipse")
            self.box(VEHICLE, cx - .45 * r, y - 1.05 * r, cx + .45 * r, y - 0.15 * r, (176, 176, 182), "ellipse")

    def car_behind(self, x, y, w):
        """A car seen from behind or from the front, wheels on row y."""
        hue, light, h = self.u(-0.5, 0.5), self.u(-0.25, 0.35), w * self.u(0.75, 0.95)
        body, lamps = self.tone(VEHICLE, light, hue), (224, 40, 40) if self.chance(0.6) else (255, 246, 205)
        for cx in (.06, .76):
            self.box(VEHICLE, x + cx * w, y - 0.3 * h, x + (cx + .18) * w, y, (24, 24, 28))
        self.box(VEHICLE, x, y - 0.55 * h, x + w, y - 0.12 * h, body)
        self.shape("polygon", VEHICLE, [(x + .04 * w, y - .55 * h), (x + .16 * w, y - h), (x + .84 * w, y - h), (x + .96 * w, y - .55 * h)], body)
        self.shape("polygon", VEHICLE, [(x + .13 * w, y - .57 * h), (x + .22 * w, y - .92 * h), (x + .78 * w, y - .92 * h), (x + .87 * w, y - .57 * h)],
                   self.tone(VEHICLE, -0.7, hue + 0.5, 0.3))
        for cx in (.04, .78):
            self.box(VEHICLE, x + cx * w, y - .48 * h, x + (cx + .18) * w, y - .36 * h, lamps)
        self.box(VEHICLE, x + .36 * w, y - .36 * h, x + .64 * w, y - .25 * h, (232, 232, 226))
        self.box(VEHICLE, x, y - .17 * h, x + w, y - .11 * h, self.tone(VEHICLE, light - 0.4, hue))

    def road_ahead(self, half, top=None):
        """A straight road to the vanishing point, `half` its half width at the bottom."""
        top, vx = top or self.horizon, self.vanish
        self.shape("polygon", ROAD, [(vx - 2, top), (vx + 2, top), (self.near + half, S), (self.near - half, S)])
        mark = self.tone(ROAD, 0.85 if self.palette[ROAD][2] < 0.6 else -0.8, 0, 0.3)

        def strip(a, b, s0, s1):  # lane strip between a and b (-1..1) from s0 to s1 (0: vanishing point, 1: bottom)
            def at(k, s):
                return vx + (self.near + k * half - vx) * s, top + (S - top) * s
            self.shape("polygon", ROAD, [at(a, s0), at(b, s0), at(b, s1), at(a, s1)], mark)
        strip(-0.94, -0.88, 0.04, 1), strip(0.88, 0.94, 0.04, 1)
        for k in range(1, 9):
            far = 1 / (0.55 + 0.55 * k + self.dash)  # dashes even on the ground are harmonic in the picture
            strip(-0.035, 0.035, far, min(far * 1 / (1 - 0.26 * far), 1))

    def road_across(self, y, h):
        """A road from left to right, with kerbs and dashes."""
        mark = self.tone(ROAD, 0.85 if self.palette[ROAD][2] < 0.6 else -0.8, 0, 0.3)
        self.box(ROAD, 0, y, S, y + h)
        self.box(ROAD, 0, y, S, y + 3, self.tone(ROAD, 0.35)), self.box(ROAD, 0, y + 4, S, y + 6, self.tone(ROAD, -0.35))
        for x in range(-int(self.u(0, 50)), S, 52):
            self.shape("polygon", ROAD, [(x + 3, y + .56 * h), (x + 31, y + .56 * h), (x + 29, y + .56 * h + 4), (x, y + .56 * h + 4)], mark)

    # ---- layouts: each from the back to the front ---------------------------------------------------------
    def lake(self):
        h = self.horizon
        self.mountains()
        self.land(GRASS, h + 4, 6, 0.4, -0.15)
        if self.chance(0.6):
            self.house(self.u(0, S - 60), h + self.u(4, 9), self.u(44, 60), self.u(38, 48))
        for _ in range(self.rng.integers(1, 5)):
            self.tree(self.u(0, S), h + self.u(4, 9), self.u(40, 60))
        self.land(WATER, h + self.u(8, 12))
        y = h + self.u(0.45, 0.65) * (S - h)
        bay = self.u(-30, 30)
        near = SAND if self.chance(0.4) else GRASS
        self.shape("polygon", near, self.shore(y - 3, bay), self.tone(near, -0.3))
        self.shape("polygon", near, self.shore(y, bay))
        for _ in range(self.rng.integers(1, 4)):
            self.tree(self.u(0, S), self.u(y + 18, S), self.u(70, 120))

    def beach(self):
        h = self.horizon
        if self.chance(0.5):
            self.land(MOUNTAIN, h - 8, self.u(10, 24), 0.5)
        self.land(WATER, h)
        y, bay = h + self.u(0.25, 0.5) * (S - h), self.u(-60, 60)
        self.shape("polygon", WATER, self.shore(y - 5, bay, 3), self.tone(WATER, 0.75))  # foam
        self.shape("polygon", SAND, self.shore(y, bay, 3))
        side = 0 if bay > 0 else 1  # the land's side
        for _ in range(self.rng.integers(0, 3)):
            self.house(self.u(0, 70) if side == 0 else self.u(S - 130, S - 60), y + self.u(10, 40), self.u(40, 62), self.u(40, 56))
        if self.chance(0.5):
            self.car(self.u(0, S - 90), self.u(y + 60, S - 8), self.u(84, 116))
        for _ in range(self.rng.integers(1, 4)):
            x = self.u(-10, 100) if side == 0 else self.u(S - 100, S + 10)
            (self.palm if self.chance(0.8) else self.tree)(x, self.u(y + 30, S), self.u(90, 150))

    def street(self):
        h = self.horizon
        if self.chance(0.6):
            self.mountains()
        verge = GRASS if self.chance(0.4) else SAND
        self.land(verge, h)
        half = self.u(70, 110)
        self.road_ahead(half)
        for s in np.sort(self.rng.uniform(0.15, 0.9, 7)):  # things along the road, the far ones first
            y, k = h + (S - h) * s, 1 if self.chance(0.5) else -1
            edge = self.vanish + (self.near + k * half * 1.15 - self.vanish) * s
            if self.chance(0.5):
                w, high = 130 * s + 12, (170 * s + 16) * self.u(0.8, 1.1)
                x = edge if k > 0 else edge - w
                (self.house if self.chance(0.6) else self.tower)(x, y, w, high)
            else:
                self.tree(edge + k * 24 * s, y, (190 * s + 14) * self.u(0.8, 1.1))
        for s in np.sort(self.rng.uniform(0.4, 0.95, self.rng.integers(1, 4))):
            w, k = 0.74 * half * s, 0.5 if self.chance(0.5) else -0.5
            self.car_behind(self.vanish + (self.near + k * half - self.vanish) * s - w / 2, h + (S - h) * s, w)

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
        elif front == 1:
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
        if self.chance(0.75):
            self.mountains()
        for i in range(3):
            self.land(GRASS, h + 26 * i, 14, 0.22, 0.16 - 0.12 * i)
            for _ in range(self.rng.integers(0, 3)):
                self.tree(self.beside(20), h + 26 * i + self.u(8, 20), 34 + 18 * i)
        if self.chance(0.5):
            self.road_ahead(self.u(36, 70), h + self.u(16, 40))
        if self.chance(0.7):
            w = self.u(60, 90)
            self.house(self.beside(70) - w / 2, h + self.u(40, 70), w, w * self.u(0.75, 0.95))
        if self.chance(0.5):
            self.car(self.u(0, S - 90), self.u(h + 90, S - 10), self.u(80, 110))
        for _ in range(self.rng.integers(1, 3)):
            self.tree(self.beside(90), self.u(h + 70, S), self.u(80, 130))

    def beside(self, gap):
        """Some x at least `gap` to the left or right of the vanishing point."""
        return self.vanish + (1 if self.chance(0.5) else -1) * self.u(gap, 0.75 * S)

    def shore(self, y, bay, wave=1):
        """The polygon of near ground whose edge swings by `bay` rows from left to right."""
        x = np.linspace(0, S, 65)
        edge = y + bay * (x / S - 0.5) + 10 * np.sin(self.phase + x / 46) + wave * np.sin(self.phase + x / 9)
        return [(0, S), *zip(x, edge), (S, S)]

    # ---- texture and light ---------------------------------------------------------------------------------
    def texture(self):
        """The picture with each class's texture laid over its pixels, (S, S, 3) float32 in 0..255."""
        rgb, label = np.array(self.image, dtype=np.float32), np.asarray(self.label)
        grain = self.rng.random((S, S), dtype=np.float32) * 2 - 1
        for cls in np.unique(label):
            where = label == cls
            rows, columns = np.flatnonzero(where.any(1)), np.flatnonzero(where.any(0))
            part = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)  # work in the bounding box
            where, fine = where[part], grain[part]
            y, x = np.ogrid[part]
            noise = lambda across, down: self.field(across, down, where.shape)
            # level ground in perspective: u across, v ahead, both per row
            depth = np.maximum(y - self.horizon, 0).astype(np.float32) + 14
            u, v = (x - self.vanish) * (90 / depth), 4200 / depth
            if cls == SKY:
                shade = 0.4 * np.clip(noise(4, 6) + 0.4 * noise(14, 20) + 0.2 * noise(30, 40) - self.cloudy, 0, 0.8)
            elif cls == MOUNTAIN:  # lit and shaded flanks that run down from the ridge, snow above
                under = (y - rows[0] - where.argmax(0)).astype(np.float32)
                lean = (x - columns[0] + 0.6 * under * np.sign(noise(7, 1)[:1])).astype(int) % where.shape[1]
                shade = 0.22 * np.tanh(3 * noise(where.shape[1] // 14 + 2, 1)[0])[lean] + 0.05 * noise(50, 30) - 0.002 * under
                shade += 0.5 * (under + 8 * noise(40, 9) < self.snow)
            elif cls == WATER:  # wave crests, closer towards the horizon
                wave = np.sin(1.3 * v + 0.02 * u + 3 * noise(9, 14)) * np.clip(depth / 50, 0.4, 1)
                shade = 0.75 * np.maximum(wave, 0) ** 2 + 0.12 * noise(12, where.shape[0] // 2 + 1) - 0.2
            elif cls == SAND:  # grains and ripples
                grains = noise(where.shape[1] // 3 + 2, where.shape[0] // 3 + 2)
                dunes = np.sin(0.11 * x + 0.16 * (y - self.horizon) + 3 * noise(5, 5))
                shade = 0.25 * np.sign(grains) * grains ** 2 + 0.14 * fine + 0.16 * dunes
            elif cls == GRASS:  # blades, taller towards the eye
                near = np.clip(depth / 130, 0, 1)
                tall = noise(where.shape[1] // 2 + 1, where.shape[0] // 10 + 1)
                short = noise(where.shape[1] // 2 + 1, where.shape[0] // 6 + 1)
                shade = 0.36 * near * tall + 0.34 * (1 - near) * short + 0.08 * noise(7, 7)
            elif cls == TREE:  # leaves
                leaves = noise(where.shape[1] // 4 + 1, where.shape[0] // 4 + 1)
                shade = 0.3 * np.sign(leaves) * np.sqrt(np.abs(leaves)) + 0.12 * fine
            else:
                shade = {ROAD: 0.03, BUILDING: 0.04, VEHICLE: 0.0}[cls] * fine
            rgb[part] += (130 * shade * where)[..., None]
        return rgb

    def grade(self, rgb):
        """Light from one side, white balance, gamma, noise: one camera on one day; reduced to the final size."""
        slope = np.linspace(-1, 1, S, dtype=np.float32)
        light = 1 + slope[:, None] * np.float32(self.u(-0.12, 0.12)) + slope * np.float32(self.u(-0.15, 0.15))
        image = Image.fromarray(np.clip(rgb * light[..., None], 0, 255).astype(np.uint8)).reduce(2)
        gains, gamma = self.rng.uniform(0.9, 1.08, 3), self.u(0.8, 1.25)
        image = image.point([min(round(255 * gain * (i / 255) ** gamma), 255) for gain in gains for i in range(256)])
        noise = self.rng.integers(-24, 25, (SIZE, SIZE, 1)) * self.u(0.02, 0.14)
        return Image.fromarray(np.clip(np.asarray(image) + noise, 0, 255).astype(np.uint8))


def draw_scene(seed):
    """(image, label) of one landscape: PIL "RGB" and PIL "L" (ids into CLASSES), both 128 x 128."""
    p = Painter(seed)
    p.tree_kind, p.near = p.rng.integers(0, 3), p.vanish + p.u(-70, 70)
    p.glow = p.u(0.1, 0.5)
    p.cloudy, p.snow, p.dash, p.phase = p.u(-0.3, 0.7), p.u(-14, 22), p.u(0, 0.5), p.u(0, 6.2832)
    p.sky()
    (p.lake, p.beach, p.street, p.city, p.meadow)[p.rng.integers(0, 5)]()
    image = p.grade(p.texture())
    return image, Image.fromarray(np.asarray(p.label)[::2, ::2])
