"""A network as a graph: captured once, with one view of every layer."""
