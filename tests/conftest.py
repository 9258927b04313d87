import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
torch.set_num_threads(1)                  # the models are tiny; waiting for a second thread on a busy machine takes longer
