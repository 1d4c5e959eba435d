"""Train a LoRA of LTX-Video, or the model itself. All options: python ltx_video_train_network.py --help"""

from library.errors import run
from train_network import main

if __name__ == "__main__":
    run(lambda: main("ltx_video"))
