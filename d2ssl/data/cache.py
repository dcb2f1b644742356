"""Where results that take long to make are kept between runs, away from the data sets."""

import os


def default_cache_dir() -> str:
    """``$D2SSL_CACHE``, ``~/.cache/d2ssl`` where that is not set; it need not exist."""
    return os.path.expanduser(os.environ.get("D2SSL_CACHE", os.path.join("~", ".cache", "d2ssl")))
