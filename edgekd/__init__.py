"""edgekd: from a large vision model and a device to the best small model that runs there within a budget."""
__version__ = "0.1.0"
