"""Make pictures with OmniGen2 and LoRAs of it. All options: python omnigen2_minimal_inference.py --help"""

from library.errors import run
from library.inference import main

if __name__ == "__main__":
    run(lambda: main("omnigen2"))
