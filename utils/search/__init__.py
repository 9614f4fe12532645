"""--auto: which recipe brings a network nearest to float, and how far that is likely to be."""
