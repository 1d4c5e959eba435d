"""Make pictures with Flux 2 and LoRAs of it. All options: python flux2_minimal_inference.py --help"""

from library.errors import run
from library.inference import main

if __name__ == "__main__":
    run(lambda: main("flux2"))
