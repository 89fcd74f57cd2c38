"""Boxes, crops and the pixels of images, in NumPy and OpenCV."""
