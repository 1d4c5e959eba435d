"""Make pictures with HunyuanImage-2.1 and LoRAs of it. All options: python hunyuan_image_minimal_inference.py --help"""

from library.errors import run
from library.inference import main

if __name__ == "__main__":
    run(lambda: main("hunyuan_image"))
