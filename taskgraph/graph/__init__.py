"""Declare: tensors, ops, graphs and devices, as frozen values."""
