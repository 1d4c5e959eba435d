"""Train a LoRA of Anima, or the model itself. All options: python anima_train_network.py --help"""

from library.errors import run
from train_network import main

if __name__ == "__main__":
    run(lambda: main("anima"))
