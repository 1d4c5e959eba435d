"""Train a LoRA of Stable Diffusion 1.x or 2.x, or the model itself. All options: python sd_train_network.py --help"""

from library.errors import run
from train_network import main

if __name__ == "__main__":
    run(lambda: main("sd"))
