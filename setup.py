"""Installation: `pip install -e .` for training, `pip install -e ".[test]"` for the test suite as well."""

from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent

setup(
    name="lorasmith",
    version="0.1.0",
    description="A trainer of LoRAs and full fine-tunes for diffusion models",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["library*", "networks*", "tools*"]),
    package_data={"library": ["released/*"]},
    py_modules=[path.stem for path in ROOT.glob("*_train_network.py")] + ["train_network"],
    install_requires=[
        "torch>=2.6",
        "accelerate>=1.6",
        "transformers>=5.0",
        "diffusers>=0.38",
        "safetensors>=0.5",
        "tomli>=2; python_version < '3.11'",
        "numpy>=1.26",
        "pillow>=10.0",
        "opencv-python-headless>=4.10",
        "av>=17.0",
        "sentencepiece>=0.2",
        "prodigyopt>=1.1",
        "bitsandbytes>=0.45; platform_system != 'Darwin'",
        "matplotlib>=3.8",
    ],
    extras_require={
        "test": [
            "pytest>=8",
            "pytest-xdist>=3.6",
            "ruff>=0.6",
            "tensorboard>=2.16",
            "peft>=0.15",
            "lion-pytorch>=0.2",
            "schedulefree>=1.4",
            "dadaptation>=3.2",
        ],
        "optimizers": ["lion-pytorch>=0.2", "schedulefree>=1.4", "dadaptation>=3.2"],
        "tensorboard": ["tensorboard>=2.16"],
        "wandb": ["wandb>=0.17"],
    },
)
