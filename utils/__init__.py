"""What the passes and the scripts stand on; imports neither dfq nor modeling."""
