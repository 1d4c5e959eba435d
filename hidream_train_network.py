"""Train a LoRA of HiDream I1, or the model itself. All options: python hidream_train_network.py --help"""

from library.errors import run
from train_network import main

if __name__ == "__main__":
    run(lambda: main("hidream"))
