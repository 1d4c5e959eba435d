"""Make pictures with Cosmos-Predict2 and LoRAs of it. Options: python cosmos_predict2_minimal_inference.py --help"""

from library.errors import run
from library.inference import main

if __name__ == "__main__":
    run(lambda: main("cosmos_predict2"))
