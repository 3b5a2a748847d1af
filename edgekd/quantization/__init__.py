"""Precisions by name (`schemes`) and the inputs that static ones are calibrated with (`calibration`)."""
