"""Measurements of accuracy, speed and coverage, each a module whose output is a file of results/."""
