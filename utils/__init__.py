"""The library: graphs, quantizers, passes, engines, tasks and runs; imports neither dfq nor modeling."""
