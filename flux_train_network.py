"""Train a LoRA of FLUX.1 dev, schnell or Kontext, or the model. All options: python flux_train_network.py --help"""

from library.errors import run
from train_network import main

if __name__ == "__main__":
    run(lambda: main("flux"))
