"""Train a LoRA of Lumina Image 2.0, or the model itself. All options: python lumina_train_network.py --help"""

from library.errors import run
from train_network import main

if __name__ == "__main__":
    run(lambda: main("lumina_2"))
