"""What the service keeps of what it made."""

from cn_clip.serve.recent import Recent


def test_those_asked_for_longest_ago_go_first() -> None:
    recent = Recent[str, bytes](10, len)
    recent.put("a", b"1234")
    recent.put("b", b"1234")
    assert recent.get("a") == b"1234"
    recent.put("c", b"123")  # 11 bytes: one must go
    assert [recent.get(key) for key in "abc"] == [b"1234", None, b"123"]
    assert recent.num_bytes == 7
    recent.put("a", b"1")  # in its place
    assert (recent.get("a"), recent.num_bytes) == (b"1", 4)


def test_one_larger_than_all_of_the_room_is_not_kept() -> None:
    recent = Recent[str, bytes](10, len)
    recent.put("a", b"12345678901")
    assert (recent.get("a"), recent.num_bytes) == (None, 0)
