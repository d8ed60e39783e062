"""Devices and named axes; knows no model."""
