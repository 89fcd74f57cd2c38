"""Boxes in images, crops of images, images as bytes and arrays, and where frames come from."""
