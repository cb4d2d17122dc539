"""The dialects of ONNX. A dialect says which operators attention, norms and quantized matmuls become."""
