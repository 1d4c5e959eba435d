"""Make videos with Wan 2.1 or 2.2 and LoRAs of it. All options: python wan_minimal_inference.py --help"""

from library.errors import run
from library.inference import main

if __name__ == "__main__":
    run(lambda: main("wan"))
