"""From a checkpoint to a bundle: trace each component, lower it to a target's dialect, quantize, write."""
