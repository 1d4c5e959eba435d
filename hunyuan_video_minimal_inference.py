"""Make videos with HunyuanVideo and LoRAs of it. All options: python hunyuan_video_minimal_inference.py --help"""

from library.errors import run
from library.inference import main

if __name__ == "__main__":
    run(lambda: main("hunyuan_video"))
