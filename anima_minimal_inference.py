"""Make pictures with Anima and LoRAs of it. All options: python anima_minimal_inference.py --help"""

from library.errors import run
from library.inference import main

if __name__ == "__main__":
    run(lambda: main("anima"))
