"""What the service gives of its indexes: which there are, items in an order, small pictures, and the files."""

import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image
from serving import WatchedBackend, served, wait_until

from cn_clip.clip.encoder import Encoder
from cn_clip.clip.picture_names import PICTURE_SUFFIXES, VIDEO_SUFFIXES
from cn_clip.retrieval.manifest import Manifest, ModelInfo
from cn_clip.retrieval.store import Index, open_index
from cn_clip.retrieval.writer import NewItem, open_writer
from cn_clip.serve import items
from cn_clip.serve.items import open_original
from cn_clip.serve.limits import Limits

DAY = 86_400_000_000_000


def picture(width: int, height: int) -> bytes:
    stream = io.BytesIO()
    Image.effect_noise((width, height), 50).save(stream, "JPEG")
    return stream.getvalue()


THUMBNAIL = picture(400, 200)
# id: (vector, date, day of the file's change since 1970). 2021-05 lies between the days 18,700 and 18,800.
ITEMS: dict[str, tuple[list[float], str | None, int]] = {
    "a/old.jpg": ([1, 0, 0, 0], "2019-01-01T00:00:00", 19_000),
    "a/二.jpg": ([0.6, 0.8, 0, 0], None, 18_750),
    "new.jpg": ([0, 1, 0, 0], "2022-01-01T10:00:00", 1),
    "link.jpg": ([0, 0, 1, 0], None, 0),
    "note.txt": ([0, 0, 0, 1], None, 2),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pictures; link.jpg leads out of them, and note.txt is none."""
    root = tmp_path_factory.mktemp("photos")
    (root / "pictures" / "a").mkdir(parents=True)
    (root / "secret.jpg").write_bytes(picture(8, 8))
    for name in ITEMS:
        (root / "pictures" / name).write_bytes(picture(40, 30))
    (root / "pictures" / "link.jpg").unlink()
    (root / "pictures" / "link.jpg").symlink_to(root / "secret.jpg")
    return root / "pictures"


def written(folder: Path, index: Path) -> Path:
    """An index of those pictures."""
    items = [
        NewItem(
            name,
            np.array(vector, dtype=np.float32),
            {
                "source": str(folder),
                "path": str(folder / name),
                "size": 9,
                "mtime_ns": day * DAY,
                "digest": f"digest of {name}",
                "group": name[:1],
                **({"date": date} if date else {}),
            },
            b"" if name == "note.txt" else THUMBNAIL,
        )
        for name, (vector, date, day) in ITEMS.items()
    ]
    with open_writer(index, Manifest(ModelInfo("tiny", "fingerprint", 4))) as writer:
        writer.commit(items)
    return index


@pytest.fixture(scope="module")
def index(folder: Path) -> Index:
    return open_index(written(folder, folder.parent / "photos.index"))


@pytest.fixture(scope="module")
def client(index: Index) -> Iterator[httpx.Client]:
    with (
        served(Encoder(WatchedBackend()), Limits(max_wait_ms=0), index=index, with_originals=True) as address,
        httpx.Client(base_url=address, timeout=60) as client,
    ):
        yield client


@pytest.fixture(scope="module")
def discreet(index: Index) -> Iterator[httpx.Client]:
    """Of a server that gives no originals."""
    with (
        served(Encoder(WatchedBackend()), Limits(max_wait_ms=0), index=index) as address,
        httpx.Client(base_url=address, timeout=60) as client,
    ):
        yield client


def error(answer: httpx.Response) -> dict[str, Any]:
    return dict(answer.json()["error"], status=answer.status_code)


# --- what there is


def test_the_indexes_say_what_they_hold(client: httpx.Client, discreet: httpx.Client) -> None:
    card = {
        "name": "photos",
        "object": "index",
        "model": "tiny",
        "count": 5,
        "generation": 2,
        "fields": ["group", "date"],
        "has_originals": True,
        "has_thumbnails": True,
        "orders": ["newest", "typical"],
    }
    assert client.get("/v1/index").json() == {"object": "list", "data": [card]}
    assert discreet.get("/v1/index").json()["data"] == [{**card, "has_originals": False}]


def test_items_come_the_newest_first_by_their_date_or_that_of_their_file(client: httpx.Client) -> None:
    answer = client.get("/v1/index/items").json()
    assert [hit["id"] for hit in answer["data"]] == ["new.jpg", "a/二.jpg", "a/old.jpg", "note.txt", "link.jpg"]
    assert (answer["index"], answer["total"]) == ("photos", 5)
    assert answer["data"][1] == {
        "id": "a/二.jpg",
        "score": None,
        "metadata": {"group": "a"},
        "thumbnail": "/v1/index/thumbnails/a%2F%E4%BA%8C.jpg",
        "original": "/v1/index/items/a%2F%E4%BA%8C.jpg",
    }


def test_items_come_the_most_typical_first(client: httpx.Client) -> None:
    # The mean is (0.32, 0.36, 0.2, 0.2): products 0.32, 0.48, 0.36, 0.2 and 0.2.
    answer = client.get("/v1/index/items", params={"order": "typical"}).json()
    assert [hit["id"] for hit in answer["data"]] == ["a/二.jpg", "new.jpg", "a/old.jpg", "link.jpg", "note.txt"]


def test_items_are_counted_and_cut_by_condition_offset_and_limit(client: httpx.Client) -> None:
    answer = client.get("/v1/index/items", params={"where": "group=a,n", "offset": 1, "limit": 2}).json()
    assert (answer["total"], [hit["id"] for hit in answer["data"]]) == (4, ["a/二.jpg", "a/old.jpg"])
    assert client.get("/v1/index/items", params={"offset": 9}).json()["data"] == []


@pytest.mark.parametrize(
    ("params", "param", "message"),
    [
        ({"where": "a=="}, "where", "character 3: expected a value after ="),
        ({"order": "oldest"}, "order", "'newest' or 'typical'"),
        ({"limit": 0}, "limit", "greater than or equal to 1"),
        ({"limit": 1001}, "limit", "less than or equal to 1000"),
        ({"offset": 10**9}, "offset", "less than or equal to 10000"),
        ({"index": "other"}, "index", "known are ['photos']"),
    ],
)
def test_what_cannot_be_listed_is_refused(
    client: httpx.Client, params: dict[str, Any], param: str, message: str
) -> None:
    found = error(client.get("/v1/index/items", params=params))
    assert (found["status"], found["param"]) == (404 if param == "index" else 400, param)
    assert message in found["message"]


# --- search


def search(client: httpx.Client, **fields: Any) -> dict[str, Any]:
    answer = client.post("/v1/search", json={"query": {"id": "a/old.jpg"}, **fields})
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def test_hits_begin_at_an_offset(client: httpx.Client) -> None:
    answer = search(client, k=2, offset=1)
    assert [(hit["id"], round(hit["score"], 4)) for hit in answer["data"]] == [("a/二.jpg", 0.6), ("new.jpg", 0)]
    assert answer["index"] == "photos"
    assert search(client, offset=10_000)["data"] == []


def test_an_index_is_named_in_the_body_or_the_address(client: httpx.Client) -> None:
    assert search(client, index="photos", k=1)["data"][0]["id"] == "a/old.jpg"
    for given in ({"json": {"query": "猫", "index": "x"}}, {"json": {"query": "猫"}, "params": {"index": "x"}}):
        found = error(client.post("/v1/search", **given))
        assert (found["status"], found["code"], found["param"]) == (404, "index_not_found", "index")


def test_where_a_picture_lies_is_told_only_to_who_asks_a_server_that_gives_originals(
    client: httpx.Client, discreet: httpx.Client, folder: Path
) -> None:
    assert search(client, k=1)["data"][0]["metadata"] == {"group": "a", "date": "2019-01-01T00:00:00"}
    told = search(client, k=1, metadata="all")["data"][0]["metadata"]
    assert (told["path"], told["source"], told["size"]) == (str(folder / "a/old.jpg"), str(folder), 9)
    found = error(discreet.post("/v1/search", json={"query": "猫", "metadata": "all"}))
    assert (found["status"], found["param"], found["code"]) == (403, "metadata", "originals_not_shared")
    assert error(discreet.get("/v1/index/items?metadata=all"))["status"] == 403


@pytest.mark.parametrize("field", ["source", "digest", "size", "mtime_ns", "table_fields"])
def test_a_condition_finds_out_no_more_than_is_told(client: httpx.Client, discreet: httpx.Client, field: str) -> None:
    where = f"group=a or not (group=b {field}>=1)"
    listed = error(discreet.get("/v1/index/items", params={"where": where}))
    searched = error(discreet.post("/v1/search", json={"query": "猫", "where": where}))
    for found in (listed, searched):
        assert (found["status"], found["param"], found["code"]) == (403, "where", "originals_not_shared")
        assert found["message"].startswith(f"where: {field} is told only by a server that gives originals")
    if field != "table_fields":  # which no item has
        assert client.get("/v1/index/items", params={"where": where}).status_code == 200


def test_a_condition_on_the_path_is_one_on_the_id(discreet: httpx.Client, folder: Path) -> None:
    def found(where: str) -> list[str]:
        return [hit["id"] for hit in discreet.get("/v1/index/items", params={"where": where}).json()["data"]]

    assert found("path~old") == found("id~old") == ["a/old.jpg"]
    assert found(f'path~"{folder}"') == []
    # As a value it is a word like any other.
    assert found("group=source") == []


def test_an_item_of_the_index_is_classified_by_its_vector(client: httpx.Client) -> None:
    asked = {"id": "a/old.jpg", "labels": ["猫", "鸟鸟"], "templates": ["{}"]}
    answer = client.post("/v1/classify", json=asked).json()
    # Both vectors of labels lie on the first axis, as does that of the item.
    assert [(one["label"], one["cosine"]) for one in answer["data"]] == [("猫", 1), ("鸟鸟", 1)]
    assert error(client.post("/v1/classify", json={**asked, "id": "none"}))["code"] == "not_found"
    for wrong in ({"image": "data:image/png;base64,"}, {"id": None}):
        assert error(client.post("/v1/classify", json={**asked, **wrong}))["message"].startswith("image: expected eith")


# --- small pictures


def test_small_pictures_have_three_sizes_and_none_is_larger_than_it_is_kept(client: httpx.Client) -> None:
    sizes = {}
    for name in ("small", "medium", "large"):
        answer = client.get("/v1/index/thumbnails/new.jpg", params={"size": name})
        sizes[name] = Image.open(io.BytesIO(answer.content)).size
    assert sizes == {"small": (160, 80), "medium": (320, 160), "large": (400, 200)}
    assert client.get("/v1/index/thumbnails/new.jpg").content == THUMBNAIL
    assert error(client.get("/v1/index/thumbnails/new.jpg?size=huge"))["param"] == "size"


def test_a_small_picture_is_made_once_for_all_who_ask(discreet: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    made, make = list[items.Size](), items.made_smaller

    def watched(data: bytes, size: items.Size) -> bytes:
        made.append(size)
        return make(data, size)

    monkeypatch.setattr(items, "made_smaller", watched)
    # Both items have the same picture.
    for name in ("link.jpg", "new.jpg", "link.jpg"):
        for size, width in (("medium", 320), ("small", 160), ("large", 400)):
            answer = discreet.get(f"/v1/index/thumbnails/{name}", params={"size": size})
            assert Image.open(io.BytesIO(answer.content)).width == width
    assert made == ["medium", "small"]


def test_a_small_picture_that_the_client_has_is_not_sent_again(client: httpx.Client) -> None:
    path = "/v1/index/thumbnails/new.jpg?size=small"
    tag = client.get(path).headers["etag"]
    again = client.get(path, headers={"If-None-Match": tag})
    assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", tag)
    assert client.get("/v1/index/thumbnails/new.jpg", headers={"If-None-Match": tag}).status_code == 200


# --- originals


def test_the_file_of_an_item_is_given_whole_and_in_ranges(client: httpx.Client, folder: Path) -> None:
    data = (folder / "a/old.jpg").read_bytes()
    whole = client.get("/v1/index/items/a%2Fold.jpg")
    assert (whole.status_code, whole.content) == (200, data)
    assert whole.headers["content-type"] == "image/jpeg"
    assert whole.headers["content-disposition"] == 'inline; filename="old.jpg"'
    assert whole.headers["x-content-type-options"] == "nosniff"
    assert "sandbox" in whole.headers["content-security-policy"]
    part = client.get("/v1/index/items/a%2Fold.jpg", headers={"Range": "bytes=10-19"})
    assert (part.status_code, part.content) == (206, data[10:20])
    assert part.headers["content-range"] == f"bytes 10-19/{len(data)}"
    past = client.get("/v1/index/items/a%2Fold.jpg", headers={"Range": f"bytes={len(data)}-"})
    assert (past.status_code, past.headers["content-range"]) == (416, f"bytes */{len(data)}")


def test_the_file_is_given_too_where_the_system_has_no_names_of_open_files(
    client: httpx.Client, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(items, "_DESCRIPTORS", str(folder / "none"))
    assert client.get("/v1/index/items/a%2Fold.jpg").content == (folder / "a/old.jpg").read_bytes()


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("link.jpg", "leaves the folder"),
        ("note.txt", "not a picture"),
        ("none.jpg", "no item"),
        ("../secret.jpg", "no item"),
        ("/etc/passwd", "no item"),
    ],
)
def test_no_other_file_is_given(client: httpx.Client, name: str, reason: str) -> None:
    found = error(client.get(f"/v1/index/items/{name.replace('/', '%2F')}"))
    assert found["status"] == 404
    assert reason in found["message"]


def test_a_file_whose_name_is_no_text_is_given(tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode("龟.jpg".encode("gbk"))
    path.write_bytes(b"turtle")
    with open_writer(tmp_path / "index", Manifest(ModelInfo("tiny", "fingerprint", 4))) as writer:
        facts = {"path": str(path), "source": str(tmp_path)}
        writer.commit([NewItem("gbk:龟.jpg", np.eye(4, dtype=np.float32)[0], facts)])
    encoder = Encoder(WatchedBackend())
    with served(encoder, index=open_index(tmp_path / "index"), with_originals=True) as address:
        (hit,) = httpx.post(f"{address}/v1/search", json={"query": "龟"}, timeout=60).json()["data"]
        answer = httpx.get(address + hit["original"], timeout=60)
    assert (answer.status_code, answer.content) == (200, b"turtle")
    assert answer.headers["content-disposition"] == "inline; filename*=utf-8''gbk%3A%E9%BE%9F.jpg"


@pytest.mark.parametrize(
    ("name", "kind"), [("a.MP4", "mp4"), ("b.mov", "quicktime"), ("c.webm", "webm"), ("d.mpeg", "mpeg")]
)
def test_the_file_of_a_frame_is_its_video(tmp_path: Path, name: str, kind: str) -> None:
    (tmp_path / name).write_bytes(b"film")
    found = open_original({"path": str(tmp_path / name), "source": str(tmp_path)})
    assert (found.media_type, found.facts.st_size) == (f"video/{kind}", 4)
    found.close()


def test_every_kind_that_an_index_takes_has_a_type() -> None:
    assert set(items.MEDIA_TYPES) == {*PICTURE_SUFFIXES, *VIDEO_SUFFIXES}
    assert [items.MEDIA_TYPES[one] for one in (".jpg", ".heic", ".mp4", ".mov")] == [
        "image/jpeg",
        "image/heif",
        "video/mp4",
        "video/quicktime",
    ]
    assert items.MEDIA_TYPES[".dng"] == items.OTHER


def test_originals_are_given_only_by_a_server_that_was_started_so(discreet: httpx.Client) -> None:
    assert error(discreet.get("/v1/index/items/new.jpg"))["code"] == "originals_not_shared"
    assert discreet.get("/v1/index/items").json()["data"][0]["original"] is None


def test_giving_files_leaves_none_open(client: httpx.Client) -> None:
    def opened() -> int:
        return len(os.listdir("/proc/self/fd"))

    if not Path("/proc/self/fd").exists():
        pytest.skip("needs /proc")
    client.get("/v1/index/items/new.jpg")
    before = opened()
    for _ in range(5):
        client.get("/v1/index/items/new.jpg")
        client.get("/v1/index/items/new.jpg", headers={"Range": "bytes=999999-"})
        client.get("/v1/index/items/note.txt")
    wait_until(lambda: opened() <= before)
