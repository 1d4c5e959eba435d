"""Makes the data set of the quickstart LoRA: examples/blueprint, 64x64 line drawings in white on blue.

Two thirds of the base model's classes are left out, so that the LoRA can be tested on things it never saw.
"""

import argparse
import os

import emoji_data as data
import numpy as np
from PIL import Image
from style_score import style_score

TRAINED = (
    "apple",
    "banana",
    "pineapple",
    "mushroom",
    "donut",
    "coffee",
    "sunflower",
    "cactus",
    "pine tree",
    "cat",
    "panda",
    "fox",
    "fish",
    "turtle",
    "chick",
    "butterfly",
    "crab",
    "car",
    "bus",
    "sailboat",
    "house",
    "tent",
    "star",
    "umbrella",
    "heart",
    "crown",
    "bell",
    "guitar",
    "robot",
    "pumpkin",
)
PAPER, GRID, INK = np.array([28.0, 62.0, 140.0]), np.array([46.0, 82.0, 160.0]), np.array([240.0, 246.0, 255.0])


def blueprint(name, rng=None):
    """White outlines of an emoji over blue paper with a faint grid, as uint8 RGB."""
    paper = np.broadcast_to(PAPER, (data.SIZE, data.SIZE, 3)).copy()
    paper[7::8] = GRID
    paper[:, 7::8] = GRID
    return data.drawing(data.line_strength(name, rng), INK, paper)


def main(folder):
    os.makedirs(folder, exist_ok=True)
    rng, scores = np.random.default_rng(7), []
    for name in TRAINED:
        picture = blueprint(name, rng)
        scores.append(style_score(picture))
        stem = os.path.join(folder, name.replace(" ", "_"))
        Image.fromarray(picture).save(stem + ".png", optimize=True)
        with open(stem + ".txt", "w") as out:
            out.write(f"blueprint of a {name}\n")
    print(
        f"{len(TRAINED)} pictures, {len(TRAINED) / len(data.CLASSES):.0%} of the classes, "
        f"style score {np.mean(scores):.3f} (least {min(scores):.3f})"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", default="examples/blueprint")
    main(parser.parse_args().folder)
