"""Where W&B sends to, and whether it has a key, found without importing it: it takes a second, and the launcher has no other use for it."""

import os
import re
from pathlib import Path


def wandb_server() -> str:
    """The address of the W&B server: from the environment, from `wandb login --host`, or W&B's own."""
    settings = Path(os.environ.get("WANDB_CONFIG_DIR", "~/.config/wandb")).expanduser() / "settings"
    typed = re.search(r"^base_url\s*=\s*(\S+)", settings.read_text(errors="replace"), re.MULTILINE) if settings.exists() else None
    return os.environ.get("WANDB_BASE_URL") or (typed[1] if typed else "https://api.wandb.ai")


def has_wandb_key(in_file: bool = False) -> bool:
    """Whether W&B finds an API key. in_file: only in ~/.netrc, not in the environment."""
    if os.environ.get("WANDB_API_KEY") and not in_file:
        return True
    netrc = Path("~/.netrc").expanduser()
    return netrc.exists() and "api.wandb.ai" in netrc.read_text(errors="replace")
