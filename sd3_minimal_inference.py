"""Make pictures with Stable Diffusion 3 or 3.5 and LoRAs of it. All options: python sd3_minimal_inference.py --help"""

from library.errors import run
from library.inference import main

if __name__ == "__main__":
    run(lambda: main("sd3"))
