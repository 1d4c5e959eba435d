"""Make videos with HunyuanVideo-1.5 and LoRAs of it. Options: python hunyuan_video_15_minimal_inference.py --help"""

from library.errors import run
from library.inference import main

if __name__ == "__main__":
    run(lambda: main("hunyuan_video_15"))
