"""The operations that emulated layers are made of, with an implementation in plain torch, for CPUs and for GPUs."""
