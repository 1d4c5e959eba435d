"""Train a LoRA of Flux 2, or the model itself. All options: python flux2_train_network.py --help"""

from library.errors import run
from train_network import main

if __name__ == "__main__":
    run(lambda: main("flux2"))
