"""What all tests share: no network, and few threads (the machines that run them have two cores)."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub

import torch

torch.set_num_threads(min(2, os.cpu_count() or 1))
