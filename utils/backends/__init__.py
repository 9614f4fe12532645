"""The engines that people deploy to, each held to the simulation."""
