"""networks.lora by the name that sd-scripts has for Lumina; the family's facts are in its record."""

from networks.lora import create_network, create_network_from_weights

__all__ = ["create_network", "create_network_from_weights"]
