"""What all tests share: no network, fonts of their own, and one thread (tensors here are tiny, and threads that wait for each other are slow)."""

import atexit
import os
import shutil
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub

# matplotlib's list of fonts lies in the user's home, for all of its installations there; one that another made may lack the fonts of ours,
# and every process whose figures then miss one says so. Made here once, it is right, and no test has to wait for it.
os.environ["MPLCONFIGDIR"] = tempfile.mkdtemp(prefix="labkit-matplotlib-")
atexit.register(shutil.rmtree, os.environ["MPLCONFIGDIR"], ignore_errors=True)

import matplotlib.font_manager
import torch

torch.set_num_threads(1)  # a test of full-size networks may ask for more
