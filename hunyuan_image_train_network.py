"""Train a LoRA of HunyuanImage-2.1, or the model itself. All options: python hunyuan_image_train_network.py --help"""

from library.errors import run
from train_network import main

if __name__ == "__main__":
    run(lambda: main("hunyuan_image"))
