from d2ssl.report import pieces


def test_a_file_name_that_is_no_text_does_not_stop_the_page(tmp_path):
    name = b"K\xf6ln & <b>.png".decode(errors="surrogateescape")  # Latin-1, as in old zips
    path = tmp_path / "page.html"
    pieces.write_page(str(path), name, [pieces.line(f"photo {name}")])
    assert "photo K?ln &amp; &lt;b&gt;.png" in path.read_text(encoding="utf-8")
