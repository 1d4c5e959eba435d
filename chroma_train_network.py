"""Train a LoRA of Chroma, or the model itself. All options: python chroma_train_network.py --help"""

from library.errors import run
from train_network import main

if __name__ == "__main__":
    run(lambda: main("chroma"))
