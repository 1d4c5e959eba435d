"""Train a LoRA of Qwen-Image or one of its edit models, or the model itself.

All options: python qwen_image_train_network.py --help
"""

from library.errors import run
from train_network import main

if __name__ == "__main__":
    run(lambda: main("qwen_image"))
