"""Train a LoRA of HunyuanVideo-1.5, or the model itself. Options: python hunyuan_video_15_train_network.py --help"""

from library.errors import run
from train_network import main

if __name__ == "__main__":
    run(lambda: main("hunyuan_video_15"))
