"""The tests download nothing, and say so at once where something would."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
