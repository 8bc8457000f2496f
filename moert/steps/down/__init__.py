"""Down GEMM: from the intermediates of the routed rows to the layer's output."""
