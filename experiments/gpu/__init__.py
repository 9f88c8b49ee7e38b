"""The parts of gpu_check.py, a file each."""
