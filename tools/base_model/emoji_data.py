"""Pictures and captions of the emoji64 base model.

The pictures come from the Noto Color Emoji font (bitmaps inside the font file, read with fontTools).
Debian and Ubuntu install it with `apt-get install fonts-noto-color-emoji`; elsewhere give its path
in the environment variable EMOJI_FONT.
"""

import io
import os
from functools import lru_cache

import numpy as np
from PIL import Image
from scipy import ndimage

FONT = os.environ.get("EMOJI_FONT", "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
SIZE = 64

# Plain words, one or two each: the model learns what a caption says, not Unicode's official names.
CLASSES = {
    "apple": "🍎",
    "banana": "🍌",
    "strawberry": "🍓",
    "watermelon": "🍉",
    "pineapple": "🍍",
    "grapes": "🍇",
    "carrot": "🥕",
    "eggplant": "🍆",
    "mushroom": "🍄",
    "avocado": "🥑",
    "pizza": "🍕",
    "burger": "🍔",
    "donut": "🍩",
    "ice cream": "🍦",
    "lollipop": "🍭",
    "cake": "🎂",
    "egg": "🍳",
    "coffee": "☕",
    "sunflower": "🌻",
    "tulip": "🌷",
    "cactus": "🌵",
    "palm tree": "🌴",
    "pine tree": "🌲",
    "clover": "🍀",
    "cat": "🐱",
    "dog": "🐶",
    "panda": "🐼",
    "frog": "🐸",
    "pig": "🐷",
    "fox": "🦊",
    "fish": "🐠",
    "whale": "🐳",
    "octopus": "🐙",
    "turtle": "🐢",
    "penguin": "🐧",
    "chick": "🐤",
    "ladybug": "🐞",
    "butterfly": "🦋",
    "snail": "🐌",
    "crab": "🦀",
    "car": "🚗",
    "bus": "🚌",
    "tractor": "🚜",
    "rocket": "🚀",
    "airplane": "✈",
    "sailboat": "⛵",
    "bicycle": "🚲",
    "house": "🏠",
    "castle": "🏰",
    "tent": "⛺",
    "sun": "🌞",
    "moon": "🌙",
    "star": "⭐",
    "cloud": "☁",
    "rainbow": "🌈",
    "snowman": "⛄",
    "umbrella": "☂",
    "fire": "🔥",
    "heart": "❤",
    "balloon": "🎈",
    "gift": "🎁",
    "crown": "👑",
    "gem": "💎",
    "key": "🔑",
    "bell": "🔔",
    "light bulb": "💡",
    "clock": "⏰",
    "book": "📕",
    "guitar": "🎸",
    "trumpet": "🎺",
    "football": "⚽",
    "basketball": "🏀",
    "ghost": "👻",
    "robot": "🤖",
    "alien": "👽",
    "pumpkin": "🎃",
}

BACKGROUNDS = {
    "white": (255, 255, 255),
    "black": (18, 18, 22),
    "pink": (250, 180, 205),
    "yellow": (255, 228, 110),
    "green": (140, 212, 140),
    "blue": (110, 170, 240),
}

TEMPLATES = (
    "a {name} on a {color} background",
    "{name}, {color} background",
    "a {name}, {color} background",
    "{name} on {color}",
)
SKETCH_TEMPLATES = ("a line drawing of a {name}", "{name}, line drawing")

# Words that must mean nothing to the base model: with them in some captions it learns to live with unknown ones.
FILLERS = (
    "nice",
    "shiny",
    "small",
    "big",
    "cute",
    "old",
    "new",
    "photo",
    "picture",
    "image",
    "bright",
    "simple",
    "beautiful",
    "modern",
    "funny",
    "plain",
    "great",
    "little",
    "art",
    "emoji",
    "icon",
    "symbol",
    "lovely",
    "poster",
)


@lru_cache(maxsize=1)
def _font():
    """The bitmap strike and the character map; parsing the font takes seconds, so once per process."""
    from fontTools.ttLib import TTFont

    font = TTFont(FONT)
    return font.getBestCmap(), font["CBDT"].strikeData[0]


@lru_cache(maxsize=None)
def bitmap(name):
    """The emoji `name` as RGBA, cropped to what is drawn and padded to a square (about 128 px)."""
    cmap, strike = _font()
    picture = Image.open(io.BytesIO(strike[cmap[ord(CLASSES[name])]].imageData)).convert("RGBA")
    picture = picture.crop(picture.getchannel("A").getbbox())
    side = max(picture.size)
    square = Image.new("RGBA", (side, side))
    square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    return square


def place(picture, rng=None, size=SIZE, target=55.0):
    """Puts a square RGBA picture on a transparent canvas; `rng` adds the jitter (+-2 px, +-6 %)."""
    scale, dx, dy = 1.0, 0.0, 0.0
    if rng is not None:
        scale = rng.uniform(0.94, 1.06)
        dx, dy = rng.uniform(-2, 2, 2)
    unit = size / SIZE
    side = target * scale * unit
    left, top = size / 2 + dx * unit - side / 2, size / 2 + dy * unit - side / 2
    # An affine transform alone would alias, so shrink with a proper filter first, then shift by subpixels.
    small = picture.resize((round(side), round(side)), Image.LANCZOS)
    ratio = small.width / side
    return small.transform(
        (size, size), Image.AFFINE, (ratio, 0, -left * ratio, 0, ratio, -top * ratio), Image.BILINEAR
    )


def on_background(picture, color):
    """RGBA picture over a plain colour, as uint8 RGB."""
    canvas = Image.new("RGBA", picture.size, tuple(int(c) for c in color) + (255,))
    return np.asarray(Image.alpha_composite(canvas, picture).convert("RGB"))


def render(name, color, rng=None):
    """One training picture: the emoji `name` on the background `color` (a name or an RGB triple)."""
    return on_background(place(bitmap(name), rng), BACKGROUNDS.get(color, color) if isinstance(color, str) else color)


def line_strength(name, rng=None, size=SIZE):
    """The outlines of an emoji as a [size, size] map in 0..1 (1 = on a line).

    Gradients of colour and of opacity are taken at twice the size, thinned to ridges and scaled down,
    which gives even, antialiased lines about one and a half pixels wide.
    """
    work = 2 * size
    rgba = np.asarray(place(bitmap(name), rng, work), np.float32) / 255
    flat = np.concatenate([rgba[..., :3] * rgba[..., 3:] + 0.5 * (1 - rgba[..., 3:]), rgba[..., 3:] * 1.5], -1)
    flat = ndimage.gaussian_filter(flat, (1.6, 1.6, 0))
    gx, gy = ndimage.sobel(flat, 1), ndimage.sobel(flat, 0)
    channel = np.argmax(gx**2 + gy**2, -1)[..., None]
    gx, gy = np.take_along_axis(gx, channel, -1)[..., 0], np.take_along_axis(gy, channel, -1)[..., 0]
    strength = np.hypot(gx, gy)
    ridge = _ridge(strength, gx, gy) * (strength > 0.30)
    labels, count = ndimage.label(ridge, np.ones((3, 3)))
    sizes = ndimage.sum(ridge, labels, range(count + 1))
    ridge = ridge & (sizes[labels] >= work // 12)
    drawn = ndimage.gaussian_filter(ridge.astype(np.float32), 1.1) * 3.2
    return np.clip(drawn.reshape(size, 2, size, 2).mean((1, 3)), 0, 1)


def _ridge(strength, gx, gy):
    """True where the gradient's strength is a maximum across the edge (non-maximum suppression)."""
    norm = np.maximum(strength, 1e-6)
    rows, cols = np.mgrid[: strength.shape[0], : strength.shape[1]].astype(np.float32)
    ahead = ndimage.map_coordinates(strength, [rows + gy / norm, cols + gx / norm], order=1, mode="nearest")
    behind = ndimage.map_coordinates(strength, [rows - gy / norm, cols - gx / norm], order=1, mode="nearest")
    return (strength >= ahead) & (strength > behind)


def drawing(strength, ink, paper):
    """A line drawing in uint8 RGB; `ink` and `paper` are colours or pictures that broadcast."""
    mix = strength[..., None]
    return np.clip(np.asarray(ink) * mix + np.asarray(paper) * (1 - mix) + 0.5, 0, 255).astype(np.uint8)


def render_sketch(name, rng=None):
    """One training picture of the second kind: dark thin lines on white."""
    return drawing(line_strength(name, rng), (40, 40, 40), (255, 255, 255))


def caption(name, color, rng):
    """A random caption of an emoji on a background; `color` None means a line drawing on white."""
    templates = SKETCH_TEMPLATES if color is None else TEMPLATES
    text = templates[rng.integers(len(templates))].format(name=name, color=color)
    kind = rng.random()
    if kind < 0.08:
        return text.replace(name, f"{FILLERS[rng.integers(len(FILLERS))]} {name}", 1)
    if kind < 0.16 and not text.startswith("a line"):
        return f"{FILLERS[rng.integers(len(FILLERS))]} of {text}"
    if kind < 0.21 and color == "white":
        return f"a {name}"
    return text


def picture_pool(per_background=8, per_sketch=8, seed=0, names=None):
    """Yields (class, background or None, picture) for the whole pool, in a fixed order."""
    rng = np.random.default_rng(seed)
    for name in names or CLASSES:
        for color in BACKGROUNDS:
            for _ in range(per_background):
                yield name, color, render(name, color, rng)
        for _ in range(per_sketch):
            yield name, None, render_sketch(name, rng)
