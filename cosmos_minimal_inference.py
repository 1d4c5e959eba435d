"""Make videos with Cosmos 1.0 and LoRAs of it. Options: python cosmos_minimal_inference.py --help"""

from library.errors import run
from library.inference import main

if __name__ == "__main__":
    run(lambda: main("cosmos"))
