"""Of kernels on GPUs: what those of any rule need."""
