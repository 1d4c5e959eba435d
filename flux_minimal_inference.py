"""Make pictures with FLUX.1 dev, schnell or Kontext and LoRAs. All options: python flux_minimal_inference.py --help"""

from library.errors import run
from library.inference import main

if __name__ == "__main__":
    run(lambda: main("flux"))
