"""Train a LoRA of Cosmos 1.0, or the model itself. All options: python cosmos_train_network.py --help"""

from library.errors import run
from train_network import main

if __name__ == "__main__":
    run(lambda: main("cosmos"))
