"""LLaVA-NeXT-Video in transformers' layout (llava-hf/LLaVA-NeXT-Video-7B-hf)."""
