"""Every model of timm and torchvision, and small ones of transformers: traced, quantized, run, compiled."""
