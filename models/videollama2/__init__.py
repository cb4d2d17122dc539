"""VideoLLaMA 2, 2.1 and 2.1-AV (DAMO-NLP-SG/VideoLLaMA2)."""
