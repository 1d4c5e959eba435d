"""Make pictures with AuraFlow or Pony V7 and LoRAs of it. All options: python auraflow_minimal_inference.py --help"""

from library.errors import run
from library.inference import main

if __name__ == "__main__":
    run(lambda: main("auraflow"))
