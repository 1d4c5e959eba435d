"""Make or edit pictures with Qwen-Image and LoRAs of it. All options: python qwen_image_minimal_inference.py --help"""

from library.errors import run
from library.inference import main

if __name__ == "__main__":
    run(lambda: main("qwen_image"))
