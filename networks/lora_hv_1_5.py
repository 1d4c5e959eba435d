"""networks.lora by the name that musubi-tuner has for HunyuanVideo-1.5; the family's facts are in its record."""

from networks.lora import create_network, create_network_from_weights

__all__ = ["create_network", "create_network_from_weights"]
