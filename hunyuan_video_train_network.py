"""Train a LoRA of HunyuanVideo, or the model itself. All options: python hunyuan_video_train_network.py --help"""

from library.errors import run
from train_network import main

if __name__ == "__main__":
    run(lambda: main("hunyuan_video"))
