"""Requests made from the OpenAPI document, fitting it and not: none makes the server fail, answers are as described."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from serving import WatchedBackend, served

from cn_clip.clip.encoder import Encoder
from cn_clip.retrieval.manifest import Manifest, ModelInfo
from cn_clip.retrieval.store import Index, open_index
from cn_clip.retrieval.writer import NewItem, open_writer
from cn_clip.serve.limits import Limits

SECONDS = 600  # only for a server that hangs
CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]


@pytest.fixture
def index(tmp_path: Path) -> Index:
    folder = tmp_path / "three.index"
    with open_writer(folder, Manifest(ModelInfo("tiny", "fingerprint", WatchedBackend.embed_dim))) as writer:
        writer.commit([NewItem(number, row, {"number": number}) for number, row in enumerate(np.eye(3, 4, dtype="f4"))])
    return open_index(folder)


@pytest.mark.parametrize("mode", GenerationMode)
def test_no_request_makes_the_server_fail_or_give_an_answer_that_is_not_described(
    mode: GenerationMode, index: Index
) -> None:
    statuses: Counter[tuple[str, int]] = Counter()
    with served(Encoder(WatchedBackend()), Limits(max_wait_ms=0), index=index) as address:
        operations = [one.ok() for one in schemathesis.openapi.from_url(f"{address}/openapi.json").get_all_operations()]
        assert len(operations) == 24
        for operation in operations:
            if mode is GenerationMode.NEGATIVE and not operation.body:  # any text is a path
                continue

            @given(case=operation.as_strategy(generation_mode=mode))
            @settings(
                max_examples=20,
                deadline=None,
                derandomize=True,
                database=None,
                phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            )
            def check(case: schemathesis.Case) -> None:
                if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
                    case.body["model"] = "tiny"
                    if mode is GenerationMode.POSITIVE and case.path.endswith("/embeddings"):
                        # Of a second input, of dimensions and of made-up pictures there are only refusals.
                        given = case.body.get("input")
                        case.body["input"] = given if isinstance(given, str) else "猫"
                        for field in ("messages", "dimensions", "modality"):
                            case.body.pop(field, None)
                if isinstance(case.body, dict) and mode is GenerationMode.POSITIVE and case.path == "/v1/search":
                    # Made-up pictures, conditions and names of indexes are refused.
                    case.body["query"] = "猫"
                    for field in ("index", "where", "metadata", "min_score"):
                        case.body.pop(field, None)
                    (case.query or {}).pop("index", None)
                statuses[case.path, case.call_and_validate(checks=CHECKS, timeout=SECONDS).status_code] += 1

            check()
    if mode is GenerationMode.POSITIVE:
        assert {("/v1/embeddings", 200), ("/v1/search", 200)} <= set(statuses)
