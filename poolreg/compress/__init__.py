"""Compressed variants: calibrate once, plan sizes, apply closed forms, export and record."""
