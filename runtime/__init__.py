"""Bundle and video in, caption out. Needs neither torch nor transformers nor onnx.

Start at ``captioner.py``; ``intertitle.Captioner`` is its public name.
"""
