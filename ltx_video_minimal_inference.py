"""Make videos with LTX-Video and LoRAs of it. Options: python ltx_video_minimal_inference.py --help"""

from library.errors import run
from library.inference import main

if __name__ == "__main__":
    run(lambda: main("ltx_video"))
