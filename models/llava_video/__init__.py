"""LLaVA-Video (LLaVA-VL/LLaVA-NeXT, model_type ``llava_qwen``)."""
