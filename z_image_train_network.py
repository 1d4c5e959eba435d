"""Train a LoRA of Z-Image, or the model itself. All options: python z_image_train_network.py --help"""

from library.errors import run
from train_network import main

if __name__ == "__main__":
    run(lambda: main("z_image"))
