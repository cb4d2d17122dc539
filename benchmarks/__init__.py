"""What it costs: scripts that measure and write JSON under ``results/``, each with its environment."""
