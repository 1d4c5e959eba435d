"""How much a picture looks like the data set in examples/blueprint, as one number in 0..1.

python style_score.py picture.png [...]
"""

import sys

import numpy as np

BLUE, WHITE = np.array([28.0, 62.0, 140.0]), np.array([240.0, 246.0, 255.0])


def style_score(image):
    """The share of pixels on the palette, times whether there is enough blue paper and enough white ink.

    image: anything that numpy takes as [height, width, 3] of 0..255, a PIL picture in RGB for instance.
    On the palette: at most 48 away (RGB, Euclid) from the straight line between the paper's blue and white.
    Enough: 45 % of the pixels on the blue third of that line, 5 % on the white half; less counts in
    proportion. So a plain blue picture, a photo on white and a blue-and-white one without lines get little;
    the pictures of the data set get about 1.
    """
    pixels = np.asarray(image, np.float64)[..., :3].reshape(-1, 3)
    axis = WHITE - BLUE
    along = np.clip((pixels - BLUE) @ axis / (axis @ axis), 0, 1)
    near = np.linalg.norm(pixels - (BLUE + along[:, None] * axis), axis=1) <= 48
    paper, ink = (near & (along < 0.33)).mean(), (near & (along > 0.5)).mean()
    return float(near.mean() * min(1.0, paper / 0.45) * min(1.0, ink / 0.05))


if __name__ == "__main__":
    from PIL import Image

    for path in sys.argv[1:]:
        print(f"{style_score(Image.open(path).convert('RGB')):.3f}  {path}")
