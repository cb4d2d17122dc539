"""InternVL2 with an InternLM2 decoder (OpenGVLab/InternVL2-8B and -2B)."""
