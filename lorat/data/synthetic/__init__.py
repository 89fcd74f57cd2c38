"""Synthetic videos, made on first use."""

from lorat.data.synthetic.videos import SPLITS, WIDTH, Split, Video, ensure, render, write_shards

__all__ = ["SPLITS", "WIDTH", "Split", "Video", "ensure", "render", "write_shards"]
