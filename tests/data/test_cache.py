from pathlib import Path

from d2ssl.data.cache import default_cache_dir


def test_the_variable_or_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/of/somebody")
    monkeypatch.delenv("D2SSL_CACHE", raising=False)
    assert Path(default_cache_dir()) == Path("/home/of/somebody/.cache/d2ssl")
    monkeypatch.setenv("D2SSL_CACHE", "~/elsewhere")
    assert Path(default_cache_dir()) == Path("/home/of/somebody/elsewhere")
