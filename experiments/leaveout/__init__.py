"""The parts of domains.py, a file each: what is to be done, the training, the table."""
