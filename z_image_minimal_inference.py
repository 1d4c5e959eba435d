"""Make pictures with Z-Image and LoRAs of it. All options: python z_image_minimal_inference.py --help"""

from library.errors import run
from library.inference import main

if __name__ == "__main__":
    run(lambda: main("z_image"))
