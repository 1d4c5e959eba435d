"""Make pictures with Lumina Image 2.0 and LoRAs of it. All options: python lumina_minimal_inference.py --help"""

from library.errors import run
from library.inference import main

if __name__ == "__main__":
    run(lambda: main("lumina_2"))
