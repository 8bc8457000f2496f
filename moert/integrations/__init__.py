"""moert inside other libraries: thin layers without kernels, each imported only by who uses that library."""
