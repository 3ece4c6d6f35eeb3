"""The CPU backend: LLVM IR by llvmlite, own GEMM, own thread pool, own math."""
