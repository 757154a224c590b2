"""Where W&B sends to, and whether it has a key, found without importing it: it takes a second, and the launcher has no other use for it."""

import os
import re
from pathlib import Path
from urllib.parse import urlsplit


def wandb_server() -> str:
    """The address of the W&B server: from the environment, from `wandb login --host`, or W&B's own."""
    settings = Path(os.path.expanduser(os.environ.get("WANDB_CONFIG_DIR", "~/.config/wandb"))) / "settings"
    typed = re.search(r"^base_url\s*=\s*(\S+)", settings.read_text(errors="replace"), re.MULTILINE) if settings.exists() else None
    return os.environ.get("WANDB_BASE_URL") or (typed[1] if typed else "https://api.wandb.ai")


def has_wandb_key(in_file: bool = False) -> bool:
    """Whether W&B finds an API key for its server. in_file: only in ~/.netrc, not in the environment."""
    if os.environ.get("WANDB_API_KEY") and not in_file:
        return True
    # os.path: where a user has no home, Path.expanduser raises
    netrc, server = Path(os.path.expanduser(os.environ.get("NETRC", "~/.netrc"))), urlsplit(wandb_server()).hostname or ""
    return netrc.is_file() and bool(re.search(rf"\bmachine\s+{re.escape(server)}\s", netrc.read_text(errors="replace")))
