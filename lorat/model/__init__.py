"""The network: a frozen DINOv2 transformer, adapters, embeddings and the head."""
