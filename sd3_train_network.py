"""Train a LoRA of Stable Diffusion 3 or 3.5, or the model itself. All options: python sd3_train_network.py --help"""

from library.errors import run
from train_network import main

if __name__ == "__main__":
    run(lambda: main("sd3"))
