"""TensorRT: what its documentation asks of a file. No file was run on its hardware."""
