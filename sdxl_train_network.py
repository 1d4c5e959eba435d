"""Train a LoRA of Stable Diffusion XL, or the model itself. All options: python sdxl_train_network.py --help"""

from library.errors import run
from train_network import main

if __name__ == "__main__":
    run(lambda: main("sdxl"))
