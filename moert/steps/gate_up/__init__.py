"""Gate/up GEMM with the activation: from tokens to the intermediates of the routed rows."""
