"""Settings of the whole test run."""

import torch

# The tests are small, and run in several processes at once: threads would only wait for each other.
torch.set_num_threads(1)
