"""Train a LoRA of Wan 2.1 or 2.2, or the model itself. All options: python wan_train_network.py --help"""

from library.errors import run
from train_network import main

if __name__ == "__main__":
    run(lambda: main("wan"))
