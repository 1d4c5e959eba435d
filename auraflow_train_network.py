"""Train a LoRA of AuraFlow or Pony V7, or the model itself. All options: python auraflow_train_network.py --help"""

from library.errors import run
from train_network import main

if __name__ == "__main__":
    run(lambda: main("auraflow"))
