"""What all tests share: no network, and one thread (tensors here are tiny, and threads that wait for each other are slow)."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub

import torch

torch.set_num_threads(1)  # a test of full-size networks may ask for more
