"""Train a LoRA of OmniGen2, or the model itself. All options: python omnigen2_train_network.py --help"""

from library.errors import run
from train_network import main

if __name__ == "__main__":
    run(lambda: main("omnigen2"))
