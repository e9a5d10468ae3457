"""The Triton kernels and their launch settings. Nothing here knows of modules or autograd."""
