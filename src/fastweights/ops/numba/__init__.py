"""What any CPU kernel needs: vectors, copies between tensors and scratch, threads."""
