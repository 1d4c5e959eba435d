"""Make pictures with Stable Diffusion XL and LoRAs of it. All options: python sdxl_minimal_inference.py --help"""

from library.errors import run
from library.inference import main

if __name__ == "__main__":
    run(lambda: main("sdxl"))
