"""What is known of activations: statistics, moments, images, ranges."""
