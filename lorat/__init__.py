"""LoRAT: a visual object tracker that adapts a frozen DINOv2 ViT with LoRA (ECCV 2024)."""
