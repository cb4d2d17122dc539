"""AuroraCap (rese1f/aurora), the captioner that SynPO aligns."""
